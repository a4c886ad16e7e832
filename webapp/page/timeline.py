"""Where the one bar of the page stands, and how it moves until the next report."""

from typing import NamedTuple

from webapp.page.view import View, iso
from webapp.page.words import step_of
from webapp.rules.forecast import edges, position


class Pace(NamedTuple):
    """The bar goes from one mark (of 100) to the next, between two moments (Unix seconds)."""

    low: float
    high: float
    start: float
    end: float


def done(view: View) -> float:
    """How far the bar has come, of 100; it stops where silence began to mean something."""
    heard, ended = view.attempt.heard_at, view.attempt.ended_at
    until = view.now if heard is None else min(view.now, heard + view.settings.quiet_after)
    if view.condition == "waiting":
        until = heard or 0.0
    return round(position(view.attempt.usual, view.steps, max(ended, heard or 0) if ended else until), 1)


def pace(view: View) -> Pace | None:
    """How the bar moves within the present step; None where it stands still."""
    step = step_of(view)
    usual = (view.attempt.usual or {}).get(step.id)
    if view.condition != "live" or not usual or not usual[0] or step.started_at is None:
        return None
    low, high = edges(view.attempt.usual, view.steps)[view.steps.index(step) :][:2]
    return Pace(round(low, 1), round(high, 1), step.started_at, step.started_at + usual[0])


def expected(view: View) -> tuple[float, float] | None:
    """Between which whole minutes the job is usually done; None where nothing is known or said of it."""
    soonest, latest = view.attempt.expected_from, view.attempt.expected_to
    if soonest is None or latest is None or view.condition not in ("live", "waiting"):
        return None
    return soonest // 60 * 60, -(-latest // 60) * 60


FOR_TEMPLATES = {"done": done, "expected": expected, "iso": iso, "pace": pace}
