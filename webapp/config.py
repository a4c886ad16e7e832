"""The environment becomes settings; nobody else reads it. A bad value names itself and stops the start."""

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import click
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
INSTANCE = ROOT / "instance"
SECRETS = ("GITHUB_CALLBACK_SECRET", "SECRET_KEY", "OPERATOR_TOKEN")
SHORTEST_SECRET = 16
CALLBACK_PATH = "/api/webhooks/github"
LARGEST_BODY = 65_536  # bytes, of any request but GitHub's deliveries
LARGEST_DELIVERY = 2**20  # those of runs have tens of thousands, a long commit message more

T = TypeVar("T")


class BadSetting(click.ClickException):
    """A setting that is missing or wrong; the message begins with its name."""


@dataclass(frozen=True)
class Settings:
    """What the operator chose; durations in seconds."""

    host: str
    port: int
    database_url: str
    callback_keys: tuple[bytes, ...]
    secret_key: str
    operator_token: str
    public_url: str
    dispatch_token: str
    dispatch_repository: str
    dispatch_api_url: str
    dispatch_workflow: str
    dispatch_ref: str
    webhook_keys: tuple[bytes, ...]
    operator_contact: str
    embed_origins: tuple[str, ...]
    quiet_after: float
    lost_after: float
    callback_max_skew: float
    trusted_proxies: int

    @property
    def can_dispatch(self) -> bool:
        """Whether GitHub may be asked to run a job."""
        return bool(self.dispatch_token and self.dispatch_repository)

    @property
    def callback_url(self) -> str:
        """Where workflows are told to report."""
        return self.public_url + CALLBACK_PATH


def load(environ: Mapping[str, str]) -> Settings:
    """Settings from an environment; raises BadSetting."""
    host = environ.get("HOST") or "127.0.0.1"
    port = _read(environ, "PORT", "8000", lambda text: _whole(text, 1, 65535))
    quiet_after = _read(environ, "QUIET_AFTER", "150", _seconds)
    lost_after = _read(environ, "LOST_AFTER", "900", _seconds)
    if not 0 < quiet_after <= lost_after:
        raise BadSetting("LOST_AFTER must not be less than QUIET_AFTER, and both more than 0")
    local = f"[{host}]" if ":" in host else host
    return Settings(
        host=host,
        port=port,
        database_url=_read(environ, "DATABASE_URL", f"sqlite:///{INSTANCE}/milepost.db", _database),
        callback_keys=_read(environ, "GITHUB_CALLBACK_SECRET", "", _keys),
        secret_key=_read(environ, "SECRET_KEY", "", _secret),
        operator_token=_read(environ, "OPERATOR_TOKEN", "", _secret),
        public_url=_read(environ, "PUBLIC_URL", f"http://{local}:{port}", _http_url),
        dispatch_token=environ.get("DISPATCH_TOKEN", ""),
        dispatch_repository=_read(environ, "DISPATCH_REPOSITORY", "", _repository),
        dispatch_api_url=_read(environ, "DISPATCH_API_URL", "https://api.github.com", _http_url),
        dispatch_workflow=environ.get("DISPATCH_WORKFLOW") or "provision-agent.yml",
        dispatch_ref=environ.get("DISPATCH_REF") or "main",
        webhook_keys=_read(environ, "GITHUB_WEBHOOK_SECRET", "", lambda t: _keys(t) if t else ()),
        operator_contact=environ.get("OPERATOR_CONTACT", "").strip(),
        embed_origins=_read(environ, "EMBED_ORIGINS", "", _origins),
        quiet_after=quiet_after,
        lost_after=lost_after,
        callback_max_skew=_read(environ, "CALLBACK_MAX_SKEW", "300", _seconds),
        trusted_proxies=_read(environ, "TRUSTED_PROXIES", "0", lambda text: _whole(text, 0, 10)),
    )


def environment() -> Mapping[str, str]:
    """What `load` reads: at the terminal also the secrets that `make run` made, but never for a server."""
    context = click.get_current_context(silent=True)
    at_terminal = context is not None and context.info_name != "run"
    return with_local_secrets(os.environ, make=False) if at_terminal else os.environ


def with_local_secrets(environ: Mapping[str, str], *, make: bool) -> dict[str, str]:
    """The environment, its missing secrets taken from `instance/`, and made there once where asked."""
    complete = dict(environ)
    for name in SECRETS:
        path = INSTANCE / name.lower()
        if not complete.get(name) and make and not path.exists():
            INSTANCE.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_urlsafe(32))
        if not complete.get(name) and path.exists():
            complete[name] = path.read_text().strip()
    return complete


def _read(environ: Mapping[str, str], name: str, default: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(environ.get(name, "").strip() or default)
    except ValueError as error:
        raise BadSetting(f"{name} {error}") from None


def _whole(text: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise ValueError(f"must be a whole number from {least} to {most}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ValueError("must be a number of seconds")
    return seconds


def _secret(text: str) -> str:
    if len(text) < SHORTEST_SECRET:
        raise ValueError(f"must be set, to at least {SHORTEST_SECRET} characters")
    return text


def _keys(text: str) -> tuple[bytes, ...]:
    return tuple(_secret(key.strip()).encode() for key in text.split(","))


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be an http:// or https:// address")
    return text.rstrip("/")


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(_http_url(origin) for origin in text.replace(",", " ").split())
    if any(urlsplit(origin).path or ";" in origin for origin in origins):
        raise ValueError("must be origins such as https://wiki.example, without a path")
    return origins


def _repository(text: str) -> str:
    if text and (text.count("/") != 1 or not all(text.split("/")) or " " in text):
        raise ValueError("must be owner/name")
    return text


def _database(text: str) -> str:
    try:
        url = make_url(text)
    except ArgumentError:
        raise ValueError("must be an SQLAlchemy database URL") from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ValueError("must begin with sqlite:/// or postgresql://")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("must name a file")
    return url.render_as_string(hide_password=False)
