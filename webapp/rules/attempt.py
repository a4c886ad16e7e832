"""The values of the rules: runs, reports, GitHub's words, attempts and steps. Times are Unix seconds.

Silence is read off the clock and never stored.
"""

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

STATUSES = ("queued", "provisioning", "running", "failed")
CONDITIONS = ("live", "waiting", "quiet", "lost", "over")
WAITS_FOR = {"waiting": "approval", "pending": "run", "queued": "runner", "requested": "runner"}


class Run(NamedTuple):
    """A workflow run and its attempt: decimal digits without leading zeros."""

    id: str
    attempt: str

    @property
    def age(self) -> tuple[int, int]:
        """Sorts runs as numbers."""
        return int(self.id), int(self.attempt)


class Report(NamedTuple):
    """What one callback says; a heartbeat has no milestone; `said` has values for fields of the attempt."""

    job_id: str
    milestone: str | None
    arrived_at: float
    sent_at: float | None = None
    run: Run | None = None
    pipeline: str | None = None
    said: Mapping[str, Any] = {}
    body: str = "{}"

    @property
    def at(self) -> float:
        """The time of the milestone."""
        return self.arrived_at if self.sent_at is None else self.sent_at


class Word(NamedTuple):
    """What GitHub says of a run."""

    run: Run
    state: str  # as "in_progress" or "completed: failure"
    at: float  # the run's `updated_at`, or the time of arrival
    arrived_at: float
    end: str | None = None  # "running" or "failed"
    failed_step: str | None = None
    error: str | None = None
    began_at: float | None = None
    url: str | None = None
    repository: str | None = None
    name: str | None = None  # the run's title, where that may name the job


class Clock(NamedTuple):
    """A moment, and the times of the last sign of life before which an attempt is quiet, or lost, by then."""

    now: float
    quiet_before: float
    lost_before: float


def clock(now: float, quiet_after: float, lost_after: float, shut: Iterable[tuple[float, float]]) -> Clock:
    """The clock at `now`; `shut` are the times, (from, until), when the door was shut: no silence."""
    quiet, lost, counted = now - quiet_after, now - lost_after, now
    for began, ended in sorted(shut, key=itemgetter(1), reverse=True):
        if ended <= now:
            ended, counted = min(ended, counted), min(began, counted)  # no time counts twice
            quiet -= ended - counted if quiet < ended else 0
            lost -= ended - counted if lost < ended else 0
    return Clock(now, quiet, lost)


class Attempt(NamedTuple):
    """One workflow run of a job, as far as it is known; its fields are columns of the table."""

    job_id: str
    number: int  # below 1: never opened
    opened_at: float
    pipeline: str = ""
    definition: str | None = None  # the hash of its steps; None: those of the built-in pipeline
    change: int = 0  # the number of the last change of what is shown
    subject: str | None = None
    note: str | None = None
    run_id: str | None = None
    run_attempt: str | None = None
    repository: str | None = None
    run_url: str | None = None
    first_sent_at: float | None = None
    rank: int = 0
    end: str | None = None  # "running", "failed", "refused" (by GitHub) or "closed" (by the operator)
    ended_at: float | None = None
    end_sent_at: float | None = None
    failed_step: str | None = None
    error: str | None = None
    contradicted: bool = False
    times: Mapping[str, float] = {}  # of each milestone that moves a step
    last_callback_at: float | None = None
    last_signal_at: float | None = None
    heard_at: float | None = None  # silence counts from here
    heartbeat_sent_at: float | None = None
    server_id: str | None = None
    server_ip: str | None = None
    tailscale_ip: str | None = None
    server_left: bool | None = None
    result_url: str | None = None
    asked_at: float | None = None  # when GitHub was asked to run the workflow
    taken_at: float | None = None  # when GitHub took the dispatch
    run_state: str | None = None  # GitHub's newest word of the run
    run_state_at: float | None = None
    waiting_for: str | None = None
    looked_at: float | None = None  # when GitHub's API was last asked about the run
    usual: dict[str, list[float]] | None = None
    expected_from: float | None = None
    expected_to: float | None = None

    @property
    def run(self) -> Run | None:
        """The run that this attempt is, once one was named."""
        return Run(self.run_id, self.run_attempt or "1") if self.run_id else None

    @property
    def status(self) -> str:
        """One of STATUSES."""
        if self.end:
            return "running" if self.end == "running" else "failed"
        return "provisioning" if self.rank else "queued"

    @property
    def was_cancelled(self) -> bool:
        """Whether the end was nobody's error."""
        return self.end in ("failed", "closed") and self.failed_step in ("cancelled", "timed_out")

    def condition(self, clock: Clock) -> str:
        """One of CONDITIONS, read off the clock."""
        if self.end or self.waiting_for:
            return "over" if self.end else "waiting"
        if self.heard_at is None or self.heard_at >= clock.quiet_before:
            return "live"
        return "lost" if self.heard_at < clock.lost_before else "quiet"


class Step(NamedTuple):
    """One of the stages a person sees."""

    id: str
    label: str
    state: str
    started_at: float | None
    finished_at: float | None


class Transition(NamedTuple):
    """What is logged and told: `name` is done, failed, cancelled, waiting, quiet, lost or recovered."""

    job_id: str
    number: int
    name: str
    at: float


def transitions(before: Attempt, after: Attempt, clock: Clock) -> Iterator[Transition]:
    """What turned between two states of an attempt; silence is not among it, since no report brings it."""
    was, now = before.condition(clock), after.condition(clock)
    silent = ("quiet", "lost")
    if was in silent and now not in silent and after.end != "closed":
        yield Transition(after.job_id, after.number, "recovered", clock.now)
    if after.end and after.end != before.end:
        name = "cancelled" if after.was_cancelled else "done" if after.end == "running" else "failed"
        yield Transition(after.job_id, after.number, name, clock.now)
    elif now == "waiting" != was:
        yield Transition(after.job_id, after.number, "waiting", clock.now)
