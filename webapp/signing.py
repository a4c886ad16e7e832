"""Signatures of callbacks, and the signed links to pages, badges and the sign-in; no Flask, no database."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from itsdangerous import BadSignature, Signer, TimestampSigner

SIGN_IN_LINK_LASTS = 600  # seconds


def is_signed(body: bytes, signature: str, keys: Iterable[bytes]) -> bool:
    """Whether `signature` is the hex HMAC-SHA256 of `body` under one of `keys`.

    As GitHub signs its deliveries, with or without the prefix `sha256=`:
    https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
    """
    given = signature.removeprefix("sha256=").lower().encode()
    return any(hmac.compare_digest(hmac.digest(key, body, "sha256").hex().encode(), given) for key in keys)


class Links:
    """The addresses that open a page, a badge or the operator's session to anybody who has them.

    A token is a signed job id, with the link's number once a link was revoked; that of a badge opens no
    page. `fingerprint` stands for the operator token: sessions and sign-in links end when it changes.
    """

    def __init__(self, public_url: str, secret: str, operator_token: str) -> None:
        self._public_url = public_url
        sha256 = hashlib.sha256
        self._signers = {kind: Signer(secret, kind, digest_method=sha256) for kind in ("progress", "badge")}
        self.fingerprint = hmac.new(secret.encode(), operator_token.encode(), sha256).hexdigest()
        salt = f"sign-in {self.fingerprint}"
        self._sign_ins = TimestampSigner(secret, salt, digest_method=sha256)

    def page(self, job_id: str, link: int) -> str:
        """The progress page of a job's `link`-th link."""
        return f"{self._public_url}/p/{self._token('progress', job_id, link)}"

    def badge(self, job_id: str, link: int) -> str:
        """The badge of the same."""
        return f"{self._public_url}/p/{self._token('badge', job_id, link)}/badge.svg"

    def sign_in(self) -> str:
        """A fresh link that signs in once."""
        return f"{self._public_url}/sign-in?key={self._sign_ins.sign(secrets.token_urlsafe(16)).decode()}"

    def _token(self, kind: str, job_id: str, link: int) -> str:
        value = f"{job_id}~{link}" if link else job_id  # `~` cannot stand in a job id
        return self._signers[kind].sign(value).decode()

    def read(self, token: str, kind: str = "progress") -> tuple[str, int] | None:
        """The job id and the number of its link, None for a token that is not ours and of this kind."""
        signed = token.rpartition(".")[0]
        ours = self._signers[kind].sign(signed)  # compared as a whole: unsign() ignores unused base64 bits
        if not hmac.compare_digest(ours, token.encode()):
            return None
        job_id, _, link = signed.partition("~")
        return job_id, int(link or 0)

    def read_key(self, key: str) -> str | None:
        """The random part of a sign-in link's key, by which it is known as used; None for a wrong or old one.

        Not the key itself: base64 can write one signature in several ways.
        """
        try:
            return self._sign_ins.unsign(key, max_age=SIGN_IN_LINK_LASTS).decode()
        except BadSignature:
            return None
