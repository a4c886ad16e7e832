"""What a watcher reads: a sentence for every step, state and trouble. Pure functions of the View."""

from datetime import UTC, datetime
from urllib.parse import quote

from markupsafe import Markup

from webapp.page.view import View
from webapp.rules import pipeline
from webapp.rules.attempt import Step

STATES = {"pending": "not started", "active": "in progress", "completed": "done", "error": "failed"}
BLUE = "2456c5"
SIGNS = {  # by tone: the tab's icon, the badge's colour, and what both say in short
    "done": ("1a7f4b", "✓", "Done"),
    "failed": ("b3261e", "✕", "Failed"),
    "cancelled": ("6b6b76", "-", "Cancelled"),
    "replaced": ("6b6b76", "-", "Replaced"),
    "waiting": (BLUE, "…", "Waiting"),
    "quiet": ("8a5a00", "?", "No update"),
    "lost": ("8a5a00", "!", "No update"),
}
WAITS = {  # by what it waits for: the headline, and who acts
    "approval": ("Waiting for an approval on GitHub", "The run goes on when somebody has approved it."),
    "run": ("Waiting for another run to end", "GitHub lets this run go on when the other one has ended."),
    "runner": ("Waiting for a free runner", "GitHub lets the run go on when a runner is free."),
}
ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='#{}'><rect width='16' height='16'"
    " rx='4'/><text x='8' y='12.5' font-family='sans-serif' font-weight='700' font-size='13'"
    " text-anchor='middle' fill='#fff'>{}</text></svg>"
)
FOLLOWS = "This page updates by itself."
LINES, CHARACTERS = 3, 280  # of an error, that stand under the headline
SLOW, SLOW_STEP = 2, 120.0  # times the usual; seconds of a step of which nothing is usual


def step_of(view: View) -> Step:
    """The step that the view is about: the active or broken one, or the last."""
    return next((step for step in view.steps if step.state not in ("completed", "pending")), view.steps[-1])


def definition_of(view: View) -> pipeline.Step:
    """The words of that step."""
    return view.pipeline.steps[view.steps.index(step_of(view))]


def tone(view: View) -> str:
    """What kind of state it is: a key of SIGNS, or "live"."""
    if view.attempt.was_cancelled:
        return "cancelled"
    silent = "replaced" if view.is_superseded else view.condition
    return {"failed": "failed", "running": "done"}.get(view.status, silent)


def headline(view: View) -> str:
    """What is happening now, in one sentence."""
    step, settings = definition_of(view), view.settings
    silence = settings.quiet_after if view.condition == "quiet" else settings.lost_after
    return {
        "cancelled": _cancelled(view),
        "failed": step.went_wrong or f"{step.label} failed",
        "done": view.pipeline.done or "Done",
        "replaced": f"Attempt {view.newest} has replaced this one",
        "waiting": WAITS[view.attempt.waiting_for or "runner"][0],
        "live": step.now or step.label,
    }.get(tone(view), f"No update for more than {duration(silence)}")


def _cancelled(view: View) -> str:
    if view.attempt.end == "closed":
        return "The operator closed this job"
    timed_out = view.attempt.failed_step == "timed_out"
    return "The run reached its time limit" if timed_out else "The run was cancelled"


def notes(view: View) -> list[str]:
    """What that means, whether something was left behind, and who acts next."""
    kind, last = tone(view), f"Last known step: {step_of(view).label}."
    again = "" if view.is_superseded else "The operator can start a new attempt. It will appear here."
    cancelled = "Nothing is known to be broken."
    if view.attempt.end == "closed":
        cancelled = "A run on GitHub may still go on." if view.attempt.run else ""
    said = {
        "waiting": [f"{WAITS[view.attempt.waiting_for or 'runner'][1]} {FOLLOWS}"],
        "quiet": [f"{last} The run may be slow, or cut off from the network. {FOLLOWS}"],
        "lost": [f"{last} The run has probably stopped. {left_behind(view)}"],
        "failed": [left_behind(view), again],
        "cancelled": [cancelled, left_behind(view), again],
        "replaced": ["It never reported an end.", left_behind(view)],
        "done": [f"All {len(view.steps)} steps are done. You can close this page."],
    }.get(kind, [])
    return [note for note in said if note]


def left_behind(view: View) -> str:
    """Whether what the pipeline may leave still exists, as a callback has said; never before step two."""
    thing = view.pipeline.leaves
    if not thing or step_of(view) is view.steps[0]:
        return ""
    article = "an" if thing[0].lower() in "aeiou" else "a"
    return {
        True: f"The {thing} still exists.",
        False: f"No {thing} is left.",
        None: f"We don't know whether {article} {thing} still exists.",
    }[view.attempt.server_left]


def needs_help(view: View) -> bool:
    """Whether to say whom a watcher may ask."""
    return not view.is_superseded and tone(view) in ("failed", "cancelled", "quiet", "lost")


def slow_at(view: View) -> float:
    """When the present step has become slow, in Unix seconds: then the page says why that may be."""
    attempt, step = view.attempt, step_of(view)
    if not attempt.rank and attempt.heard_at is None:
        return attempt.opened_at + view.settings.quiet_after
    usual = (attempt.usual or {}).get(step.id)
    began = step.started_at or attempt.heard_at or attempt.opened_at
    return began + (SLOW * usual[0] + 10 if usual else SLOW_STEP)


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
        words = {"replaced": "unfinished", "waiting": "waiting", "quiet": "no update", "lost": "no update"}
        return words.get(tone(view), STATES["active"] if view.attempt.rank else "waiting")
    unreached = step.state == "pending" and view.condition == "over"
    return "not reached" if unreached else STATES.get(step.state, step.state)


def tab_title(view: View) -> str:
    """The tab's title: how far, which agent."""
    return f"{in_short(view)} · {view.name}"


def spoken(view: View) -> str:
    """What a screen reader says when the state has changed."""
    said = headline(view).removesuffix(".") + "."
    return f"{said} {reason(view)}" if view.status == "failed" else said


def in_short(view: View) -> str:
    """How far, in a few words; the badge's text."""
    if known := SIGNS.get(tone(view)):
        return known[2]
    return f"Step {view.steps.index(step_of(view)) + 1} of {len(view.steps)}"


def colour(view: View) -> str:
    """The colour of the tab's icon and of the badge, without its #."""
    return SIGNS.get(tone(view), (BLUE,))[0]


def icon(view: View) -> Markup:
    """The tab's icon as the address of a picture: a colour and one sign."""
    colour, sign, _ = SIGNS.get(tone(view), (BLUE, str(view.steps.index(step_of(view)) + 1), ""))
    return Markup("data:image/svg+xml," + quote(ICON.format(colour, sign), safe=" =:/'"))  # noqa: S704 - ours


def report(view: View) -> str:
    """A few lines to send to whoever may help."""
    step, heard = step_of(view), view.attempt.last_signal_at
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
    return datetime.fromtimestamp(seconds, UTC).strftime("%d %b %Y, %H:%M UTC")


def clock(view: View, seconds: float) -> str:
    """A time of day in UTC, with its date unless that is today's; the script makes it the reader's own."""
    text, today = moment(seconds), moment(view.now)
    return text[13:] if text[:11] == today[:11] else text


FOR_TEMPLATES = {
    word.__name__: word
    for word in (
        clock, colour, duration, headline, icon, in_short, moment, needs_help, notes, reason, report, roughly,
        slow_at, spoken, state, step_of, tab_title, tone,
    )
}  # fmt: skip
