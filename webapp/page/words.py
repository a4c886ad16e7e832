"""What a watcher reads: a sentence for every step, state and trouble. Pure functions of the View."""

from datetime import UTC, datetime

from webapp.page.view import View
from webapp.rules import pipeline
from webapp.rules.attempt import Step

STATES = {
    "pending": "to come",
    "active": "in progress",
    "completed": "done",
    "error": "failed",
    "cancelled": "cancelled",
}
NO_SERVER = "No server was created."
DELETES = "When a run ends so, the workflow deletes its server; what it could not delete is named below."
MAYBE_SERVER = "If the run has died, a server that it had created may still exist and cost money."
GOES_ON = "The page goes on listening, and follows a new attempt by itself."
AGAIN = "Nothing more happens by itself. Once it is started again, this page follows by itself."


def step_of(view: View) -> Step:
    """The step that the view is about: the active or broken one, or the last."""
    return next((step for step in view.steps if step.state not in ("completed", "pending")), view.steps[-1])


def definition_of(view: View) -> pipeline.Step:
    """The words of that step."""
    return view.pipeline.steps[view.steps.index(step_of(view))]


def trouble(view: View) -> str | None:
    """What stands in the way: `failed`, `cancelled`, `lost`, `quiet`, or None."""
    if view.attempt.was_cancelled:
        return "cancelled"
    if view.status == "failed":
        return "failed"
    return view.condition if view.condition in ("quiet", "lost") else None


def headline(view: View) -> str:
    """What is happening now, and whether it moves, in one sentence."""
    step, kind = definition_of(view), trouble(view)
    if kind == "cancelled":
        return "The run was stopped at its time limit." if timed_out(view) else "The run was cancelled."
    if kind == "failed":
        return f"{step.went_wrong or step.label + ' failed'}."
    if view.status == "running":
        return f"{view.pipeline.done or 'Done'}."
    if view.is_superseded:
        return f"This attempt ended without a word; attempt {view.newest} took its place."
    if kind:
        return (
            f"{step.now or step.label}, but {'contact is lost' if kind == 'lost' else 'it has gone quiet'}."
        )
    return f"{step.now or step.label}, and it moves." if view.attempt.rank else f"{step.now or step.label}."


def timed_out(view: View) -> bool:
    """Whether the run was cancelled by its time limit."""
    return view.attempt.failed_step == "timed_out"


def notes(view: View) -> list[str]:
    """What that means, whether a server was left behind, and what happens next."""
    kind = trouble(view)
    if kind == "quiet":
        silence = duration(view.settings.quiet_after)
        return [
            f"No sign of life for more than {silence}. The run may be slow, or its runner has no network.",
            f"The page goes on listening; often it just comes back. {MAYBE_SERVER}",
        ]
    if kind == "lost":
        silence = duration(view.settings.lost_after)
        return [
            f"Nothing was heard for more than {silence}: the run has probably died.",
            MAYBE_SERVER,
            GOES_ON,
        ]
    if kind:
        why = ""
        if kind == "cancelled":
            why = "It took too long" if timed_out(view) else "Cancelled is not failed"
            why += ": nothing is known to be broken."
        server = NO_SERVER if view.attempt.end == "refused" else DELETES
        return [note for note in (why, server, "" if view.is_superseded else AGAIN) if note]
    if view.status == "running":
        return ["All steps are done. You can close this page."]
    return [MAYBE_SERVER if view.is_superseded else definition_of(view).if_slow]


def state(view: View, step: Step) -> str:
    """A step's state as a watcher reads it."""
    if step.state == "cancelled" and timed_out(view):
        return "timed out"
    if step.state == "active":
        if view.is_superseded:
            return "unfinished"
        return {"quiet": "gone quiet", "lost": "contact lost"}.get(view.condition, STATES["active"])
    return "not reached" if step.state == "pending" and view.condition == "over" else STATES[step.state]


def tab_title(view: View) -> str:
    """The tab's title: how far, which agent."""
    return f"{in_short(view)} · {view.name}"


def in_short(view: View) -> str:
    """How far, in two words; the badge's text."""
    kind = trouble(view)
    if kind or view.status == "running":
        return (kind or "done").capitalize()
    return f"Step {_done(view) + 1} of {len(view.steps)}"


def _done(view: View) -> int:
    return sum(step.state == "completed" for step in view.steps)


def icon(view: View) -> str:
    """The tab's icon: a colour and one sign."""
    signs = {"failed": "b3261e ✕", "cancelled": "6b6b76 -", "quiet": "8a5a00 ?", "lost": "8a5a00 !"}
    if kind := trouble(view):
        return signs[kind]
    return "1a7f4b ✓" if view.status == "running" else f"2456c5 {_done(view)}"


def report(view: View) -> str:
    """A few lines to send to whoever may help."""
    step = step_of(view)
    lines = {
        "Job": view.job_id,
        "Agent": view.agent_id,
        "Attempt": view.attempt.number,
        "Step": f"{step.label}, {state(view, step)}",
        "Last sign of life": moment(view.attempt.last_signal_at) if view.attempt.last_signal_at else None,
        "Error": view.error,
        "Run": view.run_url,
    }
    return "\n".join(f"{name}: {value}" for name, value in lines.items() if value)


def duration(seconds: float) -> str:
    """Seconds in words: "58 s", "1 min 5 s", "1 h 4 min"."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole // 60 % 60} min"


def roughly(seconds: float) -> str:
    """A duration that claims no more than is known."""
    if seconds < 90:
        return f"{max(round(seconds / 10), 1) * 10} s"
    return duration(round(seconds / 60) * 60)


def moment(seconds: float) -> str:
    """A time of day in UTC, with its date."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%d %b %Y, %H:%M UTC")


FOR_TEMPLATES = {
    word.__name__: word
    for word in (
        duration, headline, icon, in_short, moment, notes, report, roughly, state,
        step_of, tab_title, trouble,
    )
}  # fmt: skip
