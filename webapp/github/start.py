"""Start a job: registered once however often it is asked for, one unfinished job per agent."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from time import time
from typing import Any

from sqlalchemy import func, select

from webapp import logs
from webapp.config import Settings
from webapp.github.client import BOUND, Refused, dispatch, find_run
from webapp.parts import Parts
from webapp.rules import progress
from webapp.rules.report import JOB_ID
from webapp.storage.tables import attempt_from, attempts_of, current_attempts, jobs
from webapp.storage.writer import Transaction

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
    names = {name: name_of(given, name) for name in FIELDS[:3]}
    return names | {"job_id": names["job_id"] or secrets.token_hex(8), "dispatch": dispatch}


def name_of(given: Mapping[str, Any], name: str) -> str | None:
    """All that becomes an input of the workflow has the alphabet of job ids: it is safe in any shell."""
    value = given.get(name) or None
    if value is not None and not (isinstance(value, str) and JOB_ID.fullmatch(value)):
        raise BadField(f"{name}: not 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit")
    return value


@dataclass(frozen=True)
class Due:
    """A dispatch that has to be made; `since` is when one of unknown outcome may have been made."""

    job_id: str
    number: int
    inputs: dict[str, str]
    since: float | None
    known_runs: set[str]


def start(parts: Parts, asked: Mapping[str, Any]) -> bool:
    """Register the job that was `read` and dispatch it once; whether it is new. Raises Conflict, Refused."""
    is_new, due = parts.writer.run(lambda transaction: _register(transaction, parts.settings, asked))
    logs.event("start", job=asked["job_id"], new=is_new, dispatched=bool(due))
    if due:
        _dispatch(parts, due)
    return is_new


def retry(parts: Parts, job_id: str) -> None:
    """Open a new attempt of a job that failed or is lost, and dispatch it.

    Raises LookupError, Conflict, Refused.
    """
    due = parts.writer.run(lambda transaction: _reopen(transaction, parts.settings, job_id))
    logs.event("retry", job=job_id, attempt=due.number)
    _dispatch(parts, due)


def _register(
    transaction: Transaction, settings: Settings, asked: Mapping[str, Any]
) -> tuple[bool, Due | None]:
    job_id, now = asked["job_id"], time()
    if current := transaction.current(job_id):
        return False, _resume(transaction, settings, current, now)
    if asked["dispatch"]:
        _can_dispatch(settings)
    _only_one(transaction, settings, job_id, asked["agent_id"])
    row = {name: asked[name] for name in ("job_id", "agent_id", "region")} | {"created_at": now}
    if not transaction.register([row]):  # another process has, meanwhile
        return False, None
    first = progress.Attempt(job_id, 1, now, asked_at=now if asked["dispatch"] else None)
    transaction.save([(first, first, first)])
    return True, _due(transaction, settings, first, None) if asked["dispatch"] else None


def _resume(
    transaction: Transaction, settings: Settings, current: progress.Attempt, now: float
) -> Due | None:
    """Claim the dispatch of a process that died before it stored the outcome."""
    unknown = not current.end and current.heard_at is None and current.run is None
    if not unknown or current.asked_at is None or now - current.asked_at < BOUND:
        return None
    transaction.save([(current, current, current._replace(asked_at=now))])
    return _due(transaction, settings, current, current.opened_at)


def _reopen(transaction: Transaction, settings: Settings, job_id: str) -> Due:
    now, current = time(), transaction.current(job_id)
    if current is None:
        raise LookupError(job_id)
    condition = progress.condition(current, now, settings.quiet_after, settings.lost_after)
    if current.status != "failed" and condition != "lost":
        raise Conflict(f"the job {job_id} is {current.status}: only a failed or lost one can be retried")
    _can_dispatch(settings)
    after = progress.Attempt(job_id, current.number + 1, now, asked_at=now)
    due = _due(transaction, settings, after, current.opened_at if current.end == "refused" else None)
    _only_one(transaction, settings, job_id, due.inputs["agent_id"])
    transaction.save([(current, after, after)])
    return due


def _can_dispatch(settings: Settings) -> None:
    if not settings.can_dispatch:
        raise Conflict("set DISPATCH_TOKEN and DISPATCH_REPOSITORY, or ask with dispatch: false")


def _due(transaction: Transaction, settings: Settings, attempt: progress.Attempt, since: float | None) -> Due:
    job = transaction.connection.execute(select(jobs).where(jobs.c.job_id == attempt.job_id)).one()
    if job.agent_id is None:
        raise Conflict(f"callbacks registered the job {job.job_id}: nobody said which agent it is for")
    inputs = {
        "job_id": job.job_id,
        "agent_id": job.agent_id,
        "region": job.region or "",
        "callback_url": settings.callback_url,
    }
    known = {each.run_id for each in attempts_of(transaction.connection, job.job_id) if each.run_id}
    return Due(job.job_id, attempt.number, inputs, since, known)


def _dispatch(parts: Parts, due: Due) -> None:
    """Ask GitHub, outside of any transaction, and store what it said; raises Refused."""
    settings, run, refusal = parts.settings, {}, None
    try:
        if due.since:
            run = find_run(settings, due.job_id, due.since, due.known_runs)
        run = run or dispatch(settings, due.inputs)
    except Refused as refused:
        refusal = refused
    is_refused = parts.writer.run(
        lambda transaction: conclude(transaction, due.job_id, due.number, run, refusal)
    )
    if refusal and is_refused:
        logs.event("dispatch refused", job=due.job_id, cause=str(refusal))
        raise refusal


def conclude(
    transaction: Transaction, job_id: str, number: int, run: Mapping[str, Any], refusal: Exception | None
) -> bool:
    """Store a dispatch's outcome; whether the attempt failed by it: not one that was heard of meanwhile."""
    current = transaction.current(job_id)
    if current is None or current.number != number or (refusal and (current.heard_at or current.end)):
        return False
    if refusal:
        after = current._replace(end="refused", ended_at=time(), error=str(refusal))
    else:
        after = current._replace(taken_at=time(), run_url=run.get("html_url"))
        if not current.run and (run_id := run.get("workflow_run_id") or run.get("id")):
            after = after._replace(run_id=str(run_id), run_attempt=str(run.get("run_attempt", 1)))
    transaction.save([(current, current, after)])
    return after.end == "refused"


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
