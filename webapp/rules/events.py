"""What happened to an attempt, in one word: for the log, and for the operator who wants to be told."""

from collections.abc import Iterator
from typing import NamedTuple

from webapp.rules.attempt import Attempt
from webapp.rules.silence import Clock, condition


class Transition(NamedTuple):
    """`name` is done, failed, cancelled, waiting, quiet, lost or recovered."""

    job_id: str
    number: int
    name: str
    at: float


def transitions(before: Attempt, after: Attempt, clock: Clock) -> Iterator[Transition]:
    """What turned between two states of an attempt; silence is not among it, since no report brings it."""
    was, now = condition(before, clock), condition(after, clock)
    name = None
    if was in ("quiet", "lost") and now not in ("quiet", "lost") and after.end != "closed":
        yield Transition(after.job_id, after.number, "recovered", clock.now)
    if after.end and after.end != before.end:
        name = "cancelled" if after.was_cancelled else "done" if after.end == "running" else "failed"
    elif now == "waiting" != was:
        name = "waiting"
    if name:
        yield Transition(after.job_id, after.number, name, clock.now)
