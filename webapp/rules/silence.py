"""Silence, read off the clock and never stored. Times are Unix seconds."""

from collections.abc import Iterable
from typing import NamedTuple

from webapp.rules.attempt import Attempt

CONDITIONS = ("live", "waiting", "quiet", "lost", "over")


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
