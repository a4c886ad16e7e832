"""Start, retry, close and delete jobs: once however often it is asked for, one unfinished job per agent."""

from dataclasses import dataclass
from time import time
from typing import Any

from webapp import logs
from webapp.config import Settings
from webapp.github.client import BOUND, Refused, dispatch, find_run
from webapp.rules import progress, silence
from webapp.rules.attempt import Attempt
from webapp.rules.pipeline import BUILT_IN, Pipeline
from webapp.rules.report import Start
from webapp.rules.silence import Clock
from webapp.storage.jobs import attempts_of, clock_now
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer


class Conflict(Exception):
    """What was asked for cannot be while something else is as it is; the message says what to do."""


@dataclass(frozen=True)
class Due:
    """A dispatch that has to be made; `since` is when one of unknown outcome may have been made."""

    job_id: str
    number: int
    workflow: str
    inputs: dict[str, str]
    since: float | None
    known_runs: set[str]


def workflow_of(pipeline: Pipeline, settings: Settings) -> str:
    """The workflow that a dispatch of this pipeline runs."""
    return pipeline.workflow or (
        settings.dispatch_workflow if pipeline.name == BUILT_IN else f"{pipeline.name}.yml"
    )


def start(writer: Writer, settings: Settings, asked: Start) -> bool:
    """Register the job and dispatch it once; whether it is new. Raises Conflict, Refused."""
    is_new, due = writer.run(lambda transaction: _register(transaction, settings, asked))
    logs.event("start", job=asked.job_id, new=is_new, dispatched=bool(due))
    if due:
        _dispatch(writer, settings, due)
    return is_new


def retry(writer: Writer, settings: Settings, job_id: str) -> None:
    """Open a new attempt of a job that failed or is lost, and dispatch it.

    Raises LookupError, Conflict, Refused.
    """
    due = writer.run(lambda transaction: _reopen(transaction, settings, job_id))
    logs.event("retry", job=job_id, attempt=due.number)
    _dispatch(writer, settings, due)


def close(writer: Writer, settings: Settings, job_id: str) -> None:
    """End a job that is lost, waiting or never started as cancelled; its run goes on, if there is one.

    Raises LookupError, Conflict.
    """

    def change(transaction: Transaction) -> None:
        current = _found(transaction, job_id)
        condition = silence.condition(current, _clock(transaction, settings))
        if not may_close(current, condition):
            raise Conflict(
                f"the job {job_id} is {condition}: only one that is lost, waiting or never started"
            )
        transaction.save([(current, progress.close(current, time()))])

    writer.run(change)
    logs.event("closed", job=job_id)


def may_close(attempt: Attempt, condition: str) -> bool:
    """Whether nothing goes on: it is lost, it waits, or it never started."""
    never_started = condition != "over" and attempt.last_signal_at is None
    return never_started or condition in ("lost", "waiting")


def delete(writer: Writer, settings: Settings, job_id: str) -> None:
    """Remove a job that is over, with all that is known of it. Raises LookupError, Conflict."""

    def change(transaction: Transaction) -> None:
        current = _found(transaction, job_id)
        if silence.condition(current, _clock(transaction, settings)) != "over":
            raise Conflict(f"the job {job_id} is not over: close it first")
        transaction.remove([job_id], deleted_at=time())

    writer.run(change)
    logs.event("deleted", job=job_id)


def _found(transaction: Transaction, job_id: str) -> Attempt:
    current = transaction.current(job_id)
    if current is None:
        raise LookupError(job_id)
    return current


def _clock(transaction: Transaction, settings: Settings) -> Clock:
    return clock_now(transaction.connection, settings)


def _register(transaction: Transaction, settings: Settings, asked: Start) -> tuple[bool, Due | None]:
    now = time()
    if current := transaction.current(asked.job_id):
        return False, _resume(transaction, settings, current, now)
    if asked.dispatch:
        _can_dispatch(settings)
    _only_one(transaction, settings, asked.job_id, asked.agent_id)
    row = {name: getattr(asked, name) for name in ("job_id", "agent_id", "region", "pipeline")}
    if not transaction.register([row | {"created_at": now}]):  # another process has, meanwhile
        return False, None
    first = Attempt(asked.job_id, 1, now, asked.pipeline)
    if asked.dispatch:
        first = first._replace(asked_at=now, repository=settings.dispatch_repository)
    transaction.save([(first, first)])
    return True, _due(transaction, settings, first, None) if asked.dispatch else None


def _resume(transaction: Transaction, settings: Settings, current: Attempt, now: float) -> Due | None:
    """Claim the dispatch of a process that died before it stored the outcome."""
    unknown = not current.end and current.heard_at is None and current.run is None
    if not unknown or current.asked_at is None or now - current.asked_at < BOUND:
        return None
    transaction.save([(current, current._replace(asked_at=now))])
    return _due(transaction, settings, current, current.opened_at)


def _reopen(transaction: Transaction, settings: Settings, job_id: str) -> Due:
    now, current = time(), _found(transaction, job_id)
    condition = silence.condition(current, _clock(transaction, settings))
    if current.status != "failed" and condition != "lost":
        raise Conflict(f"the job {job_id} is {current.status}: only a failed or lost one can be retried")
    _can_dispatch(settings)
    after = Attempt(
        job_id,
        current.number + 1,
        now,
        current.pipeline,
        subject=current.subject,
        repository=settings.dispatch_repository,
        asked_at=now,
    )
    due = _due(transaction, settings, after, current.opened_at if current.end == "refused" else None)
    if agent_id := due.inputs.get("agent_id"):
        _only_one(transaction, settings, job_id, agent_id)
    transaction.save([(after, after)])
    return due


def _can_dispatch(settings: Settings) -> None:
    if not settings.can_dispatch:
        raise Conflict("set DISPATCH_TOKEN and DISPATCH_REPOSITORY, or ask with dispatch: false")


def _due(transaction: Transaction, settings: Settings, attempt: Attempt, since: float | None) -> Due:
    job = transaction.job(attempt.job_id)
    pipeline = transaction.pipeline_of(attempt)
    if job.agent_id is None and "agent_id" in pipeline.inputs:
        raise Conflict(f"callbacks registered the job {job.job_id}: nobody said which agent it is for")
    inputs = {
        "job_id": job.job_id,
        "agent_id": job.agent_id or "",
        "region": job.region or "",
        "callback_url": settings.callback_url,
    }
    inputs = {name: inputs[name] for name in pipeline.inputs}
    known = {each.run_id for each in attempts_of(transaction.connection, job.job_id) if each.run_id}
    return Due(job.job_id, attempt.number, workflow_of(pipeline, settings), inputs, since, known)


def _dispatch(writer: Writer, settings: Settings, due: Due) -> None:
    """Ask GitHub, outside of any transaction, and store what it said; raises Refused."""
    run: dict[str, Any] = {}
    refusal: Refused | None = None
    try:
        if due.since:
            run = find_run(settings, due.workflow, due.job_id, due.since, due.known_runs)
        run = run or dispatch(settings, due.workflow, due.inputs)
    except Refused as refused:
        refusal = refused
    except Exception as error:  # every outcome is concluded, or the job would wait for ever
        logs.log.exception("dispatch failed")
        refusal = Refused(f"Milepost itself failed to ask GitHub ({type(error).__name__}); its log says why")
    is_refused = writer.run(lambda transaction: conclude(transaction, due.job_id, due.number, run, refusal))
    if refusal and is_refused:
        logs.event("dispatch refused", job=due.job_id, cause=str(refusal))
        raise refusal


def conclude(
    transaction: Transaction, job_id: str, number: int, run: dict[str, Any], refusal: Exception | None
) -> bool:
    """Store a dispatch's outcome; whether the attempt failed by it: not one that was heard of meanwhile."""
    current = transaction.current(job_id)
    if current is None or current.number != number or (refusal and (current.heard_at or current.end)):
        return False
    if refusal:
        after = current._replace(end="refused", ended_at=time(), error=str(refusal))
    else:
        now, url = time(), run.get("html_url")
        after = current._replace(taken_at=now, heard_at=now if current.heard_at is None else current.heard_at)
        if isinstance(url, str) and url.startswith("https://"):
            after = after._replace(run_url=url[:2000])
        run_id = run.get("workflow_run_id") or run.get("id")
        if not current.run and isinstance(run_id, int):
            run_attempt = run.get("run_attempt")
            named = str(run_attempt) if isinstance(run_attempt, int) and run_attempt > 0 else "1"
            after = after._replace(run_id=str(run_id), run_attempt=named)
    transaction.save([(current, after)])
    return after.end == "refused"


def _only_one(transaction: Transaction, settings: Settings, job_id: str, agent_id: str) -> None:
    """Raise Conflict where another job of the agent goes on; nobody can start one until we commit."""
    unfinished = transaction.unfinished_of_agent(agent_id, job_id)
    clock = _clock(transaction, settings)
    for attempt in unfinished:
        if silence.condition(attempt, clock) != "lost":
            raise Conflict(f"the job {attempt.job_id} of the agent {agent_id} is not over yet")
