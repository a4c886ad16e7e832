"""What GitHub says of runs, taken for their jobs: told by its webhooks, or asked for.

https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_run
"""

from collections.abc import Mapping
from datetime import datetime
from time import time
from typing import Any

import gevent

from webapp import logs
from webapp.github.client import BOUND, Refused, ask, find_run, words, workflow_of
from webapp.rules import progress
from webapp.rules.attempt import WAITS_FOR, Attempt, Run, Word
from webapp.rules.report import RUN_ATTEMPT, WHOLE, BadField, Rule, checked, matching
from webapp.storage.jobs import attempts_of, jobs_of_run
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

MOST_OFTEN = 15.0  # seconds between two looks for silent jobs
EARLIEST_TIME = 946_684_800.0  # the year 2000
# How a run ended, as: the end, the failed step, the words for people
CONCLUSIONS: dict[str, tuple[str, str | None, str]] = {
    "success": ("running", None, ""),
    "failure": ("failed", None, "failed"),
    "startup_failure": ("failed", None, "could not start"),
    "cancelled": ("failed", "cancelled", "was cancelled"),
    "timed_out": ("failed", "timed_out", "ran out of time"),
    "skipped": ("failed", "cancelled", "was skipped"),
    "neutral": ("failed", "cancelled", "ended without a result"),
    "stale": ("failed", "cancelled", "was given up as stale"),
}
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)  # of a shape that GitHub does not document


def _time(text: str) -> float | None:
    """A time as GitHub writes it; one before 2000 or in the future is dropped."""
    try:
        seconds = datetime.fromisoformat(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if EARLIEST_TIME <= seconds <= time() else None


TEXT = matching("(?s).{1,2000}", "")
RUN: dict[str, Rule] = {  # what is read of a run or a job of one; anything else in its place is dropped
    **dict.fromkeys(("status", "conclusion", "event", "path", "display_title"), TEXT),
    **dict.fromkeys(("updated_at", "run_started_at"), (_time, "")),
    **dict.fromkeys(("id", "run_id"), (WHOLE[0], "")),
    "run_attempt": (RUN_ATTEMPT[0], ""),
    "html_url": matching(r"https://\S{1,1990}", ""),
}


def deliver(writer: Writer, event: str, payload: Mapping[str, Any]) -> list[str]:
    """Take a delivery of GitHub's; the ids of the jobs that it is about. Raises BadField."""
    if event not in ("workflow_run", "workflow_job"):
        return []
    try:
        repository = str(payload["repository"]["full_name"])[:200]
        if _differ(repository, writer.settings.dispatch_repository):
            return []
        word = _read_run(writer, payload[event]) if event == "workflow_run" else _read_job(payload[event])
    except UNREADABLE:
        raise BadField(f"{event[:64]}: not the payload that GitHub documents") from None
    if word is None:
        return []
    word = word._replace(repository=repository)
    return writer.run(lambda transaction: _hear(transaction, word))


def _read(said: Mapping[str, Any]) -> dict[str, Any]:
    return checked({"run_attempt": 1, **said}, RUN)  # one without a number is the first; null is no number


def _read_run(writer: Writer, run: Mapping[str, Any]) -> Word:
    """The word of a run as GitHub's API and its webhooks describe one. Raises UNREADABLE."""
    said, now = _read(run), time()
    file, state = said.get("path", "").partition("@")[0], said["status"]
    workflows = {workflow_of(pipeline, writer.settings) for pipeline in writer.settings.pipelines.values()}
    is_ours = said.get("event") == "workflow_dispatch" and any(
        workflow.isdecimal() or file.endswith(f"/{workflow}") for workflow in workflows
    )
    name = said.get("display_title") if is_ours else None
    word = Word(Run(said["id"], said["run_attempt"]), state, said.get("updated_at", now), now, name=name)
    word = word._replace(url=said.get("html_url"), began_at=said.get("run_started_at", now))
    conclusion = said.get("conclusion", "") if state == "completed" else ""
    if conclusion not in CONCLUSIONS:  # action_required goes on later
        return word._replace(state=conclusion[:64] or state)
    end, failed_step, how = CONCLUSIONS[conclusion]
    error = f"GitHub says that the workflow run {how}." if end == "failed" else None
    return word._replace(state=f"completed: {conclusion}", end=end, failed_step=failed_step, error=error)


def _read_job(job: Mapping[str, Any]) -> Word | None:
    """One job of a run tells that the run goes on or waits, by its arrival, but never that it ended."""
    said, now = _read(job), time()
    run, state = Run(said["run_id"], said["run_attempt"]), said["status"]
    return Word(run, state, now, now) if state == "in_progress" or state in WAITS_FOR else None


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two repositories are known and not the same."""
    return bool(one and other) and str(one).lower() != str(other).lower()


def _hear(transaction: Transaction, word: Word) -> list[str]:
    """Take GitHub's word for the jobs of its run; their ids."""
    job_ids = jobs_of_run(transaction.connection, word.run.id)
    if not job_ids:
        named = words(word.name)
        known = transaction.find(named)
        job_ids = [name for name in named if name in known][-1:]
    return [job_id for job_id in job_ids if _hear_of(transaction, word, job_id)]


def _hear_of(transaction: Transaction, word: Word, job_id: str) -> bool:
    current = transaction.current(job_id)
    if current is None:
        return False
    older = [each for each in attempts_of(transaction.connection, job_id) if each.number < current.number]
    target = progress.place([*older, _bound(current, word)], word.run, word.began_at, word.arrived_at)
    if target.number < 1 or _differ(word.repository, target.repository):
        return False
    after = progress.testify(target, word, transaction.pipeline_of(target))
    if after.heard_at is None:
        after = after._replace(taken_at=word.arrived_at, heard_at=word.arrived_at)
    transaction.save([(target, after)])
    return True


def _bound(current: Attempt, word: Word) -> Attempt:
    """The current attempt; adopted as this run if it has none and ended after the run started."""
    began = current.end in ("running", "failed") and (word.began_at or 0) <= (current.ended_at or 0)
    if current.run or not began:
        return current
    return current._replace(run_id=word.run.id, run_attempt=word.run.attempt)


def conclude(
    transaction: Transaction, attempt: Attempt, said: Mapping[str, Any], refusal: Refused | None
) -> bool:
    """Store a dispatch's outcome; whether the attempt failed by it: not one that was heard of meanwhile."""
    current, now = transaction.current(attempt.job_id), time()
    if not current or current.number != attempt.number or (refusal and (current.heard_at or current.end)):
        return False
    if refusal:
        after = current._replace(end="refused", ended_at=now, error=str(refusal))
    else:
        named = _read(said)
        url = named.get("html_url", current.run_url)
        after = current._replace(taken_at=now, heard_at=current.heard_at or now, run_url=url)
        if "id" in named and not current.run:
            after = after._replace(run_id=named["id"], run_attempt=named.get("run_attempt", "1"))
    transaction.save([(current, after)])
    return after.end == "refused"


def ask_of_silent(writer: Writer) -> None:
    """Ask GitHub of jobs that are silent or wait, each once per QUIET_AFTER; this waits first."""
    quiet_after = writer.settings.quiet_after
    gevent.sleep(min(quiet_after / 2, MOST_OFTEN))
    for attempt in writer.run(lambda transaction: transaction.claim_silent(time(), quiet_after, BOUND)):
        _ask(writer, attempt)


def _ask(writer: Writer, attempt: Attempt) -> None:
    """Ask of one job; what goes wrong with it, such as a run that was deleted, is not the others' trouble."""
    job_id, settings = attempt.job_id, writer.settings
    if _differ(attempt.repository, settings.dispatch_repository):
        return  # the token is for another repository
    try:
        if attempt.run:
            run = ask(settings, f"run {attempt.run.id}", f"runs/{attempt.run.id}")
        else:
            pipeline = writer.run(lambda transaction: transaction.pipeline_of(attempt))
            run = find_run(settings, workflow_of(pipeline, settings), job_id, attempt.opened_at)
        word = _read_run(writer, run) if run else None
    except Refused as refused:
        logs.event("asking GitHub failed", job=job_id, cause=str(refused))
        gevent.sleep(max(0, min(refused.retry_at - time(), 3600)))
        return
    except UNREADABLE as error:
        logs.event("asking GitHub failed", job=job_id, cause=f"answer of no known shape: {error!r}")
        return
    if word:
        told = writer.run(lambda transaction: _hear(transaction, word))
        logs.event("asked GitHub", job=job_id, jobs=told, state=word.state)
    elif attempt.heard_at is None:
        gone = Refused(
            "Milepost was interrupted before GitHub took the dispatch, and no run was found: retry"
        )
        writer.run(lambda transaction: conclude(transaction, attempt, {}, gone))
