"""What is shown of a job: one value behind the page, the fragment, the stream and the JSON."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from time import time
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select

from webapp.config import Settings
from webapp.rules import progress
from webapp.storage.tables import STATE, attempt_from, attempts, current_attempts, jobs


@dataclass(frozen=True)
class View:
    """One attempt of a job, at one moment; times are Unix seconds."""

    job_id: str
    agent_id: str | None
    region: str | None
    created_at: float
    link: int
    attempt: progress.Attempt
    now: float
    settings: Settings
    newest: int = 0

    @property
    def is_superseded(self) -> bool:
        """Whether a newer attempt has taken this one's place."""
        return self.attempt.number < self.newest

    @property
    def status(self) -> str:
        """One of progress.STATUSES."""
        return self.attempt.status

    @cached_property
    def condition(self) -> str:
        """One of progress.CONDITIONS; nothing more is expected of an attempt that was superseded."""
        if self.is_superseded:
            return "over"
        return progress.condition(self.attempt, self.now, self.settings.quiet_after, self.settings.lost_after)

    @cached_property
    def steps(self) -> list[progress.Step]:
        """The five steps, in order."""
        return progress.steps(self.attempt)

    @property
    def version(self) -> str:
        """Grows with each change of what is shown, by a callback or by silence alone."""
        conditions = progress.CONDITIONS
        return str(self.attempt.version * len(conditions) + conditions.index(self.condition))

    @property
    def changes_at(self) -> float | None:
        """When silence alone will make the condition another one."""
        heard = self.attempt.heard_at
        if heard is None or self.condition in ("lost", "over"):
            return None
        return heard + (self.settings.quiet_after if self.condition == "live" else self.settings.lost_after)

    @property
    def run_url(self) -> str | None:
        """The workflow run's page at GitHub, of this very attempt."""
        attempt, settings = self.attempt, self.settings
        if attempt.run and settings.dispatch_repository:
            host = settings.dispatch_api_url.removesuffix("/api/v3").replace("//api.", "//")
            path = f"{settings.dispatch_repository}/actions/runs/{attempt.run.id}"
            return f"{host}/{path}/attempts/{attempt.run.attempt}"
        return attempt.run_url

    def as_json(self) -> dict[str, Any]:
        """The job as the contract's JSON."""
        return {
            "job_id": self.job_id,
            "agent_id": self.agent_id,
            "region": self.region,
            "status": self.status,
            "condition": self.condition,
            "attempt": self.attempt.number,
            "failed_step": self.attempt.failed_step,
            "error": self.attempt.error,
            "version": self.version,
            "created_at": iso(self.created_at),
            "last_signal_at": iso(self.attempt.last_signal_at),
            "run_url": self.run_url,
            "steps": [
                {
                    "id": step.id,
                    "label": step.label,
                    "state": step.state,
                    "started_at": iso(step.started_at),
                    "finished_at": iso(step.finished_at),
                }
                for step in self.steps
            ],
        }


def iso(seconds: float | None) -> str | None:
    """ISO 8601 in UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def view_of(row: Row[Any], settings: Settings, attempt: progress.Attempt | None = None) -> View:
    """The view of a row of `current_attempts()`, or of a newer current attempt of that job."""
    attempt = attempt or attempt_from(row)
    return View(
        row.job_id,
        row.agent_id,
        row.region,
        row.created_at,
        row.link,
        attempt,
        time(),
        settings,
        newest=attempt.number,
    )


_FIND = current_attempts().where(jobs.c.job_id == bindparam("id"))


def find(connection: Connection, job_id: str, settings: Settings) -> View | None:
    """A job's view as of now, or None."""
    row = connection.execute(_FIND, {"id": job_id}).one_or_none()
    return view_of(row, settings) if row else None


def find_attempt(connection: Connection, view: View, number: int) -> View | None:
    """One attempt of the job that `view` shows, or None."""
    row = connection.execute(
        select(*STATE).where(attempts.c.job_id == view.job_id, attempts.c.number == number)
    ).one_or_none()
    return replace(view, attempt=attempt_from(row)) if row else None
