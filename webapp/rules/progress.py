"""What a report does to an attempt; the steps that a watcher then sees; how long they usually take.

That is learnt from this installation's own finished jobs, never guessed. Times are Unix seconds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import floor
from operator import itemgetter
from statistics import median, quantiles
from typing import Any

from webapp.rules.attempt import WAITS_FOR, Attempt, Report, Run, Step, Word
from webapp.rules.pipeline import ENDS, Pipeline

LEAST, NEWEST = 5, 100  # finished jobs, before anything is claimed; of which it is learnt
# In seconds, by step id: the median of the step; then the 10th and 90th percentile of the time from its begin
# to the end of the job. "*", which no step can be called, has the same for the whole job.
Usual = dict[str, list[float]]
# What an end leaves nothing of, unless it says so itself
NO_END: dict[str, Any] = dict.fromkeys(("failed_step", "error", "server_left", "result_url", "note"))


def place(attempts: Sequence[Attempt], run: Run | None, sent_at: float | None, opened_at: float) -> Attempt:
    """The attempt that a run belongs to: one of these (oldest first), or a new one.

    A new one has the next number; that of a run older than all that are known has a number below 1 and is
    shown to nobody. `sent_at` is when the run says that it was under way.
    """
    current = attempts[-1]
    if run is None:
        return current
    for attempt in reversed(attempts):
        if attempt.run == run:
            return attempt
    number = current.number + 1
    if _is_older(run, sent_at, attempts):
        number = min(attempts[0].number, 1) - 1
    elif current.run is None and current.end in (None, "closed"):
        return current._replace(run_id=run.id, run_attempt=run.attempt)
    opened = Attempt(current.job_id, number, opened_at, current.pipeline, subject=current.subject)
    return opened._replace(run_id=run.id, run_attempt=run.attempt)


def _is_older(run: Run, sent_at: float | None, attempts: Sequence[Attempt]) -> bool:
    """Whether a run that nobody has named yet began before the newest one that was named."""
    named = [(other, attempt.first_sent_at) for attempt in attempts if (other := attempt.run)]
    if any(other.id == run.id and other.age > run.age for other, _ in named):
        return True
    if run.attempt == "1":
        return any(run.age[0] < other.age[0] for other, _ in named)
    if not named or named[-1][0].id == run.id:
        return False
    newest, first_sent_at = named[-1]
    since = attempts[-1].first_sent_at or first_sent_at
    if sent_at is not None and since is not None:
        return sent_at < since
    return run.age < newest.age


def is_stale(attempt: Attempt, report: Report) -> bool:
    """Whether this is a heartbeat that is no newer than one already heard: a replay."""
    if report.milestone or report.sent_at is None or attempt.heartbeat_sent_at is None:
        return False
    return report.sent_at <= attempt.heartbeat_sent_at


def receive(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """The attempt after a report that it had not received before."""
    milestone, sent_at = report.milestone, report.sent_at
    if attempt.end == "closed":
        attempt = attempt._replace(end=None, ended_at=None, failed_step=None)
    if sent_at is not None:
        attempt = attempt._replace(first_sent_at=min(attempt.first_sent_at or sent_at, sent_at))
    if milestone is None:
        if sent_at is not None:
            attempt = attempt._replace(heartbeat_sent_at=sent_at)
        return attempt if attempt.end else _heard(attempt, report)
    if attempt.end:
        if milestone not in ENDS:
            return _timed(attempt, report, pipeline)
        if attempt.end not in ("refused", milestone):
            attempt = attempt._replace(contradicted=True)
        if sent_at is not None and sent_at < (attempt.end_sent_at or 0):
            return attempt  # of two ends the newer stands: by `sent_at` where both have it, else by arrival
    attempt = _timed(attempt, report, pipeline)
    if milestone in ENDS:
        attempt = attempt._replace(end=milestone, ended_at=report.at, end_sent_at=sent_at, **NO_END)
    return _heard(attempt, report)


def _timed(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """Fill in the milestone's time; move the rank, and let the note go, unless the attempt has ended."""
    milestone = report.milestone or ""
    if milestone not in pipeline.ranks:
        return attempt
    times = {**attempt.times, milestone: report.at}
    if attempt.end and milestone != "running":
        return attempt._replace(times=times)
    rank = max(attempt.rank, pipeline.ranks[milestone])
    note = attempt.note if _is_late(attempt, report) else None
    return attempt._replace(times=times, rank=rank, note=note)


def _is_late(attempt: Attempt, report: Report) -> bool:
    """Whether a newer milestone came first: then nothing that was said since is unsaid.

    Some clocks tell whole seconds.
    """
    return report.sent_at is not None and report.sent_at < floor(max(attempt.times.values(), default=0))


def _heard(attempt: Attempt, report: Report) -> Attempt:
    """A sign of life, and what it says of the run and the server."""
    at, said = report.arrived_at, report.said
    if _is_late(attempt, report):
        unsaid = {name for name in said if getattr(attempt, name) is None} - {"note"}
        said = {name: said[name] for name in unsaid}
    return attempt._replace(last_callback_at=at, last_signal_at=at, heard_at=at, waiting_for=None, **said)


def testify(attempt: Attempt, word: Word, pipeline: Pipeline) -> Attempt:
    """The attempt after GitHub's own word of its run, which ends what callbacks left open and no more."""
    was_final = (attempt.run_state or "").startswith("completed:")
    if not word.end and (was_final or word.at < (attempt.run_state_at or 0)):
        return attempt
    attempt = attempt._replace(run_state=word.state, run_state_at=word.at)
    url, repository = word.url or attempt.run_url, attempt.repository or word.repository
    attempt = attempt._replace(run_url=url, repository=repository)
    if attempt.end:
        return attempt
    if word.end:
        attempt = attempt._replace(end=word.end, ended_at=word.at, note=None, waiting_for=None)
        attempt = attempt._replace(failed_step=word.failed_step, error=word.error)
        if word.end == "running":
            times = {**attempt.times, "running": word.at}
            attempt = attempt._replace(rank=len(pipeline.steps), times=times)
        return attempt
    if word.state == "in_progress":
        attempt = attempt._replace(last_signal_at=word.arrived_at, heard_at=word.arrived_at)
    # No older than the last callback. GitHub's times are whole seconds: within one second an approval may
    # follow a callback, but a run that has sent one waits for no runner.
    since = attempt.last_callback_at or 0
    is_news = word.at >= (floor(since) if word.state in ("waiting", "pending") else since)
    return attempt._replace(waiting_for=WAITS_FOR.get(word.state) if is_news else None)


def close(attempt: Attempt, now: float) -> Attempt:
    """The attempt after the operator gave it up."""
    return attempt._replace(end="closed", ended_at=now, failed_step="cancelled", waiting_for=None)


def steps(attempt: Attempt, pipeline: Pipeline) -> list[Step]:
    """The steps, in order; the time of a lost milestone is not known."""
    at, state, count = attempt.rank, "active", len(pipeline.steps)
    if attempt.status == "running":  # also one of 0.1, which kept no steps, by a built-in file with more
        at = count
    if attempt.status == "failed":
        state = "cancelled" if attempt.was_cancelled else "error"
        failed_at = pipeline.failed_at(attempt.failed_step or "", at)
        at = {"refused": 0, "closed": min(at, count - 1)}.get(attempt.end or "", failed_at)
    reached: list[float | None] = [attempt.opened_at, *[None] * count]
    for milestone, time in sorted(attempt.times.items(), key=itemgetter(1), reverse=True):
        if rank := pipeline.ranks.get(milestone):
            reached[rank] = time  # the first of this rank, which comes last
    left = [*reached[1 : at + 1], attempt.ended_at, *[None] * count]
    states = ["completed"] * at + [state] + ["pending"] * count
    shown = zip(pipeline.steps, states, reached, left, strict=False)
    return [Step(step.id, step.label, state, began, ended) for step, state, began, ended in shown]


def learn(finished: Iterable[tuple[Attempt, Pipeline]]) -> Usual | None:
    """What is usual, of each step and of the whole, wherever at least LEAST are known."""
    took: dict[str, list[float]] = defaultdict(list)
    rest: dict[str, list[float]] = defaultdict(list)
    for attempt, pipeline in finished:
        spans = [(step.id, step.started_at, step.finished_at) for step in steps(attempt, pipeline)]
        for name, start, end in [*spans, ("*", attempt.opened_at, attempt.ended_at)]:
            if start is not None and end is not None and attempt.ended_at is not None:
                took[name].append(max(end - start, 0))
                rest[name].append(max(attempt.ended_at - start, 0))
    usual = {}
    for name in took:
        if len(took[name]) >= LEAST:
            tenths = quantiles(rest[name], n=10, method="inclusive")
            usual[name] = [round(number, 1) for number in (median(took[name]), tenths[0], tenths[-1])]
    return usual or None


def expect(attempt: Attempt, pipeline: Pipeline) -> Attempt:
    """The attempt with the moments between which it is usually done, by the times known now."""
    active = steps(attempt, pipeline)[min(attempt.rank, len(pipeline.steps) - 1)]
    known = (attempt.usual or {}).get(active.id)
    if attempt.end or known is None or active.started_at is None:
        return attempt._replace(expected_from=None, expected_to=None)
    _, soonest, latest = known
    return attempt._replace(expected_from=active.started_at + soonest, expected_to=active.started_at + latest)
