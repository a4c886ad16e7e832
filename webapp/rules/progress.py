"""The rules of progress: what a report does to an attempt, and what a watcher then sees.

Pure functions over plain values; no database, no clock of its own. Times are Unix seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

from webapp.rules.pipeline import ENDS, Pipeline

CONDITIONS = ("live", "waiting", "quiet", "lost", "over")
STATUSES = ("queued", "provisioning", "running", "failed")
CANCELLATIONS = ("cancelled", "timed_out")
WAITS_FOR = {"waiting": "approval", "pending": "run", "queued": "runner", "requested": "runner"}


class Run(NamedTuple):
    """A workflow run and its attempt: decimal digits without leading zeros."""

    id: str
    attempt: str

    @property
    def age(self) -> tuple[int, int]:
        """Sorts runs as numbers."""
        return int(self.id), int(self.attempt)


@dataclass(frozen=True, slots=True)
class Report:
    """What one callback says; `milestone` is None for a heartbeat."""

    job_id: str
    milestone: str | None
    arrived_at: float
    sent_at: float | None = None
    run: Run | None = None
    repository: str | None = None
    pipeline: str | None = None
    subject: str | None = None
    note: str | None = None
    failed_step: str | None = None
    error: str | None = None
    server_left: bool | None = None
    result_url: str | None = None
    server_id: str | None = None
    server_ip: str | None = None
    tailscale_ip: str | None = None
    body: str = "{}"

    @property
    def at(self) -> float:
        """The time of the milestone."""
        return self.arrived_at if self.sent_at is None else self.sent_at


@dataclass(frozen=True, slots=True)
class Word:
    """What GitHub says of a run: `state` as "in_progress" or "completed: failure".

    `at` is the run's `updated_at`, or the time of arrival; `end` is None, "running" or "failed"; `name` is
    the run's title where that may name the job.
    """

    run: Run
    state: str
    at: float
    arrived_at: float
    end: str | None = None
    failed_step: str | None = None
    error: str | None = None
    began_at: float | None = None
    url: str | None = None
    repository: str | None = None
    name: str | None = None


class Attempt(NamedTuple):
    """One workflow run of a job, as far as it is known; its fields are columns of the table.

    `end` is None, "running", "failed", "refused" (GitHub did not take the dispatch) or "closed" (by the
    operator); `change` numbers the last change of what is shown; `times` has the time of each milestone
    that moves a step. Silence counts from `heard_at`.
    """

    job_id: str
    number: int
    opened_at: float
    pipeline: str = ""
    definition: str | None = None
    change: int = 0
    subject: str | None = None
    note: str | None = None
    run_id: str | None = None
    run_attempt: str | None = None
    repository: str | None = None
    run_url: str | None = None
    first_sent_at: float | None = None
    rank: int = 0
    end: str | None = None
    ended_at: float | None = None
    end_sent_at: float | None = None
    failed_step: str | None = None
    error: str | None = None
    contradicted: bool = False
    times: Mapping[str, float] = {}
    last_callback_at: float | None = None
    last_signal_at: float | None = None
    heard_at: float | None = None
    heartbeat_sent_at: float | None = None
    server_id: str | None = None
    server_ip: str | None = None
    tailscale_ip: str | None = None
    server_left: bool | None = None
    result_url: str | None = None
    asked_at: float | None = None
    taken_at: float | None = None
    run_state: str | None = None
    run_state_at: float | None = None
    waiting_for: str | None = None
    looked_at: float | None = None
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
        return self.end in ("failed", "closed") and self.failed_step in CANCELLATIONS


@dataclass(frozen=True, slots=True)
class Step:
    """One of the stages a person sees."""

    id: str
    label: str
    state: str
    started_at: float | None
    finished_at: float | None


class Clock(NamedTuple):
    """A moment, and the times of the last sign of life before which an attempt is quiet, or lost, by then."""

    now: float
    quiet_before: float
    lost_before: float


def clock(
    now: float, quiet_after: float, lost_after: float, closures: Iterable[tuple[float, float]]
) -> Clock:
    """The clock at `now`; `closures` are the times, (from, until), when the door was shut: no silence."""
    quiet, lost = now - quiet_after, now - lost_after
    for began, ended in _merged(closures):
        quiet -= ended - began if quiet < ended <= now else 0
        lost -= ended - began if lost < ended <= now else 0
    return Clock(now, quiet, lost)


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as spans that do not overlap, newest first."""
    merged: list[tuple[float, float]] = []
    for began, ended in sorted(spans, key=lambda span: span[1], reverse=True):
        if merged and ended >= merged[-1][0]:
            merged[-1] = min(began, merged[-1][0]), merged[-1][1]
        else:
            merged.append((began, ended))
    return merged


def condition(attempt: Attempt, clock: Clock) -> str:
    """One of CONDITIONS, read off the clock."""
    if attempt.end:
        return "over"
    if attempt.waiting_for:
        return "waiting"
    if attempt.heard_at is None or attempt.heard_at >= clock.quiet_before:
        return "live"
    return "lost" if attempt.heard_at < clock.lost_before else "quiet"


def place(attempts: Sequence[Attempt], run: Run | None, sent_at: float | None, opened_at: float) -> Attempt:
    """The attempt that a run belongs to: one of these (oldest first), or a new one.

    A new one has the next number; that of a run older than all that are known has a number below 1 and is
    shown to nobody. `sent_at` is when the run says that it was under way.
    """
    current = attempts[-1]
    if run is None or run == current.run:
        return current
    for attempt in attempts:
        if attempt.run == run:
            return attempt
    if _is_older(run, sent_at, attempts):
        return _open(current, run, opened_at, min(attempts[0].number, 1) - 1)
    if current.run is None and not current.end:
        return current._replace(run_id=run.id, run_attempt=run.attempt)
    return _open(current, run, opened_at, current.number + 1)


def _is_older(run: Run, sent_at: float | None, attempts: Sequence[Attempt]) -> bool:
    """Whether a run that nobody has named yet began before the newest one that was named."""
    named = [attempt.run for attempt in attempts if attempt.run]
    if not named:
        return False
    if any(other.id == run.id and other.age > run.age for other in named):
        return True
    if run.attempt == "1":
        return any(run.age[0] < other.age[0] for other in named)
    newest = next(attempt for attempt in reversed(attempts) if attempt.run)
    if newest.run is None or newest.run.id == run.id:
        return False
    if sent_at is not None and newest.first_sent_at is not None:
        return sent_at < newest.first_sent_at
    return run.age < newest.run.age


def _open(current: Attempt, run: Run, opened_at: float, number: int) -> Attempt:
    """An attempt of the same job from the start."""
    return Attempt(
        current.job_id,
        number,
        opened_at,
        current.pipeline,
        subject=current.subject,
        run_id=run.id,
        run_attempt=run.attempt,
    )


def is_stale(attempt: Attempt, report: Report) -> bool:
    """Whether this is a heartbeat that is no newer than one already heard: a replay."""
    return (
        report.milestone is None
        and report.sent_at is not None
        and attempt.heartbeat_sent_at is not None
        and report.sent_at <= attempt.heartbeat_sent_at
    )


def receive(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """The attempt after a report that it had not received before."""
    if attempt.end == "closed":
        attempt = attempt._replace(end=None, ended_at=None, failed_step=None)
    if report.sent_at is not None:
        attempt = attempt._replace(first_sent_at=min(attempt.first_sent_at or report.sent_at, report.sent_at))
    if report.milestone is None:
        if report.sent_at is not None:
            attempt = attempt._replace(heartbeat_sent_at=report.sent_at)
        return attempt if attempt.end else _heard(attempt, report)
    is_end = report.milestone in ENDS
    if not attempt.end:
        attempt = _heard(_timed(attempt, report, pipeline), report)
        return _ended(attempt, report) if is_end else attempt
    if not is_end:
        return _timed(attempt, report, pipeline)
    if attempt.end not in ("refused", report.milestone):
        attempt = attempt._replace(contradicted=True)
    if _is_newer(report, attempt):
        return _ended(_heard(_timed(attempt, report, pipeline), report), report)
    return attempt


def testify(attempt: Attempt, word: Word, pipeline: Pipeline) -> Attempt:
    """The attempt after GitHub's own word of its run, which ends what callbacks left open and no more."""
    was_final = (attempt.run_state or "").startswith("completed:")
    if not word.end and (was_final or word.at < (attempt.run_state_at or 0)):
        return attempt
    attempt = attempt._replace(
        run_state=word.state,
        run_state_at=word.at,
        run_url=word.url or attempt.run_url,
        repository=attempt.repository or word.repository,
    )
    if attempt.end:
        return attempt
    if word.end:
        times = attempt.times
        if word.end == "running":
            attempt = attempt._replace(rank=len(pipeline.steps), times={**times, "running": word.at})
        return attempt._replace(
            end=word.end,
            ended_at=word.at,
            failed_step=word.failed_step,
            error=word.error,
            note=None,
            waiting_for=None,
        )
    attempt = attempt._replace(waiting_for=WAITS_FOR.get(word.state) if _is_news(attempt, word) else None)
    if word.state == "in_progress":
        return attempt._replace(last_signal_at=word.arrived_at, heard_at=word.arrived_at)
    return attempt


def _is_news(attempt: Attempt, word: Word) -> bool:
    """Whether a word is no older than the last callback; GitHub's times are whole seconds.

    Within one second an approval follows a callback, but a run that has sent one waits for no runner.
    """
    since = attempt.last_callback_at or 0
    return word.at >= (floor(since) if word.state in ("waiting", "pending") else since)


def close(attempt: Attempt, now: float) -> Attempt:
    """The attempt after the operator gave it up."""
    return attempt._replace(end="closed", ended_at=now, failed_step="cancelled", waiting_for=None)


def _timed(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """Fill in the milestone's time; move the rank unless the attempt has ended."""
    milestone = report.milestone or ""
    if milestone not in pipeline.ranks:
        return attempt
    rank = max(attempt.rank, pipeline.ranks[milestone])
    if attempt.end and milestone != "running":
        rank = attempt.rank
    return attempt._replace(
        rank=rank,
        times={**attempt.times, milestone: report.at},
        note=None if not attempt.end else attempt.note,
    )


def _heard(attempt: Attempt, report: Report) -> Attempt:
    """A sign of life, and what it says of the run and the server."""
    return attempt._replace(
        last_callback_at=report.arrived_at,
        last_signal_at=report.arrived_at,
        heard_at=report.arrived_at,
        waiting_for=None,
        subject=report.subject or attempt.subject,
        note=report.note or attempt.note,
        repository=report.repository or attempt.repository,
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
        server_left=report.server_left if failed else None,
        result_url=None if failed else report.result_url,
    )


def _is_newer(report: Report, attempt: Attempt) -> bool:
    """Between two ends: by `sent_at` where both have it, else by arrival."""
    if report.sent_at is None or attempt.end_sent_at is None:
        return True
    return report.sent_at >= attempt.end_sent_at


def steps(attempt: Attempt, pipeline: Pipeline) -> list[Step]:
    """The steps, in order; the time of a lost milestone is not known."""
    at, state, count = attempt.rank, "active", len(pipeline.steps)
    if attempt.status == "failed":
        state = "cancelled" if attempt.was_cancelled else "error"
        at = 0 if attempt.end == "refused" else pipeline.failed_at(attempt.failed_step or "", attempt.rank)
        if attempt.end == "closed":
            at = min(attempt.rank, count - 1)
    reached = [attempt.opened_at, *(_reached(attempt, pipeline, rank) for rank in range(1, count + 1))]
    left = [*reached[1 : at + 1], attempt.ended_at, *[None] * count]
    return [
        Step(
            step.id,
            step.label,
            "completed" if i < at else state if i == at else "pending",
            reached[i],
            left[i],
        )
        for i, step in enumerate(pipeline.steps)
    ]


def _reached(attempt: Attempt, pipeline: Pipeline, rank: int) -> float | None:
    """When the first milestone of this rank was reported; None where it was lost."""
    return min((t for m, t in attempt.times.items() if pipeline.ranks.get(m) == rank), default=None)
