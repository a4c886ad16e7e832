"""Silence, read off the clock and never stored; and what happened to an attempt, in one word."""

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

from webapp.rules.attempt import Attempt

CONDITIONS = ("live", "waiting", "quiet", "lost", "over")


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


def condition(attempt: Attempt, clock: Clock) -> str:
    """One of CONDITIONS, read off the clock."""
    if attempt.end or attempt.waiting_for:
        return "over" if attempt.end else "waiting"
    if attempt.heard_at is None or attempt.heard_at >= clock.quiet_before:
        return "live"
    return "lost" if attempt.heard_at < clock.lost_before else "quiet"


class Transition(NamedTuple):
    """What is logged and told: `name` is done, failed, cancelled, waiting, quiet, lost or recovered."""

    job_id: str
    number: int
    name: str
    at: float


def transitions(before: Attempt, after: Attempt, clock: Clock) -> Iterator[Transition]:
    """What turned between two states of an attempt; silence is not among it, since no report brings it."""
    was, now = condition(before, clock), condition(after, clock)
    silent = ("quiet", "lost")
    if was in silent and now not in silent and after.end != "closed":
        yield Transition(after.job_id, after.number, "recovered", clock.now)
    if after.end and after.end != before.end:
        name = "cancelled" if after.was_cancelled else "done" if after.end == "running" else "failed"
        yield Transition(after.job_id, after.number, name, clock.now)
    elif now == "waiting" != was:
        yield Transition(after.job_id, after.number, "waiting", clock.now)
