"""How long it usually takes: learnt from this installation's own finished jobs, never guessed.

Times are seconds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median, quantiles
from time import monotonic
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, select

from webapp.rules.progress import STEPS, Attempt, Step, steps
from webapp.storage.tables import STATE, attempt_from, attempts

LEAST = 5  # finished jobs, before anything is claimed
NEWEST = 100  # finished jobs: what is usual may change
FRESH_FOR = 2.0  # seconds

Usual = dict[str, list[float]]  # step id, or "total": [median, 90th percentile]
_known: WeakKeyDictionary[Engine, tuple[float, Usual | None]] = WeakKeyDictionary()


def usual(connection: Connection) -> Usual | None:
    """What an attempt that opens now may be measured by; costs nothing when asked again at once."""
    learnt_at, known = _known.get(connection.engine, (0.0, None))
    if known is None or monotonic() - learnt_at >= FRESH_FOR:  # with nothing to tell there is little to read
        newest = select(*STATE).where(attempts.c.end == "running")
        newest = newest.order_by(attempts.c.ended_at.desc()).limit(NEWEST)
        known = learn(attempt_from(row) for row in connection.execute(newest))
        _known[connection.engine] = monotonic(), known
    return known


def learn(finished: Iterable[Attempt]) -> Usual | None:
    """Median and 90th percentile of each step, and of the whole, wherever at least LEAST are known."""
    samples: dict[str, list[float]] = defaultdict(list)
    for attempt in finished:
        for name, start, end in _spans(attempt):
            if start is not None and end is not None:
                samples[name].append(max(end - start, 0))
    return {
        name: [round(median(times), 1), round(quantiles(times, n=10, method="inclusive")[-1], 1)]
        for name, times in samples.items()
        if len(times) >= LEAST
    } or None


def _spans(attempt: Attempt) -> list[tuple[str, float | None, float | None]]:
    of_steps = [(step.id, step.started_at, step.finished_at) for step in steps(attempt)]
    return [*of_steps, ("total", attempt.opened_at, attempt.ended_at)]


@dataclass(frozen=True, slots=True)
class Pace:
    """How the active step is measured: `rest` is what usually follows after it."""

    median: float
    most: float
    rest: float

    def left(self, elapsed: float) -> float | None:
        """What usually remains, `elapsed` into the step; None past the 90th percentile of it."""
        if elapsed > self.most:
            return None
        return self.rest + (self.median if elapsed <= self.median else self.most) - elapsed


def pace(usual: Usual | None, at: int) -> Pace | None:
    """The pace of the `at`-th step, where enough is known of it and of all that follow."""
    ahead = [(usual or {}).get(id) for id in list(STEPS)[at:]]
    known = [times for times in ahead if times]
    if not ahead or len(known) < len(ahead):
        return None
    (middle, most), *after = known
    return Pace(middle, most, rest=sum(middle for middle, _ in after))


def edges(usual: Usual | None) -> list[float]:
    """Where the five steps begin on a bar of 100, and its end: by usual times, or in fifths."""
    medians = [times[0] for id in STEPS if (times := (usual or {}).get(id))]
    if len(medians) < len(STEPS) or not sum(medians):
        medians = [1.0] * len(STEPS)
    total = sum(medians)
    return [0.0, *(100 * end / total for end in accumulate(medians))]


def position(usual: Usual | None, shown: Sequence[Step], until: float | None) -> float:
    """How far the bar has come, of 100; within a step by its usual time, never past what is reported."""
    at = sum(step.state == "completed" for step in shown)
    marks = edges(usual)
    step_pace = pace(usual, at)
    started = shown[at].started_at if at < len(shown) else None
    if not step_pace or not step_pace.median or started is None or until is None:
        return marks[at]
    return marks[at] + (marks[at + 1] - marks[at]) * min(max(until - started, 0) / step_pace.median, 1)
