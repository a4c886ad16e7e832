"""GitHub itself as a witness: what it says of a run, told by its webhooks or asked for on silence.

https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_run
"""

from collections.abc import Mapping
from datetime import datetime
from time import time
from typing import Any, NamedTuple

import gevent
from sqlalchemy import and_, or_, select, tuple_, update
from sqlalchemy.exc import SQLAlchemyError

from webapp import logs
from webapp.config import Settings
from webapp.github.client import BOUND, Refused, find_run, get_run, words
from webapp.github.start import conclude
from webapp.parts import Parts
from webapp.rules import progress
from webapp.rules.progress import Attempt, Report, Run
from webapp.rules.report import BadReport
from webapp.storage.tables import STATE, attempt_from, attempts, attempts_of, jobs, known_jobs
from webapp.storage.writer import Transaction

FAILURES = {"cancelled": "was cancelled", "timed_out": "ran out of time"}
LONGEST_ASKED = 7 * 86_400.0  # seconds of silence after which GitHub is not asked any more
ASKED_AT_ONCE = 10
MOST_OFTEN = 15.0  # seconds between two looks for silent jobs


class Word(NamedTuple):
    """What GitHub says of a run; `end` is None, "running" or "failed"; times are Unix seconds."""

    run: Run
    state: str
    started_at: float | None
    end: str | None = None
    ended_at: float | None = None
    conclusion: str = ""
    url: str | None = None
    name: str | None = None
    of_whole_run: bool = True

    def report(self, job_id: str, now: float) -> Report:
        """As if the run had reported it."""
        outcome = FAILURES.get(self.conclusion, f"ended as “{self.conclusion}”")
        return Report(
            job_id,
            self.end,
            now,
            run=self.run,
            failed_step=self.conclusion if self.conclusion in FAILURES else None,
            error=f"GitHub says that the workflow run {outcome}." if self.end == "failed" else None,
        )


def deliver(parts: Parts, event: str, payload: Mapping[str, Any]) -> list[str]:
    """Take a delivery of GitHub's; the ids of the jobs that it is about. Raises BadReport."""
    try:
        word = read(event, payload, parts.settings)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadReport(f"{event}: not the payload that GitHub documents") from None
    return parts.writer.run(lambda transaction: hear(transaction, word)) if word else []


def read(event: str, payload: Mapping[str, Any], settings: Settings) -> Word | None:
    """The word of a delivery; None for one that says nothing of a run.

    Raises ValueError, KeyError, TypeError or AttributeError for another shape than GitHub's.
    """
    if event == "workflow_run":
        run = payload["workflow_run"]
        repository = payload["repository"]["full_name"].lower()
        ours = (settings.dispatch_repository or repository).lower() == repository
        return read_run(run, settings) if ours else read_run({**run, "event": ""}, settings)
    if event != "workflow_job":
        return None
    job = payload["workflow_job"]
    failed = job["conclusion"] in ("failure", *FAILURES)
    if job["status"] != "in_progress" and not failed:
        return None  # the end of one job is that of its run only where it failed
    run = {**job, "id": job["run_id"], "updated_at": job.get("completed_at"), "html_url": None}
    return read_run(run, settings)._replace(of_whole_run=False, started_at=None)


def read_run(run: Mapping[str, Any], settings: Settings) -> Word:
    """The word of a run as GitHub's API and its webhooks describe one."""
    of_ours = run.get("event") == "workflow_dispatch" and (
        str(run.get("path", "")).partition("@")[0].endswith(f"/{settings.dispatch_workflow}")
        or settings.dispatch_workflow.isdecimal()
    )
    word = Word(
        Run(str(int(run["id"])), str(int(run["run_attempt"]))),
        state=str(run["status"]),
        started_at=_seconds(run.get("run_started_at")),
        url=run.get("html_url"),
        name=run.get("display_title") if of_ours else None,
    )
    if run["status"] != "completed":
        return word
    conclusion = str(run["conclusion"])
    return word._replace(
        state=f"completed: {conclusion}",
        end="running" if conclusion == "success" else "failed",
        ended_at=_seconds(run.get("updated_at")),
        conclusion=conclusion,
    )


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def hear(transaction: Transaction, word: Word) -> list[str]:
    """Take GitHub's word for the jobs of its run; their ids."""
    connection = transaction.connection
    of_run = select(attempts.c.job_id).where(attempts.c.run_id == word.run.id)
    job_ids = sorted(set(connection.execute(of_run).scalars()))
    if not job_ids:
        named = words(word.name)
        known = known_jobs(connection, named)
        job_ids = [name for name in named if name in known][-1:]
    if len(job_ids) > 1 and not word.of_whole_run:
        return []  # which of the run's jobs this one is, GitHub cannot say
    for job_id in job_ids:
        _hear_of(transaction, word, job_id)
    return job_ids


def _hear_of(transaction: Transaction, word: Word, job_id: str) -> None:
    current, now = transaction.current(job_id), time()
    if current is None:
        return
    report = word.report(job_id, now)
    known = [each for each in attempts_of(transaction.connection, job_id) if each.number < current.number]
    target = progress.place([*known, _bound(current, word)], report)
    if target.number < 1:
        return
    after = progress.testify(target, report, word.state)
    after = after._replace(run_url=word.url or after.run_url)
    if after.heard_at is None:
        after = after._replace(taken_at=now)
    if after.end != target.end:
        after = after._replace(ended_at=word.ended_at or now)
    transaction.save([(current, target, after)])


def _bound(current: Attempt, word: Word) -> Attempt:
    """The current attempt, which is this run where it named none and ended after the run had begun."""
    began = current.end in ("running", "failed") and (word.started_at or 0) <= (current.ended_at or 0)
    if current.run or not began:
        return current
    return current._replace(run_id=word.run.id, run_attempt=word.run.attempt)


def ask_for_ever(parts: Parts) -> None:
    """A greenlet of each process: ask GitHub of the silent jobs, each once per QUIET_AFTER by one of all."""
    settings = parts.settings
    pause = min(settings.quiet_after / 2, MOST_OFTEN)
    while True:
        gevent.sleep(pause)
        try:
            for attempt in parts.writer.run(lambda transaction: _claim(transaction, settings)):
                _try_to_ask(parts, attempt)
        except SQLAlchemyError as error:
            logs.event("asking GitHub failed", cause=type(error).__name__)


def _try_to_ask(parts: Parts, attempt: Attempt) -> None:
    """Ask of one job; what goes wrong with it, such as a run that was deleted, is not the others' trouble."""
    try:
        _ask(parts, attempt)
    except Refused as refused:
        logs.event("asking GitHub failed", job=attempt.job_id, cause=str(refused))
        gevent.sleep(max(0, min(refused.retry_at - time(), 3600)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logs.event("asking GitHub failed", job=attempt.job_id, cause=f"answer of no known shape: {error!r}")


def _claim(transaction: Transaction, settings: Settings) -> list[Attempt]:
    """Silent attempts that nobody asked about within QUIET_AFTER; from now on nobody else will."""
    now = time()
    until = now - settings.quiet_after
    silent = and_(attempts.c.heard_at < until, attempts.c.heard_at > now - LONGEST_ASKED)
    unanswered = and_(attempts.c.heard_at.is_(None), attempts.c.asked_at < min(until, now - BOUND))
    due = and_(
        attempts.c.end.is_(None),
        or_(silent, unanswered),
        or_(attempts.c.witnessed_at.is_(None), attempts.c.witnessed_at < until),
    )
    key = tuple_(attempts.c.job_id, attempts.c.number)
    current = select(jobs.c.job_id, jobs.c.attempt).where(
        jobs.c.job_id == attempts.c.job_id, jobs.c.attempt == attempts.c.number
    )
    found = select(attempts.c.job_id, attempts.c.number).where(due, current.exists()).limit(ASKED_AT_ONCE)
    claim = update(attempts).where(key.in_(found), due).values(witnessed_at=now).returning(*STATE)
    return [attempt_from(row) for row in transaction.connection.execute(claim)]


def _ask(parts: Parts, attempt: Attempt) -> None:
    settings, job_id = parts.settings, attempt.job_id
    run = get_run(settings, attempt.run.id) if attempt.run else find_run(settings, job_id, attempt.opened_at)
    if run:
        told = parts.writer.run(lambda transaction: hear(transaction, read_run(run, settings)))
        logs.event("asked GitHub", job=job_id, jobs=told, state=run.get("status"))
    elif attempt.heard_at is None:
        gone = Refused(
            "Milepost was interrupted before GitHub took the dispatch, and no run was found: retry"
        )
        parts.writer.run(lambda transaction: conclude(transaction, job_id, attempt.number, {}, gone))
