"""GitHub's own word of a run, read from a delivery or from the API's answer; strict and bounded.

https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_run
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from webapp.config import Settings
from webapp.github.start import workflow_of
from webapp.rules.attempt import WAITS_FOR, Run, Word
from webapp.rules.pipeline import Pipeline
from webapp.rules.report import BadField

EARLIEST_TIME = 946_684_800.0  # the year 2000
LONGEST_TEXT = 2000  # characters
LARGEST_ID = 10**20
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


def read_delivery(
    event: str, payload: Mapping[str, Any], settings: Settings, pipelines: Mapping[str, Pipeline], now: float
) -> Word | None:
    """The word of a delivery; None for one that says nothing of a run. Raises BadField."""
    try:
        if event not in ("workflow_run", "workflow_job"):
            return None
        repository = _text(payload["repository"]["full_name"])
        if settings.dispatch_repository and repository.lower() != settings.dispatch_repository.lower():
            return None
        if event == "workflow_run":
            return replace(read_run(payload["workflow_run"], settings, pipelines, now), repository=repository)
        word = _read_job(payload["workflow_job"], now)
        return word and replace(word, repository=repository)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise BadField(f"{event[:64]}: not the payload that GitHub documents") from None


def read_run(
    run: Mapping[str, Any], settings: Settings, pipelines: Mapping[str, Pipeline], now: float
) -> Word:
    """The word of a run as GitHub's API and its webhooks describe one.

    Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for another shape.
    """
    path = str(run.get("path") or "").partition("@")[0]
    workflows = {workflow_of(pipeline, settings) for pipeline in pipelines.values()}
    is_ours = run.get("event") == "workflow_dispatch" and any(
        workflow.isdecimal() or path.endswith(f"/{workflow}") for workflow in workflows
    )
    title, status = run.get("display_title"), _text(run["status"])
    word = Word(
        _run(run["id"], run.get("run_attempt", 1)),
        status,
        _time(run.get("updated_at"), now),
        now,
        began_at=_time(run.get("run_started_at"), now),
        url=_url(run.get("html_url")),
        name=title if is_ours and isinstance(title, str) else None,
    )
    if status != "completed":
        return word
    conclusion = run.get("conclusion")
    if not isinstance(conclusion, str) or conclusion not in CONCLUSIONS:  # action_required goes on later
        return replace(word, state=str(conclusion)[:64] if conclusion else status)
    end, failed_step, words = CONCLUSIONS[conclusion]
    error = f"GitHub says that the workflow run {words}." if end == "failed" else None
    state = f"completed: {conclusion}"
    return replace(word, state=state, end=end, failed_step=failed_step, error=error)


def _read_job(job: Mapping[str, Any], now: float) -> Word | None:
    """One job of a run tells that the run goes on or waits, by its arrival, but never that it ended."""
    status, run = _text(job["status"]), _run(job["run_id"], job.get("run_attempt", 1))
    if status == "in_progress" or status in WAITS_FOR:
        return Word(run, status, now, now)
    return None


def _run(id: object, attempt: object) -> Run:
    for number, least in ((id, 0), (attempt, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number < LARGEST_ID:
            raise ValueError("not a run")
    return Run(str(id), str(attempt))


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise TypeError("not a text")
    return value


def _time(text: object, now: float) -> float:
    """A time as GitHub writes it; one before 2000, in the future, or none counts as now."""
    try:
        seconds = datetime.fromisoformat(text).timestamp() if isinstance(text, str) else now
    except (ValueError, OverflowError):
        return now
    return seconds if EARLIEST_TIME <= seconds <= now else now


def _url(value: object) -> str | None:
    """An https address; anything else is dropped."""
    try:
        is_good = isinstance(value, str) and len(value) <= LONGEST_TEXT and urlsplit(value).scheme == "https"
    except ValueError:
        return None
    return str(value) if is_good else None
