"""The rules of progress: what a report does to an attempt, and what a watcher then sees.

Pure functions over plain values; no database, no clock of its own. Times are Unix seconds.
"""

from collections.abc import Sequence
from math import floor

from webapp.rules.attempt import WAITS_FOR, Attempt, Report, Run, Step, Word
from webapp.rules.pipeline import ENDS, Pipeline


def place(attempts: Sequence[Attempt], run: Run | None, sent_at: float | None, opened_at: float) -> Attempt:
    """The attempt that a run belongs to: one of these (oldest first), or a new one.

    A new one has the next number; that of a run older than all that are known has a number below 1 and is
    shown to nobody. `sent_at` is when the run says that it was under way.
    """
    current = attempts[-1]
    if run is None or run == current.run:
        return current
    for attempt in attempts:
        if attempt.run == run:
            return attempt
    if _is_older(run, sent_at, attempts):
        return _open(current, run, opened_at, min(attempts[0].number, 1) - 1)
    if current.run is None and current.end in (None, "closed"):
        return current._replace(run_id=run.id, run_attempt=run.attempt)
    return _open(current, run, opened_at, current.number + 1)


def _is_older(run: Run, sent_at: float | None, attempts: Sequence[Attempt]) -> bool:
    """Whether a run that nobody has named yet began before the newest one that was named."""
    named = [attempt.run for attempt in attempts if attempt.run]
    if not named:
        return False
    if any(other.id == run.id and other.age > run.age for other in named):
        return True
    if run.attempt == "1":
        return any(run.age[0] < other.age[0] for other in named)
    newest = next(attempt for attempt in reversed(attempts) if attempt.run)
    if newest.run is None or newest.run.id == run.id:
        return False
    since = attempts[-1].first_sent_at or newest.first_sent_at
    if sent_at is not None and since is not None:
        return sent_at < since
    return run.age < newest.run.age


def _open(current: Attempt, run: Run, opened_at: float, number: int) -> Attempt:
    """An attempt of the same job from the start."""
    return Attempt(
        current.job_id,
        number,
        opened_at,
        current.pipeline,
        subject=current.subject,
        run_id=run.id,
        run_attempt=run.attempt,
    )


def is_stale(attempt: Attempt, report: Report) -> bool:
    """Whether this is a heartbeat that is no newer than one already heard: a replay."""
    return (
        report.milestone is None
        and report.sent_at is not None
        and attempt.heartbeat_sent_at is not None
        and report.sent_at <= attempt.heartbeat_sent_at
    )


def receive(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """The attempt after a report that it had not received before."""
    if attempt.end == "closed":
        attempt = attempt._replace(end=None, ended_at=None, failed_step=None)
    if report.sent_at is not None:
        attempt = attempt._replace(first_sent_at=min(attempt.first_sent_at or report.sent_at, report.sent_at))
    if report.milestone is None:
        if report.sent_at is not None:
            attempt = attempt._replace(heartbeat_sent_at=report.sent_at)
        return attempt if attempt.end else _heard(attempt, report)
    is_end = report.milestone in ENDS
    if not attempt.end:
        attempt = _heard(_timed(attempt, report, pipeline), report)
        return _ended(attempt, report) if is_end else attempt
    if not is_end:
        return _timed(attempt, report, pipeline)
    if attempt.end not in ("refused", report.milestone):
        attempt = attempt._replace(contradicted=True)
    if _is_newer(report, attempt):
        return _ended(_heard(_timed(attempt, report, pipeline), report), report)
    return attempt


def testify(attempt: Attempt, word: Word, pipeline: Pipeline) -> Attempt:
    """The attempt after GitHub's own word of its run, which ends what callbacks left open and no more."""
    was_final = (attempt.run_state or "").startswith("completed:")
    if not word.end and (was_final or word.at < (attempt.run_state_at or 0)):
        return attempt
    attempt = attempt._replace(
        run_state=word.state,
        run_state_at=word.at,
        run_url=word.url or attempt.run_url,
        repository=attempt.repository or word.repository,
    )
    if attempt.end:
        return attempt
    if word.end:
        times = attempt.times
        if word.end == "running":
            attempt = attempt._replace(rank=len(pipeline.steps), times={**times, "running": word.at})
        return attempt._replace(
            end=word.end,
            ended_at=word.at,
            failed_step=word.failed_step,
            error=word.error,
            note=None,
            waiting_for=None,
        )
    attempt = attempt._replace(waiting_for=WAITS_FOR.get(word.state) if _is_news(attempt, word) else None)
    if word.state == "in_progress":
        return attempt._replace(last_signal_at=word.arrived_at, heard_at=word.arrived_at)
    return attempt


def _is_news(attempt: Attempt, word: Word) -> bool:
    """Whether a word is no older than the last callback; GitHub's times are whole seconds.

    Within one second an approval follows a callback, but a run that has sent one waits for no runner.
    """
    since = attempt.last_callback_at or 0
    return word.at >= (floor(since) if word.state in ("waiting", "pending") else since)


def close(attempt: Attempt, now: float) -> Attempt:
    """The attempt after the operator gave it up."""
    return attempt._replace(end="closed", ended_at=now, failed_step="cancelled", waiting_for=None)


def _timed(attempt: Attempt, report: Report, pipeline: Pipeline) -> Attempt:
    """Fill in the milestone's time; move the rank unless the attempt has ended."""
    milestone = report.milestone or ""
    if milestone not in pipeline.ranks:
        return attempt
    rank = max(attempt.rank, pipeline.ranks[milestone])
    if attempt.end and milestone != "running":
        rank = attempt.rank
    return attempt._replace(
        rank=rank,
        times={**attempt.times, milestone: report.at},
        note=None if not attempt.end else attempt.note,
    )


def _heard(attempt: Attempt, report: Report) -> Attempt:
    """A sign of life, and what it says of the run and the server."""
    return attempt._replace(
        last_callback_at=report.arrived_at,
        last_signal_at=report.arrived_at,
        heard_at=report.arrived_at,
        waiting_for=None,
        subject=report.subject or attempt.subject,
        note=report.note or attempt.note,
        repository=report.repository or attempt.repository,
        server_id=report.server_id or attempt.server_id,
        server_ip=report.server_ip or attempt.server_ip,
        tailscale_ip=report.tailscale_ip or attempt.tailscale_ip,
    )


def _ended(attempt: Attempt, report: Report) -> Attempt:
    failed = report.milestone == "failed"
    return attempt._replace(
        end=report.milestone,
        ended_at=report.at,
        end_sent_at=report.sent_at,
        note=report.note,
        failed_step=report.failed_step if failed else None,
        error=report.error if failed else None,
        server_left=report.server_left if failed else None,
        result_url=None if failed else report.result_url,
    )


def _is_newer(report: Report, attempt: Attempt) -> bool:
    """Between two ends: by `sent_at` where both have it, else by arrival."""
    if report.sent_at is None or attempt.end_sent_at is None:
        return True
    return report.sent_at >= attempt.end_sent_at


def steps(attempt: Attempt, pipeline: Pipeline) -> list[Step]:
    """The steps, in order; the time of a lost milestone is not known."""
    at, state, count = attempt.rank, "active", len(pipeline.steps)
    if attempt.status == "failed":
        state = "cancelled" if attempt.was_cancelled else "error"
        at = 0 if attempt.end == "refused" else pipeline.failed_at(attempt.failed_step or "", attempt.rank)
        if attempt.end == "closed":
            at = min(attempt.rank, count - 1)
    reached = [attempt.opened_at, *(_reached(attempt, pipeline, rank) for rank in range(1, count + 1))]
    left = [*reached[1 : at + 1], attempt.ended_at, *[None] * count]
    return [
        Step(
            step.id,
            step.label,
            "completed" if i < at else state if i == at else "pending",
            reached[i],
            left[i],
        )
        for i, step in enumerate(pipeline.steps)
    ]


def _reached(attempt: Attempt, pipeline: Pipeline, rank: int) -> float | None:
    """When the first milestone of this rank was reported; None where it was lost."""
    return min((t for m, t in attempt.times.items() if pipeline.ranks.get(m) == rank), default=None)
