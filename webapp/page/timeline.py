"""The steps as bars on a time axis: where everything stands. Lengths are percent of the width."""

from dataclasses import dataclass

from webapp.page.view import View, iso
from webapp.page.words import duration, state, step_of
from webapp.rules.attempt import Step
from webapp.rules.forecast import edges, position

SCALES = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 604800)
MOST_TICKS = 5


@dataclass(frozen=True, slots=True)
class Bar:
    """From where to where; `span` is the width."""

    at: float
    span: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One row for each step: its bar, and the usual one; either is None where it is not known."""

    rows: list[tuple[Bar | None, Bar | None]]
    ticks: list[tuple[float, int]]  # where, and how many seconds that is


def timeline(view: View) -> Timeline:
    """The picture of an attempt as of its last sign of life: what is not heard of is not drawn."""
    opened, until = view.attempt.opened_at, view.attempt.ended_at or view.attempt.heard_at
    actual = [
        _span(opened, step.started_at, step.finished_at if step.state == "completed" else until)
        for step in view.steps
    ]
    usual = _usual(view)
    known = [span for span in (*actual, *usual) if span]
    scale = max([1.0, *(end for _, end in known)])
    every = next((s for s in SCALES if scale / s <= MOST_TICKS), SCALES[-1])
    return Timeline(
        [(_bar(a, scale), _bar(u, scale)) for a, u in zip(actual, usual, strict=True)],
        [(round(100 * t / scale, 1), t) for t in range(0, int(scale) + 1 if known else 0, every)],
    )


def done(view: View) -> float:
    """How far the progress bar has come, of 100; it stops where the silence began to mean something."""
    heard, ended = view.attempt.heard_at, view.attempt.ended_at
    until = view.now if heard is None else min(view.now, heard + view.settings.quiet_after)
    return round(position(view.attempt.usual, view.steps, max(ended, heard or 0) if ended else until), 1)


def reach(view: View) -> list[float]:
    """Between which marks the bar stands while the present step is active."""
    at = view.steps.index(step_of(view))
    return [round(mark, 1) for mark in edges(view.attempt.usual, view.steps)[at : at + 2]]


def in_words(view: View) -> str:
    """The picture for who cannot see it."""
    return "Timeline. " + "; ".join(_in_words(view, step) for step in view.steps) + "."


def _in_words(view: View, step: Step) -> str:
    took = state(view, step)
    if step.started_at is not None and step.finished_at is not None:
        took = duration(step.finished_at - step.started_at)
    usual = (view.attempt.usual or {}).get(step.id)
    return f"{step.label}: {took}" + (f", usually {duration(usual[0])}" if usual else "")


def _span(opened: float, start: float | None, end: float | None) -> tuple[float, float] | None:
    if start is None or end is None:
        return None
    return max(start - opened, 0), max(end - opened, start - opened, 0)


def _usual(view: View) -> list[tuple[float, float] | None]:
    """Each step's usual place, as long as all before it are known."""
    spans: list[tuple[float, float] | None] = []
    at: float | None = 0.0
    for step in view.steps:
        known = (view.attempt.usual or {}).get(step.id)
        end = at + known[0] if known and at is not None else None
        spans.append((at, end) if at is not None and end is not None else None)
        at = end
    return spans


def _bar(span: tuple[float, float] | None, scale: float) -> Bar | None:
    if span is None:
        return None
    width = max(100 * (span[1] - span[0]) / scale, 0.6)  # a moment is still to be seen
    return Bar(round(min(100 * span[0] / scale, 100 - width), 1), round(width, 1))


FOR_TEMPLATES = {"timeline": timeline, "done": done, "reach": reach, "in_words": in_words, "iso": iso}
