"""What people read: a sentence for every step, state and trouble, one bar, a row. Functions of the View."""

import sys
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from functools import lru_cache
from inspect import getmembers, isfunction
from itertools import accumulate
from urllib.parse import quote

from markupsafe import Markup

from webapp.page.view import View, iso
from webapp.rules.attempt import Step
from webapp.rules.pipeline import BUILT_IN

STATES = {"pending": "not started", "active": "in progress", "completed": "done", "error": "failed"}
STATES_OF_ACTIVE = {"replaced": "unfinished", "waiting": "waiting", "quiet": "no update", "lost": "no update"}
BLUE, GREY = "2456c5", "6b6b76"
SIGNS = {  # by tone: the tab's icon, the badge's colour, and what both say in short
    "done": ("1a7f4b", "✓", "Done"),
    "failed": ("b3261e", "✕", "Failed"),
    "replaced": (GREY, "-", "Replaced"),
    "waiting": (BLUE, "…", "Waiting"),
    "quiet": ("8a5a00", "?", "No update"),
    "lost": ("8a5a00", "!", "No update"),
}
WAITS = {
    "approval": "Waiting for an approval on GitHub",
    "run": "Waiting for another run to end",
    "runner": "Waiting for a free runner",
}
WAITED_FOR = {"approval": "approval", "run": "another run", "runner": "a runner"}
PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16" fill="#{}"><rect width="16" height="16"'
    ' rx="4"/><text x="8" y="12.5" font-family="sans-serif" font-weight="700" font-size="13"'
    ' text-anchor="middle" fill="#fff">{}</text></svg>'
)
LINES, CHARACTERS = 3, 280  # of an error, that stand under the headline
SLOW, SLOW_STEP = 2, 120.0  # times the usual; seconds of a step of which nothing is usual


def headline(view: View) -> str:
    """What is happening now, in one sentence."""
    attempt, step, settings = view.attempt, view.pipeline.steps[view.at], view.settings
    cancelled = "The operator closed this job" if attempt.end == "closed" else "The run was cancelled"
    silence = settings.quiet_after if view.condition == "quiet" else settings.lost_after
    return {
        "cancelled": "The run reached its time limit" if attempt.failed_step == "timed_out" else cancelled,
        "failed": step.went_wrong or f"{step.label} failed",
        "done": view.pipeline.done or "Done",
        "replaced": f"Attempt {view.newest} has replaced this one",
        "waiting": WAITS[attempt.waiting_for or "runner"],
        "live": step.now or step.label,
    }.get(view.tone, f"No update for more than {duration(silence)}")


def slow_at(view: View) -> float:
    """When the present step has become slow, in Unix seconds: then the page says why that may be."""
    attempt, step = view.attempt, view.steps[view.at]
    if not attempt.rank and attempt.heard_at is None:
        return attempt.opened_at + view.settings.quiet_after
    began, usual = step.started_at or attempt.heard_at or attempt.opened_at, view.usual.get(step.id)
    return began + (SLOW * usual + 10 if usual is not None else SLOW_STEP)


def reason(view: View) -> str:
    """The last lines of the error, as much as the first screen has room for; "" where there is none."""
    tail = "\n".join((view.error or "").strip().splitlines()[-LINES:])
    return tail if len(tail) <= CHARACTERS else f"…{tail[-CHARACTERS:]}"


def state(view: View, step: Step) -> str:
    """A step's state as a watcher reads it."""
    if step.state == "cancelled" and view.attempt.failed_step == "timed_out":
        return "timed out"
    if step.state == "completed" and step.started_at is None:
        return "passed"
    if step.state == "active":
        return STATES_OF_ACTIVE.get(view.tone, STATES["active"] if view.attempt.rank else "waiting")
    unreached = step.state == "pending" and view.condition == "over"
    return "not reached" if unreached else STATES.get(step.state, step.state)


def word(view: View) -> str:
    """How a job stands, for the operator."""
    attempt, tone = view.attempt, view.tone
    return {
        "cancelled": "Timed out" if attempt.failed_step == "timed_out" else "Cancelled",
        "done": "Succeeded",
        "waiting": f"Waiting for {WAITED_FOR[attempt.waiting_for or 'runner']}",
        "live": "Under way" if attempt.rank else "Queued",
    }.get(tone, tone.capitalize())


def kind(view: View) -> str:
    """The condition of what goes on; how the rest ended."""
    ended = "cancelled" if view.attempt.was_cancelled else view.status
    return ended if view.condition == "over" else view.condition


def segments(view: View) -> tuple[tuple[str, ...], str]:
    """The states of the steps; how many are done, and how it stands with the one that the view is about."""
    step, is_done = view.steps[view.at], view.status == "running"
    done = f"{view.at + is_done} of {len(view.steps)} steps done"
    said = done if is_done else f"{done}; {step.label}: {state(view, step)}"
    return tuple(step.state for step in view.steps), said


def run(view: View) -> tuple[str | None, str | None, str | None]:
    """The run's id, which attempt of it this is, and its page at GitHub."""
    return view.attempt.run_id, view.attempt.run_attempt, view.run_url


def lasted(view: View) -> str:
    """How long an attempt took, or takes until now; "" where that is not known."""
    ended_at = view.attempt.ended_at if view.attempt.end else view.clock.now
    return "" if ended_at is None else duration(ended_at - view.attempt.opened_at)


def listed(view: View) -> tuple[Hashable, ...]:
    """All that the list's row says of a job: what the macro of this name takes, in its order."""
    attempt, newest, heard = view.attempt, view.newest, view.attempt.last_signal_at
    pipeline = attempt.pipeline if attempt.pipeline != BUILT_IN else None
    about = (view.region, pipeline, f"attempt {newest}" if newest > 1 else None)
    names = (view.job_id, view.name, " · ".join(filter(None, about)))
    error = (attempt.error or "").strip().split("\n")[0]
    step = "" if attempt.error or attempt.end == "running" else attempt.note or view.steps[view.at].label
    stands = (view.status, view.condition, kind(view), word(view), error, step, *segments(view), lasted(view))
    ago = None if heard is None else duration(view.clock.now - heard)
    return *names, *stands, *run(view), view.created_at, heard, ago


@lru_cache(1024)  # without it a list takes 1.4 to 1.5 times as long, if all of its rows are as they were
def kept(macro: Callable[..., str], *values: Hashable) -> str:
    """What a macro makes of these values; it must depend on nothing else."""
    return macro(*values)


def sign(view: View) -> tuple[str, str, str]:
    """A colour (without its #), one letter, and how far the job is, in a few words."""
    step = str(view.at + 1)
    if view.tone == "cancelled":
        said = "Closed" if view.attempt.end == "closed" else "Cancelled"
        return GREY, "-", "Timed out" if view.attempt.failed_step == "timed_out" else said
    return SIGNS.get(view.tone, (BLUE, step, f"Step {step} of {len(view.steps)}"))


def report(view: View) -> str:
    """A few lines to send to whoever may help."""
    step, heard = view.steps[view.at], view.attempt.last_signal_at
    lines = {
        "Job": view.job_id,
        "About": view.name if view.name != view.job_id else None,
        "Attempt": view.attempt.number,
        "Step": f"{step.label}, {state(view, step)}",
        "Last update": moment(heard) if heard else None,
        "Error": reason(view),
        "Run": view.run_url if len(view.run_url or "") <= 300 else None,  # the page stays below 60 kB
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)


def bar(view: View) -> tuple[float, tuple[float, float, float, float] | None]:
    """How far the bar has come, of 100; then, if it moves: from where to where, from when to when."""
    attempt, step = view.attempt, view.steps[view.at]
    lengths = [view.usual.get(each.id, 0) for each in view.steps]
    if any(each.id not in view.usual for each in view.steps) or not sum(lengths):
        lengths = [1] * len(lengths)  # nothing is usual yet: all steps are equally long
    marks = [100 * mark / sum(lengths) for mark in accumulate(lengths, initial=0)]
    low, high, usual = marks[view.at], marks[view.at + 1], view.usual.get(step.id)
    if step.state == "completed" or not usual or step.started_at is None:
        return round(high if step.state == "completed" else low, 1), None
    heard = attempt.heard_at or 0
    until = min(view.clock.now, heard + view.settings.quiet_after) if heard else view.clock.now
    if attempt.ended_at or view.condition == "waiting":
        until = max(attempt.ended_at or 0, heard)
    came = low + (high - low) * min(max(until - step.started_at, 0) / usual, 1)
    moves = (round(low, 1), round(high, 1), step.started_at, step.started_at + usual)
    return round(came, 1), moves if view.condition == "live" else None


def duration(seconds: float) -> str:
    """Seconds in words: "58 s", "1 min 5 s", "1 h 4 min", "3 d 2 h"; static/page.js says the same."""
    whole = max(int(seconds), 0)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def roughly(seconds: float) -> str:
    """A duration that claims no more than is known."""
    if seconds < 10:
        return duration(max(seconds, 1))
    return duration(round(seconds / 10) * 10 if seconds < 90 else round(seconds / 60) * 60)


def moment(seconds: float) -> str:
    """A time of day in UTC, with its date."""
    return _minute(seconds // 60)


@lru_cache(4096)
def _minute(minute: float) -> str:
    return datetime.fromtimestamp(minute * 60, UTC).strftime("%d %b %Y, %H:%M UTC")


def clock(view: View, at: float) -> Markup:
    """A time of day as an element, with its date on another day than today."""
    text, today = moment(at), moment(view.clock.now)
    return _time(f'datetime="{iso(at)}" data-clock', text[13:] if text[:11] == today[:11] else text)


def since(view: View, at: float, word: str = "") -> Markup:
    """How long ago a moment was, as an element that the page's script counts up."""
    passed = duration(view.clock.now - at)
    return _time(f'datetime="{iso(at)}" data-since="{word}"', f"{word} {passed}" if word else passed)


def took(start: float, end: float) -> Markup:
    """How long something took, as an element."""
    return _time(f'datetime="PT{max(int(end - start), 0)}S"', duration(end - start))


def _time(attributes: str, text: str) -> Markup:  # as macros of the template these took half of a fragment
    return Markup(f"<time {attributes}>{text}</time>")  # noqa: S704 -- nothing in it was reported


def icon(view: View) -> str:
    """The tab's icon as the address of a picture: a colour and one letter."""
    return _picture(*sign(view)[:2])


@lru_cache
def _picture(colour: str, letter: str) -> str:
    return "data:image/svg+xml," + quote(PICTURE.format(colour, letter))


FOR_TEMPLATES = {"iso": iso, "kept": kept, **dict(getmembers(sys.modules[__name__], isfunction))}
