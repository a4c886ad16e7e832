"""The environment becomes settings; nobody else reads it. A bad value names itself and stops the start.

Settings may also stand in `milepost.env` beside `wsgi.py`; the environment wins.
"""

import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import click
from dotenv.parser import parse_stream
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
INSTANCE = ROOT / "instance"
ENV_FILE = ROOT / "milepost.env"
SECRETS = ("GITHUB_CALLBACK_SECRET", "SECRET_KEY", "OPERATOR_TOKEN")
SHORTEST_SECRET, SHORTEST_TOKEN = 16, 24
CALLBACK_PATH = "/api/webhooks/github"
LARGEST_BODY = 65_536  # bytes, of any request but GitHub's deliveries
LARGEST_DELIVERY = 2**20  # those of runs have tens of thousands, a long commit message more
OUR_PATHS = ("api", "events", "healthz", "jobs", "metrics", "p", "sign-in", "sign-out", "static")
_NAMES = """
HOST PORT DATABASE_URL GITHUB_CALLBACK_SECRET SECRET_KEY OPERATOR_TOKEN PUBLIC_URL PIPELINES
DISPATCH_TOKEN DISPATCH_REPOSITORY DISPATCH_API_URL DISPATCH_WORKFLOW DISPATCH_REF GITHUB_WEBHOOK_SECRET
NOTIFY_URLS NOTIFY_ON EMBED_ORIGINS OPERATOR_CONTACT QUIET_AFTER LOST_AFTER CALLBACK_MAX_SKEW
REQUIRE_SENT_AT WEB_CONCURRENCY TRUSTED_PROXIES
"""
NAMES = frozenset(_NAMES.split())
ORIGIN = r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
NOTIFIED = ("done", "failed", "cancelled", "lost")

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
    notify_urls: tuple[str, ...]
    notify_on: frozenset[str]
    pipelines: Path | None
    operator_contact: str
    embed_origins: tuple[str, ...]
    quiet_after: float
    lost_after: float
    callback_max_skew: float
    require_sent_at: bool
    web_concurrency: int
    trusted_proxies: int

    @property
    def can_dispatch(self) -> bool:
        """Whether GitHub may be asked to run a job."""
        return bool(self.dispatch_token and self.dispatch_repository)

    @property
    def told(self) -> frozenset[str]:
        """Of which events the operator is told."""
        return self.notify_on if self.notify_urls else frozenset()

    @property
    def callback_url(self) -> str:
        """Where workflows are told to report."""
        return self.public_url + CALLBACK_PATH


def load(environ: Mapping[str, str]) -> Settings:
    """Settings from an environment; raises BadSetting."""
    for name in NAMES & environ.keys():
        if not environ[name].isprintable():  # bytes that are no UTF-8, too
            raise BadSetting(f"{name} must be printable text in UTF-8")
    host = _read(environ, "HOST", "127.0.0.1", _host)
    port = _read(environ, "PORT", "8000", lambda text: _whole(text, 1, 65535))
    local = f"[{host}]" if ":" in host else host
    settings = Settings(
        host=host,
        port=port,
        database_url=_read(environ, "DATABASE_URL", f"sqlite:///{INSTANCE}/milepost.db", _database),
        callback_keys=_read(environ, "GITHUB_CALLBACK_SECRET", "", _keys),
        secret_key=_read(environ, "SECRET_KEY", "", _secret),
        operator_token=_read(environ, "OPERATOR_TOKEN", "", lambda text: _secret(text, SHORTEST_TOKEN)),
        public_url=_read(environ, "PUBLIC_URL", f"http://{local}:{port}", _public_url),
        dispatch_token=environ.get("DISPATCH_TOKEN", ""),
        dispatch_repository=_read(environ, "DISPATCH_REPOSITORY", "", _repository),
        dispatch_api_url=_read(environ, "DISPATCH_API_URL", "https://api.github.com", _http_url),
        dispatch_workflow=_read(environ, "DISPATCH_WORKFLOW", "provision-agent.yml", _workflow),
        dispatch_ref=environ.get("DISPATCH_REF") or "main",
        webhook_keys=_read(environ, "GITHUB_WEBHOOK_SECRET", "", lambda t: _keys(t) if t else ()),
        notify_urls=_read(environ, "NOTIFY_URLS", "", _addresses),
        notify_on=_read(environ, "NOTIFY_ON", "failed,cancelled,lost", _events),
        pipelines=_read(environ, "PIPELINES", "", _folder),
        operator_contact=environ.get("OPERATOR_CONTACT", "").strip(),
        embed_origins=_read(environ, "EMBED_ORIGINS", "", _origins),
        quiet_after=_read(environ, "QUIET_AFTER", "150", _seconds),
        lost_after=_read(environ, "LOST_AFTER", "900", _seconds),
        callback_max_skew=_read(environ, "CALLBACK_MAX_SKEW", "300", _seconds),
        require_sent_at=_read(environ, "REQUIRE_SENT_AT", "no", _yes_or_no),
        web_concurrency=_read(environ, "WEB_CONCURRENCY", "1", lambda text: _whole(text, 1, 64)),
        trusted_proxies=_read(environ, "TRUSTED_PROXIES", "0", lambda text: _whole(text, 0, 10)),
    )
    if not 0 < settings.quiet_after <= settings.lost_after:
        raise BadSetting("LOST_AFTER must not be less than QUIET_AFTER, and both more than 0")
    if bool(settings.dispatch_token) != bool(settings.dispatch_repository):
        missing = "DISPATCH_REPOSITORY" if settings.dispatch_token else "DISPATCH_TOKEN"
        raise BadSetting(f"{missing} must be set, too: only one of DISPATCH_TOKEN and DISPATCH_REPOSITORY is")
    return settings


def environment() -> Mapping[str, str]:
    """What `load` reads: at the terminal also the secrets that `make run` made, but never for a server."""
    environ = given()
    context = click.get_current_context(silent=True)
    at_terminal = context is not None and context.info_name != "run"
    if not at_terminal:
        return environ
    # `restore` brings the secrets, so it can be run where there are none.
    brought = {name: secrets.token_urlsafe(32) for name in SECRETS if "restore" in sys.argv[1:]}
    return brought | with_local_secrets(environ, make=False)


def given() -> dict[str, str]:
    """What the operator set: `milepost.env`, and the environment over it."""
    return in_file() | dict(os.environ)


def in_file() -> dict[str, str]:
    """What stands in `milepost.env`; raises BadSetting."""
    try:
        text = ENV_FILE.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as error:
        raise BadSetting(f"{ENV_FILE} cannot be read: {error}") from None
    lines = list(parse_stream(StringIO(text)))
    for line in lines:
        if line.error:
            raise BadSetting(f"{ENV_FILE}, line {line.original.line}: must be NAME=value")
    return {line.key: line.value or "" for line in lines if line.key}


def with_local_secrets(environ: Mapping[str, str], *, make: bool) -> dict[str, str]:
    """The environment, its missing secrets taken from `instance/`, and made there once where asked."""
    complete = dict(environ)
    for name in SECRETS:
        if complete.get(name):
            continue
        path = INSTANCE / name.lower()
        if make and not (path.exists() and path.read_text().strip()):
            keep_secret(path, secrets.token_urlsafe(32))
        if path.exists():
            complete[name] = path.read_text().strip()
    return complete


def keep_secret(path: Path, secret: str) -> None:
    """Write aside, then rename: a full disk leaves no empty secret behind."""
    INSTANCE.mkdir(mode=0o700, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


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
    if not re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}", text):
        raise ValueError("must be a number of seconds")
    return float(text)


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9A-Fa-f:.]+", text):
        raise ValueError("must be an address or a host's name")
    return text


def _workflow(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}\.ya?ml|[0-9]{1,20}", text):
        raise ValueError("must be a workflow's file, such as provision-agent.yml, or its number")
    return text


def _secret(text: str, shortest: int = SHORTEST_SECRET) -> str:
    if len(text) < shortest:
        raise ValueError(f"must be set, to at least {shortest} characters")
    return text


def _keys(text: str) -> tuple[bytes, ...]:
    return tuple(_secret(key.strip()).encode() for key in text.split(","))


def _http_url(text: str) -> str:
    if not re.fullmatch(rf"{ORIGIN}(?:/[\w.~%:,+=-]+)*/?", text, re.ASCII):
        raise ValueError("must be an http:// or https:// address, in ASCII")
    if urlsplit(text).port == 0:  # above 65535 it raises ValueError itself
        raise ValueError("must not have the port 0")
    return text.rstrip("/")


def _public_url(text: str) -> str:
    path = urlsplit(_http_url(text)).path
    if "%" in path or ".." in path.split("/"):
        raise ValueError("must have a plain path, without % and ..")
    first = path.split("/")[1:2]
    if first and first[0] in OUR_PATHS:
        raise ValueError(f"must not have a path that begins with /{first[0]}: Milepost's own pages do")
    return _http_url(text)


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(_http_url(origin) for origin in text.replace(",", " ").split())
    for origin in origins:
        if not re.fullmatch(ORIGIN, origin):
            raise ValueError(
                "must be origins such as https://wiki.example: an ASCII host, no path, no wildcard"
            )
    return origins


def _addresses(text: str) -> tuple[str, ...]:
    addresses = tuple(text.split())
    if addresses:
        from webapp.services import read_services  # 60 MB that nobody else needs

        read_services(addresses)
    return addresses


def _events(text: str) -> frozenset[str]:
    events = frozenset(text.replace(",", " ").split())
    if not events or not events <= frozenset(NOTIFIED):
        raise ValueError(f"must be some of {', '.join(NOTIFIED)}")
    return events


def _folder(text: str) -> Path | None:
    if text and not Path(text).is_dir():
        raise ValueError(f"must be a folder: {text}")
    return Path(text) if text else None


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise ValueError("must be yes or no")
    return text.lower() == "yes"


def _repository(text: str) -> str:
    if text and not re.fullmatch(r"(?!\.\.?/)[A-Za-z0-9_.-]{1,100}/(?!\.\.?$)[A-Za-z0-9_.-]{1,100}", text):
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
    if url.drivername == "sqlite":
        try:
            Path(url.database or "").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"is in a folder that cannot be made: {error}") from None
    return url.render_as_string(hide_password=False)
