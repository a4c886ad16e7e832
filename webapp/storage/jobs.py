"""The reads, by name: jobs with their attempts and callbacks, how many there are, and what is usual."""

import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from time import monotonic, time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Row, RowMapping, Select, bindparam, func, or_, select

from webapp.config import Settings
from webapp.rules import progress
from webapp.rules.attempt import CONDITIONS, Attempt, Clock, clock
from webapp.rules.pipeline import BUILT_IN, Pipeline, from_content, load
from webapp.rules.report import JOB_ID, BadField
from webapp.storage.tables import attempts, callbacks, closures, definitions, departed, jobs

ROW_ID = re.compile("[0-9]{1,18}")
UNFINISHED = ("queued", "provisioning")  # statuses
MOST_COUNTED = 999  # jobs, of each kind that the list has a number for
# Seconds for which what is usual, and when the door was shut, is not read again: that takes 2 and 0.1 ms.
FRESH_FOR = 2.0

Page = tuple[list[Row[Any]], str | None]  # rows, and the mark of the next page, None on the last
started_at: float | None = None  # when the server of this process started
_usual: dict[str, tuple[float, progress.Usual | None]] = {}  # by pipeline, with the time of the reading
_shut: tuple[float, list[tuple[float, float]]] = float("-inf"), []  # when the door was, the same
# By hash, None for that of the built-in one; a definition never changes.
known_pipelines: dict[str | None, Pipeline] = {None: load(None)[BUILT_IN]}


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

    def filters(self, connection: Connection) -> Iterator[ColumnElement[bool]]:
        """The same in SQL."""
        for column in (jobs.c.status, jobs.c.agent_id, jobs.c.pipeline):
            if value := getattr(self, column.name):
                yield column == value
        if self.condition:
            yield is_in(self.condition, self.clock)
        if self.run_id:
            yield jobs.c.job_id.in_(_of_run(self.run_id).where(attempts.c.number > 0))
        if self.since is not None:
            yield jobs.c.created_at >= self.since
        if prefix := self.begins:
            ids = (jobs.c.job_id, jobs.c.agent_id)
            found: list[ColumnElement[bool]] = [(id >= prefix) & (id < prefix + "\uffff") for id in ids]
            # Read before: with a subquery in the OR, PostgreSQL would use no index for any of it.
            if prefix.isdecimal() and (of_run := jobs_of_run(connection, prefix.lstrip("0") or "0")):
                found.append(jobs.c.job_id.in_(of_run))
            yield or_(*found)


def pipeline_of(connection: Connection | None, hash: str | None) -> Pipeline:
    """The definition with this hash, from the process's memory where it is there; None: the built-in one."""
    if hash not in known_pipelines:
        if connection is None:
            raise LookupError(hash)
        found = select(definitions.c.content).where(definitions.c.hash == hash)
        known_pipelines[hash] = from_content(connection.execute(found).scalar_one())
    return known_pipelines[hash]


_IS_CURRENT = (jobs.c.job_id == attempts.c.job_id) & (jobs.c.attempt == attempts.c.number)


@cache  # made anew each time it took 2 to 5 % of the operator's list
def current_attempts() -> Select[Any]:
    """Select each job's current attempt, and the job's own columns after it."""
    return select(*attempts.c, *jobs.c).join(jobs, _IS_CURRENT)


def attempt_from(row: Row[Any]) -> Attempt:
    """The value of a row whose first columns are those of `attempts`."""
    return Attempt._make(row[: len(Attempt._fields)])


_GIVEN = jobs.c.job_id.in_(bindparam("ids", expanding=True))
CURRENT = current_attempts().where(_GIVEN)
_NEWEST = [
    func.coalesce(select(func.max(table.c.change)).scalar_subquery(), 0) for table in (attempts, departed)
]
_NEWEST_CHANGE = select(*_NEWEST)
# The same for a transaction that changes them, with the numbers of the newest changes, after which its own
# comes. PostgreSQL locks in the order of this FROM: who waits for a job must not hold an attempt of it.
LOCKED = select(*attempts.c, *jobs.c, *_NEWEST).select_from(jobs.join(attempts, _IS_CURRENT)).where(_GIVEN)
LOCKED = LOCKED.order_by(jobs.c.job_id).with_for_update()
_ONE = current_attempts().where(jobs.c.job_id == bindparam("id"))  # in a third less time than CURRENT


def find(connection: Connection, job_id: str) -> Row[Any] | None:
    """The row of `current_attempts()` of one job, or None."""
    return connection.execute(_ONE, {"id": job_id}).one_or_none()


def attempts_of(connection: Connection, job_id: str) -> list[Attempt]:
    """All attempts of a job, oldest first, those that were never opened (below 1) included."""
    found = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
    return [attempt_from(row) for row in connection.execute(found)]


def jobs_of_run(connection: Connection, run_id: str) -> list[str]:
    """The ids of the jobs that have an attempt of this workflow run."""
    return sorted(set(connection.execute(_of_run(run_id)).scalars()))


def _of_run(run_id: str) -> Select[Any]:
    return select(attempts.c.job_id).where(attempts.c.run_id == run_id)


def newest_jobs(
    connection: Connection, limit: int, before: str | None = None, wanted: Wanted | None = None
) -> Page:
    """A page of `current_attempts()`, newest job first. Raises BadField."""
    found = current_attempts().where(*(wanted.filters(connection) if wanted else ()))
    return _page(connection, found, (jobs.c.created_at, jobs.c.job_id), limit, before)


def callbacks_of(
    connection: Connection, job_id: str, limit: int, before: str | None = None, *which: ColumnElement[bool]
) -> Page:
    """A page of a job's callbacks, newest first. Raises BadField."""
    found = select(callbacks).where(callbacks.c.job_id == job_id, *which)
    return _page(connection, found, (callbacks.c.arrived_at, callbacks.c.id), limit, before)


def _page(
    connection: Connection, found: Select[Any], key: tuple[Any, Any], limit: int, before: str | None
) -> Page:
    """The rows after the mark `before`, the newest first by `key`: a time and an id."""
    at, id = key
    if before:
        found = found.where(sa.tuple_(at, id) < sa.tuple_(*_marked(before, id.type.python_type)))
    rows = list(connection.execute(found.order_by(at.desc(), id.desc()).limit(limit + 1)))
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    mark = f"{getattr(last, at.name)!r} {getattr(last, id.name)}"
    return rows[:limit], urlsafe_b64encode(mark.encode()).decode()


def _marked(mark: str, kind: type[str] | type[int]) -> tuple[ColumnElement[Any], ColumnElement[Any]]:
    with suppress(ValueError):
        at, id = b64decode(mark, b"-_", validate=True).decode().split(" ")
        if (JOB_ID if kind is str else ROW_ID).fullmatch(id):
            return sa.literal(float(at)), sa.literal(kind(id))
    raise BadField("before: not the mark of a page")


# As literals: a list of parameters is put into the statement anew each time, 4 to 6 % of the list.
_IS_UNFINISHED = attempts.c.end.is_(None) & jobs.c.status.in_([sa.literal(status) for status in UNFINISHED])
_UNFINISHED_JOBS = current_attempts().where(_IS_UNFINISHED)


def is_in(condition: str, clock: Clock) -> ColumnElement[bool]:
    """`Attempt.condition` in SQL; the unfinished attempts have an index by their last sign of life."""
    if condition == "over":
        return attempts.c.end.is_not(None)
    waits, heard_at = attempts.c.waiting_for.is_not(None), attempts.c.heard_at
    which = {
        "waiting": waits,
        "live": ~waits & or_(heard_at.is_(None), heard_at >= clock.quiet_before),
        "quiet": ~waits & (heard_at < clock.quiet_before) & (heard_at >= clock.lost_before),
        "lost": ~waits & (heard_at < clock.lost_before),
    }
    # With the status, too, SQLite would look for these two at all that are unfinished.
    is_rare = condition in ("quiet", "lost")
    return (attempts.c.end.is_(None) if is_rare else _IS_UNFINISHED) & which[condition]


def count(connection: Connection, *which: ColumnElement[bool]) -> int:
    """How many jobs are so."""
    return connection.execute(current_attempts().with_only_columns(func.count()).where(*which)).scalar_one()


# One statement, made once, that looks at each unfinished job once: six took a quarter of the operator's list.
ANY_CLOCK = Clock._make(map(bindparam, Clock._fields))
_ENDED = {name: select(jobs.c.job_id).where(jobs.c.status == name) for name in ("failed", "running")}
_SOME = {name: found.limit(MOST_COUNTED + 1).subquery() for name, found in _ENDED.items()}
_COUNTS = _UNFINISHED_JOBS.with_only_columns(
    *(func.count().filter(is_in(name, ANY_CLOCK)).label(name) for name in CONDITIONS if name != "over"),
    *(select(func.count()).select_from(some).label(name) for name, some in _SOME.items()),
)


def counts(connection: Connection, clock: Clock) -> RowMapping:
    """How many jobs are in each condition but "over"; "failed" and "running" up to MOST_COUNTED + 1."""
    return connection.execute(_COUNTS, clock._asdict()).mappings().one()


def jobs_by_state(connection: Connection, clock: Clock) -> Iterator[tuple[str, str, str, int]]:
    """(pipeline, status, condition, how many); only the unfinished jobs need their attempts looked at."""
    kind, number = (jobs.c.pipeline, jobs.c.status), func.count().label("number")
    for row in connection.execute(select(*kind, number).group_by(*kind)):
        if row.status not in UNFINISHED:
            yield row.pipeline, row.status, "over", row.number
    which = sa.case(*((is_in(name, clock), name) for name in CONDITIONS)).label("condition")
    counted = _UNFINISHED_JOBS.with_only_columns(*kind, which, number).group_by(*kind, which)
    for row in connection.execute(counted):
        yield row.pipeline, row.status, row.condition, row.number


def stored_callbacks(connection: Connection) -> tuple[int, float | None]:
    """How many there are, and when the newest arrived."""
    newest = select(callbacks.c.arrived_at).order_by(callbacks.c.id.desc()).limit(1)
    count = connection.execute(select(func.count()).select_from(callbacks)).scalar_one()
    return count, connection.execute(newest).scalar()


_CHANGES = sa.union_all(
    select(attempts.c.job_id, attempts.c.change).where(attempts.c.change > bindparam("change")),
    select(departed.c.job_id, departed.c.change).where(departed.c.change > bindparam("change")),
)
_NUMBERS = CURRENT.with_only_columns(attempts.c.job_id, attempts.c.change)


def newest_change(connection: Connection) -> int:
    """The number of the last change; each change of what is shown takes the next one."""
    return int(max(connection.execute(_NEWEST_CHANGE).one()))


def changes_since(connection: Connection, change: int) -> dict[str, int]:
    """The jobs that changed after that number, departed ones too, and the newest number of each."""
    rows = connection.execute(_CHANGES, {"change": change})
    return {row.job_id: row.change for row in sorted(rows, key=lambda row: row.change)}


def numbers_of(connection: Connection, job_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last change of each of these jobs that exists."""
    return {row.job_id: row.change for row in connection.execute(_NUMBERS, {"ids": [*job_ids]})}


def usual(connection: Connection, pipeline: str) -> progress.Usual | None:
    """What an attempt of this pipeline may be measured by; costs nothing when asked again at once."""
    learnt_at, learnt = _usual.get(pipeline, (0.0, None))
    if learnt is None or monotonic() - learnt_at >= FRESH_FOR:  # with nothing to tell there is little to read
        newest = select(attempts).where(attempts.c.pipeline == pipeline, attempts.c.end == "running")
        newest = newest.order_by(attempts.c.ended_at.desc()).limit(progress.NEWEST)
        finished = [attempt_from(row) for row in connection.execute(newest)]
        learnt = progress.learn((each, pipeline_of(connection, each.definition)) for each in finished)
        _usual[pipeline] = monotonic(), learnt
    return learnt


def newest_arrival(connection: Connection, until: float) -> float | None:
    """The time of the newest callback that arrived until then; they are stored a little out of order."""
    known = select(callbacks.c.arrived_at).where(callbacks.c.arrived_at <= until)
    newest = known.order_by(callbacks.c.id.desc()).limit(100).subquery()
    return connection.execute(select(func.max(newest.c.arrived_at))).scalar()


def clock_now(connection: Connection | None, settings: Settings) -> Clock:
    """The clock of silence; when the door was shut is read anew where there is a connection to read by."""
    global _shut
    read_at, shut = _shut
    if connection is not None and monotonic() - read_at >= FRESH_FOR:
        rows = connection.execute(select(closures.c.since, closures.c.until))
        shut = [(row.since, row.until) for row in rows]
        if started_at is not None and all(until != started_at for _, until in shut):  # not yet recorded
            shut.append((newest_arrival(connection, started_at) or started_at, started_at))
        _shut = monotonic(), shut
    return clock(time(), settings.quiet_after, settings.lost_after, shut)
