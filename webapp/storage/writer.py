"""The one writer of this process: concurrent callbacks are gathered, committed together, then told.

A greenlet that waits inside sqlite3 would freeze every stream, so on SQLite commits wait for the disk
in gevent's thread pool. One greenlet, there while anything waits, commits all that has gathered; a
commit costs as much as several callbacks, so after one that was shared the next waits a little, until
as many have come again: who posts at leisure, or alone, never waits.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic
from typing import Any, NamedTuple, TypeVar, cast

import gevent
from gevent import get_hub
from gevent.event import AsyncResult, Event
from gevent.monkey import is_module_patched
from sqlalchemy import Connection, Engine, RootTransaction, Row, Update, bindparam, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from webapp.rules.forecast import usual
from webapp.rules.progress import Attempt, Report, is_stale, place, receive
from webapp.storage import tables
from webapp.storage.database import writing
from webapp.storage.tables import attempts, callbacks, jobs

CHANNEL = "milepost"
GATHER_FOR = 0.02  # seconds; the longest wait for as many callbacks as shared the last commit
NOTIFICATION_JOBS = 80  # times an id of 64 and a version: below PostgreSQL's 8,000 bytes
# What no watcher is shown; the operator's page takes it in at its next look.
UNSEEN = ("heartbeat_sent_at", "contradicted", "version", "asked_at", "witness", "witnessed_at")

T = TypeVar("T")


class Change(NamedTuple):
    """A job has another version; where they are at hand, its columns and its current attempt as it is now."""

    version: int
    job: Row[Any] | None = None
    attempt: Attempt | None = None


Changes = dict[str, Change]  # by job id

_UPDATE_JOB = (
    update(jobs)
    .where(jobs.c.job_id == bindparam("b_job_id"))
    .values(attempt=bindparam("attempt"), status=bindparam("status"))
)


class Transaction:
    """A connection inside a transaction, and the changes that the streams are told of after it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.changes: Changes = {}
        self._jobs: dict[str, Row[Any]] = {}
        self._version = tables.newest_version(connection) + 1
        self._insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert

    def receive(self, reports: Sequence[Report]) -> list[bool]:
        """Take callbacks in, in this order; for each, whether it was a duplicate."""
        current = self._current(reports)
        duplicates = [True] * len(reports)
        for wave in _waves(reports):
            placed = {report.job_id: self._place(current[report.job_id], report) for _, report in wave}
            kept = self._keep([report for _, report in wave], placed)
            moves = []
            for index, report in wave:
                if report.job_id in kept:
                    duplicates[index] = False
                    target = placed[report.job_id]
                    moves.append((current[report.job_id], target, receive(target, report)))
            current |= {after.job_id: after for after in self.save(moves)}
        return duplicates

    def save(self, moves: Iterable[tuple[Attempt, Attempt, Attempt]]) -> list[Attempt]:
        """Write attempts, each given as (the job's current one, itself as stored, itself as it is now).

        Returns those that are their job's current ones now.
        """
        new: list[dict[str, Any]] = []
        changed: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        shown, turned = [], []
        for current, stored, after in moves:
            is_current = after.number >= current.number
            unseen = {name: getattr(current, name) for name in UNSEEN}
            is_shown = is_current and after._replace(**unseen) != current
            if not stored.version:
                after = after._replace(usual=usual(self.connection))
            if not stored.version or is_shown:
                after = after._replace(version=self._next(current))
                if is_current:
                    self.changes[after.job_id] = Change(after.version, self._jobs.get(after.job_id), after)
            if is_current:
                shown.append(after)
                if (after.number, after.status) != (current.number, current.status):
                    turned.append({"b_job_id": after.job_id, "attempt": after.number, "status": after.status})
            if stored.version:
                row = tables.difference(current if after.number == current.number else stored, after)
                changed[tuple(row)].append(row | {"b_job_id": after.job_id, "b_number": after.number})
            else:
                new.append(tables.as_row(after))
        if new:
            self.connection.execute(self._insert(attempts), new)
        for names, rows in changed.items():
            if names:
                self.connection.execute(_update_attempt(names), rows)
        if turned:
            self.connection.execute(_UPDATE_JOB, turned)
        return shown

    def register(self, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Insert jobs (`job_id`, `agent_id`, `region`, `created_at`); the ids of those that are new."""
        fresh = [{"attempt": 1, "status": "queued", **row} for row in rows]
        statement = self._insert(jobs).on_conflict_do_nothing().returning(jobs.c.job_id)
        return {row.job_id for row in self.connection.execute(statement, fresh)}

    def current(self, job_id: str) -> Attempt | None:
        """A job's current attempt, locked; None for an unknown job."""
        return self._find([job_id]).get(job_id)

    def touch(self, current: Attempt) -> None:
        """Have the streams of a job look anew, though its attempt is as it was."""
        version = self._next(current)
        row = {"b_job_id": current.job_id, "b_number": current.number, "version": version}
        self.connection.execute(_update_attempt(("version",)), [row])
        self.changes[current.job_id] = Change(version)

    def notify(self) -> None:
        """Tell the other processes on PostgreSQL, with the commit; on SQLite they see for themselves."""
        if self.connection.dialect.name != "postgresql":
            return
        lines = [f"{job_id} {change.version}" for job_id, change in self.changes.items()]
        for i in range(0, len(lines), NOTIFICATION_JOBS):
            payload = "\n".join(lines[i : i + NOTIFICATION_JOBS])
            self.connection.execute(select(func.pg_notify(CHANNEL, payload)))

    def _next(self, current: Attempt) -> int:
        """A job's next version: on PostgreSQL, ours may be one that it got before we had its lock."""
        return max(self._version, current.version + 1)

    def _current(self, reports: Sequence[Report]) -> dict[str, Attempt]:
        """The current attempts of the reports' jobs, locked; unknown jobs are registered."""
        first: dict[str, Report] = {}
        for report in reports:
            first.setdefault(report.job_id, report)
        current = self._find(first)
        missing = sorted(first.keys() - current.keys())
        if missing:
            self.register([{"job_id": id, "created_at": first[id].arrived_at} for id in missing])
            current |= self._find(missing)  # registered by another process, meanwhile
        return {id: current.get(id) or Attempt(id, 1, first[id].arrived_at) for id in first}

    def _find(self, job_ids: Iterable[str]) -> dict[str, Attempt]:
        if self.connection.dialect.name == "postgresql":  # SQLite's transactions have the file to themselves
            tables.known_jobs(self.connection, job_ids)
        found = {row.job_id: row for row in self.connection.execute(tables.CURRENT, {"ids": list(job_ids)})}
        self._jobs |= found
        return {job_id: tables.attempt_from(row) for job_id, row in found.items()}

    def _place(self, current: Attempt, report: Report) -> Attempt:
        """`progress.place`, with the older attempts at hand where they matter."""
        if report.run is None or report.run == current.run or not current.version:
            return place([current], report)
        return place(tables.attempts_of(self.connection, report.job_id), report)

    def _keep(self, reports: Iterable[Report], placed: dict[str, Attempt]) -> set[str]:
        """Add one callback for each job; the jobs whose callback was not a repeat."""
        rows = [
            {
                "job_id": report.job_id,
                "number": placed[report.job_id].number,
                "milestone": report.milestone,
                "arrived_at": report.arrived_at,
                "sent_at": report.sent_at,
                "body": report.body,
            }
            for report in reports
            if not is_stale(placed[report.job_id], report)
        ]
        if not rows:
            return set()
        statement = self._insert(callbacks).on_conflict_do_nothing().returning(callbacks.c.job_id)
        return {row.job_id for row in self.connection.execute(statement, rows)}


@dataclass(slots=True, eq=False)
class _Pending:
    """A callback, or another change, that waits for its transaction."""

    report: Report | None
    change: Callable[[Transaction], Any] | None
    outcome: "AsyncResult[Any]"


class Writer:
    """Runs the transactions of this process, one at a time, and wakes the streams after each commit."""

    def __init__(self, engine: Engine, wake: Callable[[Changes], None]) -> None:
        self._engine = engine
        self._wake = wake
        self._waiting: list[_Pending] = []
        self._connection: Connection | None = None
        self._is_writing = False
        self._enough, self._is_enough, self._wait_until = 1, Event(), 0.0

    def receive(self, report: Report) -> bool:
        """Store a callback durably; whether it was a duplicate. Raises SQLAlchemyError: nothing is stored."""
        return bool(self._wait_for(_Pending(report, None, AsyncResult())))

    def run(self, change: Callable[[Transaction], T]) -> T:
        """Run one other change in a transaction of its own; its errors are raised."""
        return cast("T", self._wait_for(_Pending(None, change, AsyncResult())))

    def _wait_for(self, pending: _Pending) -> Any:
        self._waiting.append(pending)
        if len(self._waiting) >= self._enough:
            self._is_enough.set()
        if not self._is_writing:
            self._is_writing = True
            gevent.spawn(self._write)
        return pending.outcome.get()

    def _write(self) -> None:
        """A greenlet, while anything waits: what gathers during one commit shares the next."""
        try:
            while self._waiting:
                self._is_enough.wait(max(self._wait_until - monotonic(), 0))
                gathered = 0
                while gathered < len(self._waiting):  # as long as a turn of the event loop brings more
                    gathered = len(self._waiting)
                    gevent.sleep(0)
                group, self._waiting = self._waiting, []
                self._enough, self._wait_until = len(group), monotonic() + GATHER_FOR
                self._is_enough.clear()
                reports = [pending for pending in group if pending.report]
                if reports:
                    self._receive_together(reports)
                for pending in group:
                    if pending.change:
                        _settle(pending, self._transact(pending.change))
        finally:
            self._is_writing = False

    def _receive_together(self, group: list[_Pending]) -> None:
        """One transaction for all; one each where something in one of them failed the others."""
        reports = [pending.report for pending in group if pending.report]
        outcome = self._transact(lambda transaction: transaction.receive(reports))
        if isinstance(outcome, Exception) and len(group) > 1 and not _is_unavailable(outcome):
            for pending in group:
                self._receive_together([pending])
            return
        for index, pending in enumerate(group):
            _settle(pending, outcome if isinstance(outcome, Exception) else outcome[index])

    def _transact(self, change: Callable[[Transaction], T]) -> T | Exception:
        """What `change` returned, committed, or raised."""
        try:
            result, changes = self._commit(change)
        except Exception as error:  # for the greenlet that asked
            return error
        if changes:
            get_hub().loop.run_callback(self._wake, changes)  # after the answers
        return result

    def _commit(self, change: Callable[[Transaction], T], retry: bool = True) -> tuple[T, Changes]:
        if self._connection is None or self._connection.closed:
            self._connection = writing(self._engine)
        try:
            with self._connection.begin() as begun:
                transaction = Transaction(self._connection)
                result = change(transaction)
                transaction.notify()
                self._to_disk(begun)
        except DBAPIError as error:
            self._connection.close()
            if error.connection_invalidated and retry:  # the database was restarted meanwhile
                return self._commit(change, retry=False)
            raise
        return result, transaction.changes

    def _to_disk(self, begun: RootTransaction) -> None:
        """Commit, off the event loop where to wait for the disk would block it."""
        if self._engine.dialect.name == "sqlite" and is_module_patched("threading"):
            error = get_hub().threadpool.apply(_error_of, (begun.commit,))
            if error:
                raise error
        else:
            begun.commit()


@lru_cache(64)
def _update_attempt(names: tuple[str, ...]) -> Update:
    """Only what changed: SQLite would write every index anew."""
    which = update(attempts).where(
        attempts.c.job_id == bindparam("b_job_id"), attempts.c.number == bindparam("b_number")
    )
    return which.values({name: bindparam(name) for name in names})


def _error_of(commit: Callable[[], None]) -> Exception | None:
    try:
        commit()
    except Exception as error:  # for who waits: the thread pool would print it
        return error
    return None


def _settle(pending: _Pending, outcome: Any) -> None:
    if isinstance(outcome, Exception):
        pending.outcome.set_exception(outcome)
    else:
        pending.outcome.set(outcome)


def _waves(reports: Sequence[Report]) -> list[list[tuple[int, Report]]]:
    """The reports with their places, parted so that no part has two of one job."""
    waves: list[list[tuple[int, Report]]] = []
    depth: Counter[str] = Counter()
    for index, report in enumerate(reports):
        if depth[report.job_id] == len(waves):
            waves.append([])
        waves[depth[report.job_id]].append((index, report))
        depth[report.job_id] += 1
    return waves


def _is_unavailable(error: Exception) -> bool:
    """Whether it is the database's trouble, and not that of one callback."""
    return isinstance(error, OperationalError | InterfaceError)
