"""The operator's verbs: start (once, however often it is asked for), retry, close, delete and revoke."""

from collections.abc import Callable
from time import time
from typing import Any

from werkzeug.exceptions import Conflict, NotFound, ServiceUnavailable

from webapp import logs
from webapp.config import CALLBACK_PATH
from webapp.github.client import BOUND, Refused, dispatch, find_run, workflow_of
from webapp.github.runs import conclude
from webapp.rules import progress
from webapp.rules.attempt import Attempt
from webapp.rules.report import Start
from webapp.storage.jobs import attempts_of, clock_now
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

Due = tuple[Attempt, Callable[[], dict[str, Any]]]  # an attempt, and what asks GitHub for its run


def start(writer: Writer, asked: Start) -> bool:
    """Register the job and dispatch it once; whether it is new. Raises Conflict, Refused."""
    is_new, due = writer.run(lambda transaction: _register(transaction, asked))
    logs.event("start", job=asked.job_id, new=is_new, dispatched=bool(due))
    if due:
        _dispatch(writer, due)
    return is_new


def act(writer: Writer, verb: str, job_id: str) -> None:
    """Do one of VERBS to a job. Raises NotFound, Conflict, Refused."""
    event, change = VERBS[verb]

    def changed(transaction: Transaction) -> Due | None:
        current = transaction.current(job_id)
        if current is None:
            raise NotFound
        return change(transaction, current, _condition(transaction, current))

    due = writer.run(changed)
    logs.event(event, job=job_id, **({"attempt": due[0].number} if due else {}))
    if due:
        _dispatch(writer, due)


def _condition(transaction: Transaction, attempt: Attempt) -> str:
    return attempt.condition(clock_now(transaction.connection, transaction.settings))


def _retry(transaction: Transaction, current: Attempt, condition: str) -> Due:
    """Open a new attempt of a job that failed or is lost, to be dispatched."""
    job_id, now, settings = current.job_id, time(), transaction.settings
    if current.status != "failed" and condition != "lost":
        raise Conflict(f"the job {job_id} is {current.status}: only a failed or lost one can be retried")
    after = Attempt(job_id, current.number + 1, now, current.pipeline, subject=current.subject)
    after = after._replace(repository=settings.dispatch_repository, asked_at=now)
    due = _due(transaction, after, current.opened_at if current.end == "refused" else None)
    if agent_id := transaction.job(job_id).agent_id:
        _only_one(transaction, job_id, agent_id)
    transaction.save([(after, after)])
    return due


def _close(transaction: Transaction, current: Attempt, condition: str) -> None:
    """End a job as cancelled; its run goes on, if there is one."""
    if not may_close(current, condition):
        raise Conflict(
            f"the job {current.job_id} is {condition}: only one that is lost, waiting or never started"
        )
    transaction.save([(current, progress.close(current, time()))])


def may_close(attempt: Attempt, condition: str) -> bool:
    """Whether nothing goes on: it is lost, it waits, or it never started."""
    never_started = condition != "over" and attempt.last_signal_at is None
    return never_started or condition in ("lost", "waiting")


def _delete(transaction: Transaction, current: Attempt, condition: str) -> None:
    """Remove a job with all that is known of it."""
    if condition != "over":
        raise Conflict(f"the job {current.job_id} is not over: close it first")
    transaction.remove([current.job_id], deleted_at=time())


VERBS: dict[str, tuple[str, Callable[[Transaction, Attempt, str], Due | None]]] = {  # and the log's words
    "retry": ("retry", _retry),
    "close": ("closed", _close),
    "delete": ("deleted", _delete),
    "revoke": ("link revoked", lambda transaction, current, _: transaction.revoke(current)),
}


def _register(transaction: Transaction, asked: Start) -> tuple[bool, Due | None]:
    now = time()
    if current := transaction.current(asked.job_id):
        return False, _resume(transaction, current, now)
    _only_one(transaction, asked.job_id, asked.agent_id)
    row = {name: getattr(asked, name) for name in ("job_id", "agent_id", "region", "pipeline")}
    if not transaction.register([row | {"created_at": now}]):  # another process has, meanwhile
        return False, None
    first = Attempt(asked.job_id, 1, now, asked.pipeline)
    if asked.dispatch:
        first = first._replace(asked_at=now, repository=transaction.settings.dispatch_repository)
    transaction.save([(first, first)])
    return True, _due(transaction, first, None) if asked.dispatch else None


def _resume(transaction: Transaction, current: Attempt, now: float) -> Due | None:
    """Claim the dispatch of a process that died before it stored the outcome."""
    unknown = not current.end and current.heard_at is None and current.run is None
    if not unknown or current.asked_at is None or now - current.asked_at < BOUND:
        return None
    transaction.save([(current, current._replace(asked_at=now))])
    return _due(transaction, current, current.opened_at)


def _due(transaction: Transaction, attempt: Attempt, since: float | None) -> Due:
    """What has to be dispatched; it may have been done `since` then. Raises Conflict where it cannot be."""
    settings, job = transaction.settings, transaction.job(attempt.job_id)
    pipeline = transaction.pipeline_of(attempt)
    if not settings.can_dispatch:
        raise Conflict("set DISPATCH_TOKEN and DISPATCH_REPOSITORY, or ask with dispatch: false")
    if job.agent_id is None and "agent_id" in pipeline.inputs:
        raise Conflict(f"callbacks registered the job {job.job_id}: nobody said which agent it is for")
    inputs = {"job_id": job.job_id, "agent_id": job.agent_id or "", "region": job.region or ""}
    inputs["callback_url"] = settings.public_url + CALLBACK_PATH
    known = {each.run_id for each in attempts_of(transaction.connection, job.job_id) if each.run_id}
    workflow = workflow_of(pipeline, settings)

    def ask() -> dict[str, Any]:
        found = find_run(settings, workflow, job.job_id, since, known) if since else {}
        return found or dispatch(settings, workflow, {name: inputs[name] for name in pipeline.inputs})

    return attempt, ask


def _only_one(transaction: Transaction, job_id: str, agent_id: str) -> None:
    """Raise Conflict where another job of the agent goes on; nobody can start one until we commit."""
    for attempt in transaction.unfinished_of_agent(agent_id, job_id):
        if _condition(transaction, attempt) != "lost":
            raise Conflict(f"the job {attempt.job_id} of the agent {agent_id} is not over yet")


def _dispatch(writer: Writer, due: Due) -> None:
    """Ask GitHub, outside of any transaction, and store what it said. Raises Refused."""
    attempt, ask = due
    run: dict[str, Any] = {}
    refusal: Refused | None = None
    try:
        run = ask()
    except Refused as refused:
        refusal = refused
    except ServiceUnavailable:
        raise  # the server stops: what became of it is asked for later, as after a crash
    except Exception as error:  # every outcome is concluded, or the job would wait for ever
        logs.log.exception("dispatch failed")
        refusal = Refused(f"Milepost itself failed to ask GitHub ({type(error).__name__}); its log says why")
    is_refused = writer.run(lambda transaction: conclude(transaction, attempt, run, refusal))
    if refusal and is_refused:
        logs.event("dispatch refused", job=attempt.job_id, cause=str(refusal))
        raise refusal
