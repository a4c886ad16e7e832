"""How long it usually takes: learnt from this installation's own finished jobs, never guessed.

Times are seconds, moments Unix seconds.
"""

from collections import defaultdict
from collections.abc import Iterable
from statistics import median, quantiles

from webapp.rules.attempt import Attempt
from webapp.rules.pipeline import Pipeline
from webapp.rules.progress import steps

LEAST = 5  # finished jobs, before anything is claimed
NEWEST = 100  # finished jobs: what is usual may change

WHOLE = "*"  # in place of a step id: no step can have it
# By step id: the median of the step; then the 10th and 90th percentile of the time from its begin to the
# end of the job. WHOLE has the same for the whole job.
Usual = dict[str, list[float]]


def learn(finished: Iterable[tuple[Attempt, Pipeline]]) -> Usual | None:
    """What is usual, of each step and of the whole, wherever at least LEAST are known."""
    took: dict[str, list[float]] = defaultdict(list)
    rest: dict[str, list[float]] = defaultdict(list)
    for attempt, pipeline in finished:
        spans = [(step.id, step.started_at, step.finished_at) for step in steps(attempt, pipeline)]
        for name, start, end in [*spans, (WHOLE, attempt.opened_at, attempt.ended_at)]:
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
