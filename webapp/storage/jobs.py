"""The reads, by name: jobs with their attempts and callbacks, and what is usual."""

from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic, time
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    bindparam,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from webapp.rules import forecast
from webapp.rules.attempt import Attempt
from webapp.rules.pipeline import BUILT_IN, Pipeline, from_content, load
from webapp.rules.report import JOB_ID
from webapp.rules.silence import Clock, clock
from webapp.storage.tables import (
    STATE,
    attempt_from,
    attempts,
    callbacks,
    closures,
    definitions,
    departed,
    jobs,
)

UNFINISHED = ("queued", "provisioning")  # statuses
MOST_COUNTED = 999
FRESH_FOR = 2.0  # seconds for which what is usual, and when the door was shut, is not read again

Usual = forecast.Usual
_usual: WeakKeyDictionary[Engine, dict[str, tuple[float, Usual | None]]] = WeakKeyDictionary()
_closures: WeakKeyDictionary[Engine, tuple[float, list[tuple[float, float]]]] = WeakKeyDictionary()
started_at: float | None = None  # when the server of this process started
_built_in = load(None)[BUILT_IN]
_pipelines: dict[str, Pipeline] = {}  # by hash; a definition never changes


@dataclass(frozen=True)
class Wanted:
    """Which jobs a list is to show; None and "" leave it open. Times are Unix seconds."""

    clock: Clock
    status: str | None = None
    condition: str | None = None
    agent_id: str | None = None
    pipeline: str | None = None
    run_id: str | None = None
    since: float | None = None
    begins: str | None = None  # of the job's or the agent's id; or the id of a run

    def filters(self) -> Iterator[ColumnElement[bool]]:
        """The same in SQL."""
        for column in (jobs.c.status, jobs.c.agent_id, jobs.c.pipeline):
            if value := getattr(self, column.name):
                yield column == value
        if self.condition:
            yield is_in(self.condition, self.clock)
        if self.run_id:
            yield _of_run(self.run_id)
        if self.since is not None:
            yield jobs.c.created_at >= self.since
        if prefix := self.begins:
            ids = (jobs.c.job_id, jobs.c.agent_id)
            found = [(id >= prefix) & (id < prefix + "\uffff") for id in ids]
            yield or_(*found, _of_run(prefix.lstrip("0") or "0")) if prefix.isdecimal() else or_(*found)


def _of_run(run_id: str) -> ColumnElement[bool]:
    return jobs.c.job_id.in_(select(attempts.c.job_id).where(attempts.c.run_id == run_id))


class BadMark(ValueError):
    """A `before` that names no page."""


def pipeline_of(connection: Connection | None, hash: str | None) -> Pipeline:
    """The definition with this hash, from the process's memory where it is there; None: the built-in one."""
    if hash is None:
        return _built_in
    known = _pipelines.get(hash)
    if known is None and connection is not None:
        content = connection.execute(
            select(definitions.c.content).where(definitions.c.hash == hash)
        ).scalar_one()
        known = _pipelines[hash] = from_content(content)
    if known is None:
        raise LookupError(hash)
    return known


def remember(pipeline: Pipeline) -> None:
    """Keep a definition in the process's memory."""
    _pipelines[pipeline.hash] = pipeline


def current_attempts() -> Select[Any]:
    """Select each job's current attempt (the columns STATE), and the job's own columns after it."""
    return select(*STATE, *jobs.c).join(
        jobs, (jobs.c.job_id == attempts.c.job_id) & (jobs.c.attempt == attempts.c.number)
    )


CURRENT = current_attempts().where(jobs.c.job_id.in_(bindparam("ids", expanding=True)))
_FIND = current_attempts().where(jobs.c.job_id == bindparam("id"))


def find(connection: Connection, job_id: str) -> Row[Any] | None:
    """The row of `current_attempts()` of one job, or None."""
    return connection.execute(_FIND, {"id": job_id}).one_or_none()


def find_attempt(connection: Connection, job_id: str, number: int) -> Attempt | None:
    """One attempt of a job, or None."""
    which = select(*STATE).where(attempts.c.job_id == job_id, attempts.c.number == number)
    row = connection.execute(which).one_or_none()
    return attempt_from(row) if row else None


def attempts_of(connection: Connection, job_id: str) -> list[Attempt]:
    """All attempts of a job, oldest first, those that were never opened (below 1) included."""
    rows = connection.execute(select(*STATE).where(attempts.c.job_id == job_id).order_by(attempts.c.number))
    return [attempt_from(row) for row in rows]


def link_of(connection: Connection, job_id: str) -> int | None:
    """How many links of a job were revoked, None for an unknown job."""
    return connection.execute(select(jobs.c.link).where(jobs.c.job_id == job_id)).scalar()


def is_empty(connection: Connection) -> bool:
    """Whether there is no job at all."""
    return connection.execute(select(jobs.c.job_id).limit(1)).scalar() is None


def known_jobs(connection: Connection, job_ids: Iterable[str]) -> set[str]:
    """Those of the jobs that exist, their rows locked until the transaction ends (SQLite: the file is)."""
    ids = sorted(job_ids)
    rows = connection.execute(
        select(jobs.c.job_id).where(jobs.c.job_id.in_(ids)).order_by(jobs.c.job_id).with_for_update()
    )
    return {row.job_id for row in rows}


def jobs_of_run(connection: Connection, run_id: str) -> list[str]:
    """The ids of the jobs that have an attempt of this workflow run."""
    found = select(attempts.c.job_id).where(attempts.c.run_id == run_id)
    return sorted(set(connection.execute(found).scalars()))


def unfinished_of_agent(connection: Connection, agent_id: str, but: str) -> list[Attempt]:
    """The current attempts of the agent's jobs that are not over, but of one job."""
    found = current_attempts().where(
        jobs.c.agent_id == agent_id, jobs.c.status.in_(UNFINISHED), jobs.c.job_id != but
    )
    return [attempt_from(row) for row in connection.execute(found)]


def newest_jobs(
    connection: Connection, limit: int, before: str | None = None, wanted: Wanted | None = None
) -> tuple[list[Row[Any]], str | None]:
    """A page of `current_attempts()`, newest job first, and the mark of the next page, None on the last.

    Raises BadMark.
    """
    key = (jobs.c.created_at, jobs.c.job_id)
    found = current_attempts().where(*(wanted.filters() if wanted else ()))
    if before:
        found = found.where(tuple_(*key) < tuple_(*_marked(before)))
    rows = connection.execute(found.order_by(*(column.desc() for column in key)).limit(limit + 1)).all()
    return list(rows[:limit]), _mark(rows[limit - 1].created_at, rows[limit - 1].job_id) if len(
        rows
    ) > limit else None


def callbacks_of(
    connection: Connection,
    job_id: str,
    limit: int,
    before: str | None = None,
    *which: ColumnElement[bool],
) -> tuple[list[Row[Any]], str | None]:
    """A page of a job's callbacks, newest first, and the mark of the next page. Raises BadMark."""
    key = (callbacks.c.arrived_at, callbacks.c.id)
    found = select(callbacks).where(callbacks.c.job_id == job_id, *which)
    if before:
        at, id = _marked(before)
        if not id.isdecimal() or len(id) > 18:
            raise BadMark
        found = found.where(tuple_(*key) < tuple_(literal(at), literal(int(id))))
    rows = connection.execute(found.order_by(*(column.desc() for column in key)).limit(limit + 1)).all()
    return list(rows[:limit]), _mark(rows[limit - 1].arrived_at, str(rows[limit - 1].id)) if len(
        rows
    ) > limit else None


def _mark(at: float, id: str) -> str:
    return urlsafe_b64encode(f"{at!r} {id}".encode()).decode()


def _marked(mark: str) -> tuple[float, str]:
    try:
        at, id = b64decode(mark, b"-_", validate=True).decode().split(" ")
        if not JOB_ID.fullmatch(id):
            raise BadMark
        return float(at), id
    except ValueError:
        raise BadMark from None


def is_in(condition: str, clock: Clock) -> ColumnElement[bool]:
    """`progress.condition` in SQL; the unfinished attempts have an index by their last sign of life."""
    if condition == "over":
        return attempts.c.end.is_not(None)
    waits, heard_at = attempts.c.waiting_for.is_not(None), attempts.c.heard_at
    which = {
        "waiting": waits,
        "live": ~waits & or_(heard_at.is_(None), heard_at >= clock.quiet_before),
        "quiet": ~waits & (heard_at < clock.quiet_before) & (heard_at >= clock.lost_before),
        "lost": ~waits & (heard_at < clock.lost_before),
    }
    return attempts.c.end.is_(None) & jobs.c.status.in_(UNFINISHED) & which[condition]


def count(connection: Connection, wanted: Wanted) -> int:
    """How many jobs are so, counted up to one more than MOST_COUNTED."""
    some = current_attempts().with_only_columns(attempts.c.job_id).where(*wanted.filters())
    some = some.limit(MOST_COUNTED + 1)
    return connection.execute(select(func.count()).select_from(some.subquery())).scalar_one()


def count_all(connection: Connection, which: ColumnElement[bool]) -> int:
    """How many jobs are so, all of them counted."""
    found = current_attempts().with_only_columns(func.count(), maintain_column_froms=True).where(which)
    return connection.execute(found).scalar_one()


_CHANGES = union_all(
    select(attempts.c.job_id, attempts.c.change).where(attempts.c.change > bindparam("change")),
    select(departed.c.job_id, departed.c.change).where(departed.c.change > bindparam("change")),
)
_NEWEST = [
    select(table.c.change).order_by(table.c.change.desc()).limit(1).scalar_subquery()
    for table in (attempts, departed)
]
_NEWEST_CHANGE = select(*(func.coalesce(newest, 0) for newest in _NEWEST))


def newest_change(connection: Connection) -> int:
    """The number of the last change; each change of what is shown takes the next one."""
    return int(max(connection.execute(_NEWEST_CHANGE).one()))


def changes_since(connection: Connection, change: int) -> dict[str, int]:
    """The jobs that changed after that number, departed ones too, and the newest number of each."""
    found: dict[str, int] = {}
    for job_id, number in connection.execute(_CHANGES, {"change": change}):
        found[job_id] = max(number, found.get(job_id, 0))
    return found


_NUMBERS = CURRENT.with_only_columns(attempts.c.job_id, attempts.c.change)


def numbers_of(connection: Connection, job_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last change of each of these jobs that exists."""
    return {row.job_id: row.change for row in connection.execute(_NUMBERS, {"ids": [*job_ids]})}


def usual(connection: Connection, pipeline: str) -> Usual | None:
    """What an attempt of this pipeline may be measured by; costs nothing when asked again at once."""
    known = _usual.setdefault(connection.engine, {})
    learnt_at, learnt = known.get(pipeline, (0.0, None))
    if learnt is None or monotonic() - learnt_at >= FRESH_FOR:  # with nothing to tell there is little to read
        newest = select(*STATE).where(attempts.c.pipeline == pipeline, attempts.c.end == "running")
        newest = newest.order_by(attempts.c.ended_at.desc()).limit(forecast.NEWEST)
        finished = [attempt_from(row) for row in connection.execute(newest)]
        learnt = forecast.learn((each, pipeline_of(connection, each.definition)) for each in finished)
        known[pipeline] = monotonic(), learnt
    return learnt


def newest_arrival(connection: Connection, until: float) -> float | None:
    """The time of the newest callback that arrived until then; they are stored a little out of order."""
    known = select(callbacks.c.arrived_at).where(callbacks.c.arrived_at <= until)
    newest = known.order_by(callbacks.c.id.desc()).limit(100).subquery()
    return connection.execute(select(func.max(newest.c.arrived_at))).scalar()


def clock_now(connection: Connection | None, engine: Engine, quiet_after: float, lost_after: float) -> Clock:
    """The clock of silence; when the door was shut is read anew where there is a connection to read by."""
    read_at, shut = _closures.get(engine, (float("-inf"), []))
    if connection is not None and monotonic() - read_at >= FRESH_FOR:
        rows = connection.execute(select(closures.c.since, closures.c.until))
        shut = [(row.since, row.until) for row in rows]
        if started_at is not None and all(until != started_at for _, until in shut):  # not yet recorded
            shut.append((newest_arrival(connection, started_at) or started_at, started_at))
        _closures[engine] = monotonic(), shut
    return clock(time(), quiet_after, lost_after, shut)
