"""Signatures of callbacks, and the signed links to pages, badges and the sign-in; no Flask, no database."""

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


class Links:
    """The addresses that open a page, a badge or the operator's session to anybody who has them.

    The token of a page is a signed job id, with the link's number once a link was revoked; that of a badge
    opens nothing else, and ends with the link. `fingerprint` stands for the operator token: sessions and
    sign-in links end when it changes.
    """

    def __init__(self, public_url: str, secret: str, operator_token: str) -> None:
        self._public_url = public_url
        self.fingerprint = hmac.new(secret.encode(), operator_token.encode(), hashlib.sha256).hexdigest()
        self._pages, self._badges = (
            Signer(secret, kind, digest_method=hashlib.sha256) for kind in ("progress", "badge")
        )
        salt = f"sign-in {self.fingerprint}"
        self._sign_ins = TimestampSigner(secret, salt, digest_method=hashlib.sha256)

    def page(self, job_id: str, link: int) -> str:
        """The progress page of a job's `link`-th link."""
        return f"{self._public_url}/p/{_token(self._pages, job_id, link)}"

    def badge(self, job_id: str, link: int) -> str:
        """The badge of the same."""
        return f"{self._public_url}/p/{_token(self._badges, job_id, link)}/badge.svg"

    def sign_in(self) -> str:
        """A fresh link that signs in once."""
        return f"{self._public_url}/sign-in?key={self._sign_ins.sign(secrets.token_urlsafe(16)).decode()}"

    def read_page(self, token: str) -> tuple[str, int] | None:
        """The job id and the number of its link, None for a token that is not a page's of ours."""
        return _read(self._pages, token)

    def read_badge(self, token: str) -> tuple[str, int] | None:
        """The same of a badge."""
        return _read(self._badges, token)

    def read_key(self, key: str) -> str | None:
        """The random part of a sign-in link's key, by which it is known as used; None for a wrong or old one.

        Not the key itself: base64 can write one signature in several ways.
        """
        try:
            return self._sign_ins.unsign(key, max_age=SIGN_IN_LINK_LASTS).decode()
        except BadSignature:
            return None


def _token(signer: Signer, job_id: str, link: int) -> str:
    return signer.sign(f"{job_id}~{link}" if link else job_id).decode()  # `~` cannot stand in a job id


def _read(signer: Signer, token: str) -> tuple[str, int] | None:
    try:
        job_id, _, link = signer.unsign(token).decode().partition("~")
    except BadSignature:
        return None
    ours = _token(
        signer, job_id, int(link or 0)
    )  # unsign() ignores unused base64 bits: compare the exact token
    return (job_id, int(link or 0)) if hmac.compare_digest(ours.encode(), token.encode()) else None
