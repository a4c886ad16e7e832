"""What GitHub says of runs, taken for their jobs: told by its webhooks, or asked for on silence."""

from collections.abc import Mapping
from time import time
from typing import Any

import gevent
from sqlalchemy.exc import SQLAlchemyError

from webapp import logs
from webapp.config import Settings
from webapp.github.client import BOUND, Refused, find_run, get_run, words
from webapp.github.start import conclude, workflow_of
from webapp.github.words import read_delivery, read_run
from webapp.rules import progress
from webapp.rules.attempt import Attempt, Word
from webapp.rules.pipeline import Pipeline
from webapp.storage.database import reason
from webapp.storage.jobs import attempts_of, jobs_of_run, pipeline_of
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

MOST_OFTEN = 15.0  # seconds between two looks for silent jobs


def deliver(
    writer: Writer,
    settings: Settings,
    pipelines: Mapping[str, Pipeline],
    event: str,
    payload: Mapping[str, Any],
) -> list[str]:
    """Take a delivery of GitHub's; the ids of the jobs that it is about. Raises BadField."""
    word = read_delivery(event, payload, settings, pipelines, time())
    return writer.run(lambda transaction: hear(transaction, word)) if word else []


def hear(transaction: Transaction, word: Word) -> list[str]:
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
    if target.number < 1 or (
        word.repository and target.repository and word.repository.lower() != target.repository.lower()
    ):
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


def ask_for_ever(writer: Writer, settings: Settings, pipelines: Mapping[str, Pipeline]) -> None:
    """A greenlet of each process: ask GitHub of silent and waiting jobs, each once per QUIET_AFTER."""
    pause = min(settings.quiet_after / 2, MOST_OFTEN)
    while True:
        gevent.sleep(pause)
        try:
            due = writer.run(
                lambda transaction: transaction.claim_silent(time(), settings.quiet_after, BOUND)
            )
            for attempt in due:
                _try_to_ask(writer, settings, pipelines, attempt)
        except SQLAlchemyError as error:
            logs.event("asking GitHub failed", cause=reason(error))
        except Exception:  # whatever it was, a greenlet that ended would ask no more
            logs.log.exception("asking GitHub failed")


def _try_to_ask(
    writer: Writer, settings: Settings, pipelines: Mapping[str, Pipeline], attempt: Attempt
) -> None:
    """Ask of one job; what goes wrong with it, such as a run that was deleted, is not the others' trouble."""
    try:
        _ask(writer, settings, pipelines, attempt)
    except Refused as refused:
        logs.event("asking GitHub failed", job=attempt.job_id, cause=str(refused))
        gevent.sleep(max(0, min(refused.retry_at - time(), 3600)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        logs.event("asking GitHub failed", job=attempt.job_id, cause=f"answer of no known shape: {error!r}")


def _ask(writer: Writer, settings: Settings, pipelines: Mapping[str, Pipeline], attempt: Attempt) -> None:
    job_id = attempt.job_id
    if attempt.repository and attempt.repository.lower() != settings.dispatch_repository.lower():
        return  # the token is for another repository
    if attempt.run:
        run = get_run(settings, attempt.run.id)
    else:
        pipeline = writer.run(lambda transaction: pipeline_of(transaction.connection, attempt.definition))
        run = find_run(settings, workflow_of(pipeline, settings), job_id, attempt.opened_at)
    if run:
        word = read_run(run, settings, pipelines, time())
        told = writer.run(lambda transaction: hear(transaction, word))
        logs.event("asked GitHub", job=job_id, jobs=told, state=word.state)
    elif attempt.heard_at is None:
        gone = Refused(
            "Milepost was interrupted before GitHub took the dispatch, and no run was found: retry"
        )
        writer.run(lambda transaction: conclude(transaction, job_id, attempt.number, {}, gone))
