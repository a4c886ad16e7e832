"""Start a job: registered once however often it is asked for, one unfinished job per agent."""

import re
import secrets
from collections.abc import Mapping
from time import time
from typing import Any

from sqlalchemy import func, select

from . import progress
from .config import Settings
from .models import attempt_from, current_attempts, jobs
from .parts import Parts
from .report import JOB_ID
from .store import Transaction

UNFINISHED = ("queued", "provisioning")
FIELDS = ("agent_id", "region", "job_id", "dispatch")


class BadField(ValueError):
    """A field that breaks its bound; the message begins with its name."""


class Conflict(Exception):
    """What was asked for cannot be while something else is as it is; the message says what to do."""


def read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The job that is asked for, as FIELDS; raises BadField. Null and "" mean absent."""
    for name in fields:
        if name not in FIELDS:
            raise BadField(f"{name}: not one of {', '.join(FIELDS)}")
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    dispatch = given.get("dispatch", True)
    if not isinstance(dispatch, bool):
        raise BadField("dispatch: neither true nor false")
    if "agent_id" not in given:
        raise BadField("agent_id: required")
    names = {name: _name(given, name) for name in FIELDS[:3]}
    return names | {"job_id": names["job_id"] or secrets.token_hex(8), "dispatch": dispatch}


def _name(given: Mapping[str, Any], name: str) -> str | None:
    """All that becomes an input of the workflow has the alphabet of job ids: it is safe in any shell."""
    value = given.get(name)
    if value is not None and not (isinstance(value, str) and re.fullmatch(JOB_ID, value)):
        raise BadField(f"{name}: not 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit")
    return value


def start(parts: Parts, asked: Mapping[str, Any]) -> bool:
    """Register the job that was `read`; whether it is new. Raises Conflict."""
    return parts.writer.run(lambda transaction: _register(transaction, parts.settings, asked))


def _register(transaction: Transaction, settings: Settings, asked: Mapping[str, Any]) -> bool:
    job_id, now = asked["job_id"], time()
    if transaction.current(job_id):
        return False
    if asked["dispatch"] and not settings.can_dispatch:
        raise Conflict("set DISPATCH_TOKEN and DISPATCH_REPOSITORY, or ask with dispatch: false")
    _only_one(transaction, settings, job_id, asked["agent_id"])
    row = {name: asked[name] for name in ("job_id", "agent_id", "region")} | {"created_at": now}
    if not transaction.register([row]):
        return False
    first = progress.Attempt(job_id, 1, now)
    transaction.save([(first, first, first)])
    return True


def _only_one(transaction: Transaction, settings: Settings, job_id: str, agent_id: str) -> None:
    """Raise Conflict where another job of the agent goes on; nobody can start one until we commit."""
    if transaction.connection.dialect.name == "postgresql":
        lock = func.pg_advisory_xact_lock(func.hashtextextended(agent_id, 0))
        transaction.connection.execute(select(lock))
    unfinished = current_attempts().where(
        jobs.c.agent_id == agent_id, jobs.c.status.in_(UNFINISHED), jobs.c.job_id != job_id
    )
    for row in transaction.connection.execute(unfinished):
        attempt = attempt_from(row)
        if progress.condition(attempt, time(), settings.quiet_after, settings.lost_after) != "lost":
            raise Conflict(f"the job {attempt.job_id} of the agent {agent_id} is not over yet")
