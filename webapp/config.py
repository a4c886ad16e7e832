"""The environment becomes settings; nobody else reads it. A bad value names itself and stops the start.

Settings may also stand in `milepost.env` beside `wsgi.py`; the environment wins.
"""

import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import click
from dotenv.parser import parse_stream
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from webapp.rules.pipeline import Pipeline
from webapp.rules.pipeline import load as load_pipelines

ROOT = Path(__file__).resolve().parent.parent
MIGRATIONS = ROOT / "webapp" / "storage" / "migrations"
INSTANCE = ROOT / "instance"
ENV_FILE = ROOT / "milepost.env"
SECRETS = ("GITHUB_CALLBACK_SECRET", "SECRET_KEY", "OPERATOR_TOKEN")
MADE = {name.lower(): INSTANCE / name.lower() for name in SECRETS}  # the files of those that `make run` makes
CALLBACK_PATH = "/api/webhooks/github"
LARGEST_BODY = 65_536  # bytes, of any request but GitHub's deliveries
LARGEST_DELIVERY = 2**20  # those of runs have tens of thousands, a long commit message more
OUR_PATHS = ("api", "events", "healthz", "jobs", "metrics", "p", "sign-in", "sign-out", "static")
NOTIFIED = {"done", "failed", "cancelled", "lost"}
HOST = r"[A-Za-z0-9.-]+|[0-9A-Fa-f:.]+", "an address or a host's name"
ORIGIN = r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
REPOSITORY = r"|(?!\.\.?/)[A-Za-z0-9_.-]{1,100}/(?!\.\.?$)[A-Za-z0-9_.-]{1,100}", "owner/name"
WORKFLOW = r"[A-Za-z0-9._-]{1,100}\.ya?ml|[0-9]{1,20}", "a workflow's file, such as deploy.yml, or its number"

T = TypeVar("T")


class BadSetting(click.ClickException):
    """A setting that is missing or wrong; the message begins with its name."""


def _must(holds: object, be: str) -> None:
    if not holds:
        raise ValueError(f"must {be}")


def _like(pattern: str, what: str, text: str) -> str:
    _must(re.fullmatch(pattern, text, re.ASCII), f"be {what}")
    return text


def _whole(least: int, most: int, text: str) -> int:
    what = f"a whole number from {least} to {most}"
    _must(least <= int(_like("[0-9]{1,9}", what, text)) <= most, f"be {what}")
    return int(text)


def _seconds(text: str) -> float:
    return float(_like(r"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}", "a number of seconds", text))


def _yes(text: str) -> bool:
    return _like("yes|no", "yes or no", text.lower()) == "yes"


def _secret(shortest: int, text: str) -> str:
    _must(len(text) >= shortest, f"be set, to at least {shortest} characters")
    return text


def _keys(text: str) -> tuple[bytes, ...]:
    return tuple(_secret(16, key.strip()).encode() for key in text.split(","))


def _http_url(text: str) -> str:
    _like(rf"{ORIGIN}(?:/[\w.~%:,+=-]+)*/?", "an http:// or https:// address, in ASCII", text)
    _must(urlsplit(text).port != 0, "not have the port 0")  # above 65535 it raises ValueError itself
    return text.rstrip("/")


def _public_url(text: str) -> str:
    if not text:
        return ""  # `load` makes it of HOST and PORT
    url = _http_url(text)
    is_plain = "%" not in url and not {".", ".."} & {*url.split("/")}
    _must(is_plain, "have a plain path, without %, . and ..")
    first = urlsplit(url).path[1:].partition("/")[0]
    _must(first not in OUR_PATHS, f"not have a path that begins with /{first}: Milepost's own pages do")
    return url


def _origins(text: str) -> tuple[str, ...]:
    what = "origins such as https://wiki.example: an ASCII host, no path, no wildcard"
    return tuple(_like(ORIGIN, what, _http_url(origin)) for origin in text.replace(",", " ").split())


def _events(text: str) -> frozenset[str]:
    events = frozenset(text.replace(",", " ").split())
    _must(events and events <= NOTIFIED, f"be some of {', '.join(sorted(NOTIFIED))}")
    return events


def _services(addresses: str) -> tuple[Any, ...]:
    from apprise import Apprise, AppriseAsset  # 60 MB that nobody else needs

    logging.getLogger("apprise").propagate = False  # it quotes addresses, and they hold secrets
    services, asset = [], AppriseAsset(app_id="Milepost")
    for place, address in enumerate(addresses.split(), 1):
        services.append(Apprise.instantiate(address, asset=asset))
        _must(services[-1], f"be Apprise addresses such as mailto://…: number {place} is none")
    return tuple(services)


def _pipelines(text: str) -> Mapping[str, Pipeline]:
    return load_pipelines(Path(text) if text else None)


def _database(text: str) -> str:
    url = make_url(text)
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    is_file = url.drivername == "sqlite" and url.database not in (None, "", ":memory:")
    _must(is_file or url.drivername == "postgresql+psycopg", "be sqlite:///FILE or postgresql://…")
    if is_file:
        path = Path(url.database or "")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _must(path.is_file() or not path.exists(), f"name a file: {path} is none")
    return url.render_as_string(hide_password=False)


def _setting(name: str, default: str | T, read: Callable[..., T], *given: object) -> T:
    """A row of the table below; a default that is text is read like the environment's."""
    return cast("T", (name, default, partial(read, *given)))


class Settings(NamedTuple):
    """What the operator chose; durations in seconds. Each line: name, default, how it is read."""

    host: str = _setting("HOST", "127.0.0.1", _like, *HOST)
    port: int = _setting("PORT", 8000, _whole, 1, 65535)
    database_url: str = _setting("DATABASE_URL", f"sqlite:///{INSTANCE}/milepost.db", _database)
    callback_keys: tuple[bytes, ...] = _setting("GITHUB_CALLBACK_SECRET", "", _keys)
    secret_key: str = _setting("SECRET_KEY", "", _secret, 16)
    operator_token: str = _setting("OPERATOR_TOKEN", "", _secret, 24)
    public_url: str = _setting("PUBLIC_URL", "", _public_url)
    pipelines: Mapping[str, Pipeline] = _setting("PIPELINES", "", _pipelines)
    dispatch_token: str = _setting("DISPATCH_TOKEN", "", _like, "[ -~]*", "in ASCII")
    dispatch_repository: str = _setting("DISPATCH_REPOSITORY", "", _like, *REPOSITORY)
    dispatch_api_url: str = _setting("DISPATCH_API_URL", "https://api.github.com", _http_url)
    dispatch_workflow: str = _setting("DISPATCH_WORKFLOW", "provision-agent.yml", _like, *WORKFLOW)
    dispatch_ref: str = _setting("DISPATCH_REF", "main", str)
    webhook_keys: tuple[bytes, ...] = _setting("GITHUB_WEBHOOK_SECRET", (), _keys)
    services: tuple[Any, ...] = _setting("NOTIFY_URLS", (), _services)
    told: frozenset[str] = _setting("NOTIFY_ON", "failed,cancelled,lost", _events)
    embed_origins: tuple[str, ...] = _setting("EMBED_ORIGINS", (), _origins)
    operator_contact: str = _setting("OPERATOR_CONTACT", "", str)
    quiet_after: float = _setting("QUIET_AFTER", 150.0, _seconds)
    lost_after: float = _setting("LOST_AFTER", 900.0, _seconds)
    callback_max_skew: float = _setting("CALLBACK_MAX_SKEW", 300.0, _seconds)
    require_sent_at: bool = _setting("REQUIRE_SENT_AT", False, _yes)
    web_concurrency: int = _setting("WEB_CONCURRENCY", 1, _whole, 1, 64)
    trusted_proxies: int = _setting("TRUSTED_PROXIES", 0, _whole, 0, 10)

    @property
    def address(self) -> str:
        """Where it listens, as URLs and gunicorn have it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def can_dispatch(self) -> bool:
        """Whether GitHub may be asked to run a job."""
        return bool(self.dispatch_token and self.dispatch_repository)


TABLE = cast("dict[str, tuple[str, Any, Callable[[str], Any]]]", Settings._field_defaults)
NAMES = frozenset(name for name, _, _ in TABLE.values())


def load(environ: Mapping[str, str]) -> Settings:
    """Settings from an environment; raises BadSetting."""
    values = {}
    for field, (name, default, read) in TABLE.items():
        text = environ.get(name, "")
        try:
            _must(text.isprintable(), "be printable text in UTF-8")  # bytes that are no UTF-8 are not
            chosen = text.strip() or default
            values[field] = read(chosen) if isinstance(chosen, str) else chosen
        except (ValueError, OSError, ArgumentError) as error:
            raise BadSetting(f"{name} {error}") from None
    settings = Settings(**values)
    if not 0 < settings.quiet_after <= settings.lost_after:
        raise BadSetting("LOST_AFTER must not be less than QUIET_AFTER, and both more than 0")
    if bool(settings.dispatch_token) != bool(settings.dispatch_repository):
        missing = "DISPATCH_REPOSITORY" if settings.dispatch_token else "DISPATCH_TOKEN"
        raise BadSetting(f"{missing} must be set, too: only one of DISPATCH_TOKEN and DISPATCH_REPOSITORY is")
    return settings._replace(
        public_url=settings.public_url or f"http://{settings.address}",
        told=settings.told if settings.services else frozenset(),
    )


def environment() -> Mapping[str, str]:
    """What `load` reads: at the terminal also the secrets that `make run` made, but never for a server."""
    environ, context = given(), click.get_current_context(silent=True)
    if context and context.info_name != "run":
        # `restore` brings the secrets, so it can be run where there are none.
        stand_in = secrets.token_urlsafe(32) if "restore" in sys.argv[1:] else ""
        environ |= {name: environ.get(name) or made_secret(name) or stand_in for name in SECRETS}
    return environ


def given() -> dict[str, str]:
    """What the operator set: `milepost.env`, and the environment over it."""
    return in_file() | dict(os.environ)


def in_file() -> dict[str, str]:
    """What stands in `milepost.env`; raises BadSetting."""
    try:
        lines = list(parse_stream(StringIO(ENV_FILE.read_text() if ENV_FILE.exists() else "")))
    except (OSError, UnicodeError) as error:
        raise BadSetting(f"{ENV_FILE} cannot be read: {error}") from None
    if bad := [line.original.line for line in lines if line.error]:
        raise BadSetting(f"{ENV_FILE}, line {bad[0]}: must be NAME=value")
    return {line.key: line.value or "" for line in lines if line.key}


def made_secret(name: str) -> str:
    """The secret that `make run` made and keeps in `instance/`; "" where it made none."""
    file = MADE[name.lower()]
    return file.read_text().strip() if file.exists() else ""


def keep_secret(name: str, secret: str) -> str:
    """Write aside (mode 0600), then rename: a full disk leaves no empty secret behind."""
    INSTANCE.mkdir(mode=0o700, exist_ok=True)
    with NamedTemporaryFile("w", dir=INSTANCE, delete=False) as aside:
        aside.write(secret)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).replace(MADE[name.lower()])
    return secret
