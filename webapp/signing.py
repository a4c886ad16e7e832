"""Signatures of callbacks, of the links to pages and badges, and of sign-in links; no Flask, no database."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

from itsdangerous import BadSignature, HMACAlgorithm, Signer, TimestampSigner

SIGN_IN_LINK_LASTS = 600  # seconds
_HMAC_SHA256 = HMACAlgorithm(hashlib.sha256)
_SIGNATURE = re.compile(r"(?:sha256=)?([0-9A-Fa-f]{64})")


def is_signed(body: bytes, signature: str, keys: Iterable[bytes]) -> bool:
    """Whether `signature` is the hex HMAC-SHA256 of `body` under one of `keys`.

    As GitHub signs its deliveries, with or without the prefix `sha256=`:
    https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
    """
    match = _SIGNATURE.fullmatch(signature)
    if not match:
        return False
    digest = bytes.fromhex(match[1])
    return any(_HMAC_SHA256.verify_signature(key, body, digest) for key in keys)


def hash_of(secret: str) -> str:
    """What the database keeps of a random secret of ours."""
    return hashlib.sha256(secret.encode()).hexdigest()


class ShareLinks:
    """The tokens of one kind of page: a signed job id, with its link's number once a link was revoked.

    Of another `kind` a token opens nothing.
    """

    def __init__(self, secret: str, kind: str) -> None:
        self._signer = Signer(secret, salt=kind, digest_method=hashlib.sha256)

    def token(self, job_id: str, link: int = 0) -> str:
        """The token of a job's `link`-th link; `~` cannot stand in a job id."""
        return self._signer.sign(f"{job_id}~{link}" if link else job_id).decode()

    def read(self, token: str) -> tuple[str, int] | None:
        """The job id and the number of its link, or None for a token that is not ours, to the letter."""
        try:
            value = self._signer.unsign(token).decode()
        except BadSignature:
            return None
        job_id, _, link = value.partition("~")
        ours = self.token(job_id, int(link or 0))  # unsign() forgives what base64 does not need
        same = hmac.compare_digest(ours.encode(), token.encode())
        return (job_id, int(link or 0)) if same else None


class OperatorSignatures:
    """What stands for the operator token in sessions and sign-in links; both end when it changes."""

    def __init__(self, secret: str, operator_token: str) -> None:
        self.fingerprint = hmac.new(secret.encode(), operator_token.encode(), hashlib.sha256).hexdigest()
        self._signer = TimestampSigner(
            secret, salt=f"sign-in {self.fingerprint}", digest_method=hashlib.sha256
        )

    def key(self) -> str:
        """The key of a fresh sign-in link."""
        return self._signer.sign(secrets.token_urlsafe(16)).decode()

    def read_key(self, key: str) -> str | None:
        """The random part of a link's key, by which it is known as used; None for a wrong or an old one.

        Not the key itself: base64 can write one signature in several ways.
        """
        try:
            return self._signer.unsign(key, max_age=SIGN_IN_LINK_LASTS).decode()
        except BadSignature:
            return None
