"""`flask check`: what is wrong with an installation, and what is unwise; no secret is told."""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from webapp.config import ENV_FILE, INSTANCE, MIGRATIONS, NAMES, Settings, given, in_file
from webapp.github.client import Refused, ask, workflow_of
from webapp.storage.database import reason

FEWEST_CHARACTERS = 8  # different ones; a random secret has twice as many
TRIVIAL = re.compile("change.?me|passwor[dt]|12345678|qwert", re.I)


def wrong(settings: Settings, engine: Engine) -> Iterator[str]:
    """One sentence for each thing that keeps something from working."""
    for name in sorted(in_file().keys() - NAMES):
        yield f"{name} in {ENV_FILE.name} is not a setting{_meant(name)}"
    yield from (said for said in weak_secrets(settings) if said.startswith("OPERATOR_TOKEN"))
    yield from _schema(engine)
    if settings.can_dispatch:
        for workflow in sorted({workflow_of(pipeline, settings) for pipeline in settings.pipelines.values()}):
            try:
                if (state := ask(settings, workflow, f"workflows/{workflow}").get("state")) != "active":
                    yield f"{workflow} cannot be started: at GitHub it is {state}"
            except Refused as refused:
                yield str(refused)
    for path in (ENV_FILE, *INSTANCE.glob("*")):
        if path.is_file() and path.stat().st_mode & 0o077 and path.parent.stat().st_mode & 0o011:
            yield f"others on this machine may read {path}: chmod go= {path}"


def unwise(settings: Settings) -> Iterator[str]:
    """One sentence for each thing that works and should still be otherwise."""
    for name in sorted(given().keys() - in_file().keys() - NAMES):
        if meant := _meant(name):
            yield f"{name} in the environment is not a setting{meant}"
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
    named = [("SECRET_KEY", settings.secret_key), ("OPERATOR_TOKEN", settings.operator_token)]
    named += [("GITHUB_CALLBACK_SECRET", key.decode()) for key in settings.callback_keys]
    named += [("GITHUB_WEBHOOK_SECRET", key.decode()) for key in settings.webhook_keys]
    said, seen = [], dict[str, str]()
    for name, secret in named:
        if other := seen.get(secret):
            said.append(f"{name} has the value of {other}: give each a value of its own")
        seen[secret] = name
        is_repeated = secret in (secret + secret)[1:-1]
        if len(set(secret)) < FEWEST_CHARACTERS or is_repeated or TRIVIAL.search(secret):
            said.append(f"{name} is easy to guess: make a random one, as with openssl rand -hex 32")
    return said


def _meant(name: str) -> str:
    close = get_close_matches(name, NAMES, 1, 0.85)
    return f": is {close[0]} meant?" if close else ""


def _schema(engine: Engine) -> Iterator[str]:
    known = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]
    try:
        with engine.connect() as connection:
            has = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        yield f"DATABASE_URL cannot be used: {reason(error)}"
        return
    if has is None:
        yield "the database has no tables: flask db upgrade makes them"
    elif has not in known:
        yield f"the database's schema {has} is of a newer Milepost than this one"
    elif has != known[0]:
        yield f"the database's schema is {has}, this Milepost needs {known[0]}: flask db upgrade"
