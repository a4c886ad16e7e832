"""What is shown of a job: one value behind the page, the fragment, the stream and the JSON."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import Connection, Row

from webapp.config import Settings
from webapp.rules import progress
from webapp.rules.attempt import Attempt, Clock, Step
from webapp.rules.pipeline import Pipeline
from webapp.rules.report import LATEST_TIME
from webapp.storage.jobs import attempt_from, attempts_of, clock_now, find, pipeline_of

# In place of what GitHub says of the operator's token and settings
NOT_STARTED = "GitHub did not start the workflow. The operator can see the reason."
# What the JSON has under the same names
OF_VIEW = ("job_id", "agent_id", "region", "status", "condition", "error", "run_url")
OF_ATTEMPT = ("pipeline", "subject", "note", "failed_step", "result_url", "server_left")


@dataclass(frozen=True)
class View:
    """One attempt of a job, at one moment; times are Unix seconds."""

    job_id: str
    agent_id: str | None
    region: str | None
    created_at: float
    link: int
    attempt: Attempt
    pipeline: Pipeline
    clock: Clock
    settings: Settings
    newest: int = 0

    @property
    def name(self) -> str:
        """What the page is about."""
        return self.attempt.subject or self.agent_id or self.job_id

    @property
    def is_superseded(self) -> bool:
        """Whether a newer attempt has taken this one's place."""
        return self.attempt.number < self.newest

    @property
    def status(self) -> str:
        """One of attempt.STATUSES."""
        return self.attempt.status

    @cached_property
    def condition(self) -> str:
        """One of attempt.CONDITIONS; nothing more is expected of an attempt that was superseded."""
        return "over" if self.is_superseded else self.attempt.condition(self.clock)

    @cached_property
    def tone(self) -> str:
        """What kind of state it is: done, failed, cancelled, replaced, or the condition of what goes on."""
        if self.attempt.end:
            end = "done" if self.attempt.end == "running" else "failed"
            return "cancelled" if self.attempt.was_cancelled else end
        return "replaced" if self.is_superseded else self.condition

    @property
    def error(self) -> str | None:
        """What went wrong, as a watcher may read it; the operator's pages show `attempt.error`."""
        return NOT_STARTED if self.attempt.end == "refused" else self.attempt.error

    @cached_property
    def steps(self) -> list[Step]:
        """The steps, in order."""
        return progress.steps(self.attempt, self.pipeline)

    @cached_property
    def at(self) -> int:
        """The index of the step that the view is about: the active or broken one, or the last."""
        return min(sum(step.state == "completed" for step in self.steps), len(self.steps) - 1)

    @cached_property
    def usual(self) -> dict[str, float]:
        """The usual seconds of each step of which they are known, by its id."""
        return {id: times[0] for id, times in (self.attempt.usual or {}).items()}

    @cached_property
    def version(self) -> str:
        """A digest of what is shown but the last sign of life: the same for the same state everywhere."""
        attempt, settings = self.attempt, self.settings
        shown = [self._state, self.newest, self.link, attempt.end, attempt.usual, self.pipeline.hash]
        if attempt.heard_at is None:
            shown += ["unheard", settings.quiet_after, settings.operator_contact]
        elif self.tone in ("failed", "cancelled", "quiet", "lost"):
            silence = {"quiet": settings.quiet_after, "lost": settings.lost_after}.get(self.tone)
            shown += [silence, settings.operator_contact]
        return hashlib.blake2b(json.dumps(shown).encode(), digest_size=12).hexdigest()

    @property
    def changes_at(self) -> float | None:
        """When silence alone will make the condition another one."""
        heard, clock = self.attempt.heard_at, self.clock
        if heard is None or self.condition not in ("live", "quiet"):
            return None
        return clock.now + heard - (clock.quiet_before if self.condition == "live" else clock.lost_before)

    @property
    def run_url(self) -> str | None:
        """The workflow run's page at GitHub, of this very attempt."""
        attempt = self.attempt
        if not attempt.run_id or not attempt.repository:
            return attempt.run_url
        host = self.settings.dispatch_api_url.removesuffix("/api/v3").replace("//api.", "//")
        run = f"{attempt.run_id}/attempts/{attempt.run_attempt or 1}"
        return f"{host}/{attempt.repository}/actions/runs/{run}"

    @cached_property
    def _state(self) -> dict[str, Any]:
        """The contract's JSON but for the version and the last sign of life."""
        attempt, is_waiting = self.attempt, self.condition == "waiting"
        state = {name: getattr(self, name) for name in OF_VIEW}
        state |= {name: getattr(attempt, name) for name in OF_ATTEMPT}
        expected = {"from": iso(attempt.expected_from), "to": iso(attempt.expected_to)}
        return state | {
            "attempt": attempt.number,
            "created_at": iso(self.created_at),
            "waiting_for": attempt.waiting_for if is_waiting else None,
            "expected": None if attempt.end or attempt.expected_from is None else expected,
            "steps": [
                step._asdict() | {"started_at": iso(step.started_at), "finished_at": iso(step.finished_at)}
                for step in self.steps
            ],
        }

    def as_json(self) -> dict[str, Any]:
        """The job as the contract's JSON."""
        return self._state | {"version": self.version, "last_signal_at": iso(self.attempt.last_signal_at)}


@lru_cache(4096)  # a fragment asks for each of its times about three times: 10 % of its rendering
def iso(seconds: float | None) -> str | None:
    """ISO 8601 in UTC, to the millisecond; the year 9999 is the last that it can name."""
    if seconds is None:
        return None
    moment = datetime.fromtimestamp(min(seconds, LATEST_TIME), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Views:
    """Makes the views of one database's jobs, by the clock and the steps that are theirs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def clock(self, connection: Connection | None = None) -> Clock:
        """The clock of silence, now."""
        return clock_now(connection, self._settings)

    def of(self, row: Row[Any], connection: Connection | None, attempt: Attempt | None = None) -> View:
        """The view of a row of `current_attempts()`, or of another attempt of that job.

        Raises LookupError where the steps are not in memory and there is no connection to read them by.
        """
        attempt = attempt or attempt_from(row)
        pipeline, clock = pipeline_of(connection, attempt.definition), self.clock(connection)
        known = row.job_id, row.agent_id, row.region, row.created_at, row.link, attempt, pipeline, clock
        return View(*known, self._settings, newest=max(row.attempt, attempt.number))

    def find(self, connection: Connection, job_id: str, number: int | None = None) -> View | None:
        """A job's view as of now, of its current attempt or of another one that was opened, or None."""
        row = find(connection, job_id)
        if row is None or number is None:
            return self.of(row, connection) if row else None
        opened = [attempt for attempt in attempts_of(connection, job_id) if attempt.number == number >= 1]
        return self.of(row, connection, opened[0]) if opened else None
