"""`flask check`: what is wrong with an installation, and what is unwise; no secret is told."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from webapp.config import ENV_FILE, INSTANCE, NAMES, ROOT, Settings, given, in_file
from webapp.github.client import Refused, get_workflow
from webapp.github.start import workflow_of
from webapp.rules.pipeline import Pipeline
from webapp.storage.database import reason

FEWEST_CHARACTERS = 8  # different ones; a random secret has twice as many
TRIVIAL = re.compile("change.?me|passwor[dt]|12345678|qwert", re.I)
MIGRATIONS = ROOT / "webapp" / "storage" / "migrations"


def wrong(settings: Settings, pipelines: Mapping[str, Pipeline], engine: Engine) -> Iterator[str]:
    """One sentence for each thing that keeps something from working."""
    for name in in_file():
        if name not in NAMES:
            yield f"{name} in {ENV_FILE.name} is not a setting{_meant(name)}"
    yield from (said for said in weak_secrets(settings) if said.startswith("OPERATOR_TOKEN"))
    yield from _database(engine)
    if settings.can_dispatch:
        for workflow in sorted({workflow_of(pipeline, settings) for pipeline in pipelines.values()}):
            try:
                if (state := get_workflow(settings, workflow).get("state")) != "active":
                    yield f"{workflow} cannot be started: at GitHub it is {state}"
            except Refused as refused:
                yield str(refused)
    for path in _secret_files(settings):
        if _others_may(path.parent) and _others_may(path):
            yield f"others on this machine may read {path}: chmod go= {path}"


def unwise(settings: Settings) -> Iterator[str]:
    """One sentence for each thing that works and should still be otherwise."""
    for name in given():
        if name not in NAMES and name not in in_file() and _meant(name):
            yield f"{name} in the environment is not a setting{_meant(name)}"
    yield from (said for said in weak_secrets(settings) if not said.startswith("OPERATOR_TOKEN"))
    is_https, is_local = settings.public_url.startswith("https:"), settings.host in ("127.0.0.1", "::1")
    if not is_https and not (is_local and f":{settings.port}" in settings.public_url):
        yield "PUBLIC_URL is not https: links and the session can be read on the way"
    if is_https and not settings.trusted_proxies:
        yield "TRUSTED_PROXIES is 0 though PUBLIC_URL is https: every client has the proxy's address"
    if not settings.require_sent_at:
        yield "REQUIRE_SENT_AT is no: a callback without sent_at can be sent again by whoever saw it"
    if not settings.callback_max_skew:
        yield "CALLBACK_MAX_SKEW is 0: an old callback can be sent again by whoever saw it"
    if settings.can_dispatch and not settings.webhook_keys:
        yield "GITHUB_WEBHOOK_SECRET is not set: GitHub is asked only after a job fell silent"
    if not settings.operator_contact:
        yield "OPERATOR_CONTACT is not set: when a job fails, nobody is named whom to ask"


def weak_secrets(settings: Settings) -> list[str]:
    """What is unwise about the secrets, one sentence each; it tells their names alone."""
    named = [
        ("SECRET_KEY", settings.secret_key.encode()),
        ("OPERATOR_TOKEN", settings.operator_token.encode()),
        *(("GITHUB_CALLBACK_SECRET", key) for key in settings.callback_keys),
        *(("GITHUB_WEBHOOK_SECRET", key) for key in settings.webhook_keys),
    ]
    said, seen = [], dict[bytes, str]()
    for name, secret in named:
        if other := seen.get(secret):
            said.append(f"{name} has the value of {other}: give each a value of its own")
        seen[secret] = name
        is_repeated = secret in (secret + secret)[1:-1]
        if len(set(secret)) < FEWEST_CHARACTERS or is_repeated or TRIVIAL.search(secret.decode()):
            said.append(f"{name} is easy to guess: make a random one, as with openssl rand -hex 32")
    return said


def _meant(name: str) -> str:
    close = get_close_matches(name, NAMES, 1, 0.85)
    return f": is {close[0]} meant?" if close else ""


def _database(engine: Engine) -> Iterator[str]:
    ours = ScriptDirectory(str(MIGRATIONS))
    try:
        with engine.connect() as connection:
            has = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        yield f"DATABASE_URL cannot be used: {reason(error)}"
    else:
        if has is None:
            yield "the database has no tables: flask db upgrade makes them"
        elif has not in {script.revision for script in ours.walk_revisions()}:
            yield f"the database's schema {has} is of a newer Milepost than this one"
        elif has != (head := ours.get_current_head()):
            yield f"the database's schema is {has}, this Milepost needs {head}: flask db upgrade"


def _secret_files(settings: Settings) -> set[Path]:
    url = make_url(settings.database_url)
    database = [Path(url.database or "").resolve()] if url.get_backend_name() == "sqlite" else []
    return {path for path in (ENV_FILE, *INSTANCE.glob("*"), *database) if path.is_file()}


def _others_may(path: Path) -> bool:
    """Whether other users may read a file or enter a folder."""
    return bool(path.stat().st_mode & (0o077 if path.is_file() else 0o011))
