"""The rules of progress: what a report does to an attempt, and what a watcher then sees.

Pure functions over plain values; no database, no clock of its own. Times are Unix seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RANKS = {
    "provisioning": 1,
    "vm_created": 2,
    "network_configured": 2,
    "ansible_started": 3,
    "ansible_complete": 4,
    "running": 5,
}
STEPS = {
    "queued": "Queued",
    "creating": "Creating Server",
    "installing": "Installing Dependencies",
    "configuring": "Configuring Agent",
    "running": "Running",
}
CREATING, CONFIGURING, RUNNING = 1, 3, 4
CONDITIONS = ("live", "quiet", "lost", "over")
STATUSES = ("queued", "provisioning", "running", "failed")
CANCELLATIONS = ("cancelled", "timed_out")


class Run(NamedTuple):
    """A workflow run and its attempt: decimal digits without leading zeros, of any length."""

    id: str
    attempt: str

    @property
    def age(self) -> tuple[int, str, int, str]:
        """Sorts runs as numbers do, without the cost of turning long digits into one."""
        return len(self.id), self.id, len(self.attempt), self.attempt


@dataclass(frozen=True, slots=True)
class Report:
    """What one callback says; `milestone` is None for a heartbeat."""

    job_id: str
    milestone: str | None
    arrived_at: float
    sent_at: float | None = None
    run: Run | None = None
    failed_step: str | None = None
    error: str | None = None
    server_id: str | None = None
    server_ip: str | None = None
    tailscale_ip: str | None = None
    body: str = "{}"

    @property
    def at(self) -> float:
        """The time of the milestone."""
        return self.arrived_at if self.sent_at is None else self.sent_at


class Attempt(NamedTuple):
    """One workflow run of a job, as far as it is known; its fields are columns of the table.

    `end` is None, "running", "failed" or "refused" (GitHub did not take the dispatch);
    `times` has the time of each milestone that moves a step.
    """

    job_id: str
    number: int
    opened_at: float
    version: int = 0
    run_id: str | None = None
    run_attempt: str | None = None
    rank: int = 0
    end: str | None = None
    ended_at: float | None = None
    end_sent_at: float | None = None
    failed_step: str | None = None
    error: str | None = None
    contradicted: bool = False
    times: Mapping[str, float] = {}
    last_signal_at: float | None = None
    heartbeat_sent_at: float | None = None
    server_id: str | None = None
    server_ip: str | None = None
    tailscale_ip: str | None = None
    asked_at: float | None = None
    taken_at: float | None = None
    run_url: str | None = None
    witness: str | None = None
    witnessed_at: float | None = None
    usual: dict[str, list[float]] | None = None

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
        return self.end == "failed" and self.failed_step in CANCELLATIONS

    @property
    def heard_at(self) -> float | None:
        """Since when silence counts: the last callback, or GitHub's word that it took the dispatch."""
        return max((t for t in (self.last_signal_at, self.taken_at) if t is not None), default=None)


@dataclass(frozen=True, slots=True)
class Step:
    """One of the five stages a person sees."""

    id: str
    label: str
    state: str
    started_at: float | None
    finished_at: float | None


def place(attempts: Sequence[Attempt], report: Report) -> Attempt:
    """The attempt that a report belongs to: one of these (oldest first), or a new one.

    A new one has the next number; that of a run older than all that are known has a number
    below 1 and is shown to nobody.
    """
    current, run = attempts[-1], report.run
    if run is None or run == current.run:
        return current
    for attempt in attempts:
        if attempt.run == run:
            return attempt
    named = [attempt.run.age for attempt in attempts if attempt.run]
    if named and run.age < max(named):
        return _open(report, min(attempts[0].number, 1) - 1)
    if current.run is None and not current.end:
        return current._replace(run_id=run.id, run_attempt=run.attempt)
    return _open(report, current.number + 1)


def _open(report: Report, number: int) -> Attempt:
    run = report.run
    return Attempt(
        report.job_id,
        number,
        report.arrived_at,
        run_id=run and run.id,
        run_attempt=run and run.attempt,
    )


def is_stale(attempt: Attempt, report: Report) -> bool:
    """Whether this is a heartbeat that is no newer than one already heard: a replay."""
    return (
        report.milestone is None
        and report.sent_at is not None
        and attempt.heartbeat_sent_at is not None
        and report.sent_at <= attempt.heartbeat_sent_at
    )


def receive(attempt: Attempt, report: Report) -> Attempt:
    """The attempt after a report that it had not received before."""
    if report.milestone is None:
        if report.sent_at is not None:
            attempt = attempt._replace(heartbeat_sent_at=report.sent_at)
        return attempt if attempt.end else _heard(attempt, report)
    is_end = report.milestone in ("running", "failed")
    if not attempt.end:
        attempt = _heard(_timed(attempt, report), report)
        return _ended(attempt, report) if is_end else attempt
    if not is_end:
        return _timed(attempt, report)
    if attempt.end not in ("refused", report.milestone):
        attempt = attempt._replace(contradicted=True)
    if _is_newer(report, attempt):
        return _ended(_heard(_timed(attempt, report), report), report)
    return attempt


def testify(attempt: Attempt, report: Report, state: str) -> Attempt:
    """The attempt after GitHub's own word of its run, which ends what callbacks left open and no more.

    `state` is the run's, as "in_progress" or "completed: failure"; the report has no `sent_at`.
    """
    if state.startswith("completed") or not (attempt.witness or "").startswith("completed"):
        attempt = attempt._replace(witness=state, witnessed_at=report.arrived_at)
    return attempt if attempt.end or not report.milestone else _ended(_timed(attempt, report), report)


def _timed(attempt: Attempt, report: Report) -> Attempt:
    """Fill in the milestone's time; move the rank unless the attempt has ended."""
    milestone = report.milestone or ""
    if milestone not in RANKS:
        return attempt
    rank = max(attempt.rank, RANKS[milestone])
    if attempt.end and milestone != "running":
        rank = attempt.rank
    return attempt._replace(rank=rank, times={**attempt.times, milestone: report.at})


def _heard(attempt: Attempt, report: Report) -> Attempt:
    """A sign of life, and what it says of the server."""
    return attempt._replace(
        last_signal_at=max(attempt.last_signal_at or 0, report.arrived_at),
        server_id=report.server_id or attempt.server_id,
        server_ip=report.server_ip or attempt.server_ip,
        tailscale_ip=report.tailscale_ip or attempt.tailscale_ip,
    )


def _ended(attempt: Attempt, report: Report) -> Attempt:
    failed = report.milestone == "failed"
    return attempt._replace(
        end=report.milestone,
        ended_at=report.at,
        end_sent_at=report.sent_at,
        failed_step=report.failed_step if failed else None,
        error=report.error if failed else None,
    )


def _is_newer(report: Report, attempt: Attempt) -> bool:
    """Between two ends: by `sent_at` where both have it, else by arrival."""
    if report.sent_at is None or attempt.end_sent_at is None:
        return True
    return report.sent_at > attempt.end_sent_at


def condition(attempt: Attempt, now: float, quiet_after: float, lost_after: float) -> str:
    """One of CONDITIONS, read off the clock."""
    if attempt.end:
        return "over"
    silence = now - (attempt.heard_at or now)
    if silence > lost_after:
        return "lost"
    return "quiet" if silence > quiet_after else "live"


def steps(attempt: Attempt) -> list[Step]:
    """The five steps, in order; the time of a lost milestone is not known."""
    at, state = attempt.rank, "active"
    if attempt.status == "failed":
        at, state = _failed_at(attempt), "cancelled" if attempt.was_cancelled else "error"
    reached = [attempt.opened_at, *(_reached(attempt, rank) for rank in range(1, 6))]
    left = [*reached[1 : at + 1], attempt.ended_at, *[None] * 5]
    return [
        Step(
            id,
            label,
            "completed" if i < at else state if i == at else "pending",
            reached[i],
            left[i],
        )
        for i, (id, label) in enumerate(STEPS.items())
    ]


def _failed_at(attempt: Attempt) -> int:
    if attempt.end == "refused":
        return 0
    failed_step = attempt.failed_step or ""
    mapped = 0
    if failed_step == "provision":
        mapped = CREATING
    elif failed_step == "configure" or failed_step.startswith("configure_"):
        mapped = CONFIGURING
    return min(max(mapped, attempt.rank, CREATING), RUNNING)


def _reached(attempt: Attempt, rank: int) -> float | None:
    """When the first milestone of this rank was reported; None where it was lost."""
    return min((t for m, t in attempt.times.items() if RANKS[m] == rank), default=None)
