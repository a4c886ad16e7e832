"""The one writer of this process: concurrent callbacks are gathered, committed together, then told.

A greenlet that waits inside sqlite3 would freeze every stream, so on SQLite commits wait for the disk
in a thread of their own. One greenlet, there while anything waits, commits all that has gathered. A
commit costs as much as several callbacks, so after a shared one the next waits a little, until as many
have come again. A single callback is committed at once.

Nobody waits for longer than ANSWERED_WITHIN: then the connection is dropped, and all that waited for it
are told that nothing was stored.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import Any, TypeVar, cast

import gevent
from gevent.event import AsyncResult, Event
from gevent.monkey import is_module_patched
from gevent.threadpool import ThreadPool
from gevent.util import wrap_errors
from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from webapp.config import Settings
from webapp.rules.attempt import Report
from webapp.storage.arrivals import receive, try_to_store
from webapp.storage.database import PROBLEM, SQLiteFiles, is_about_one_job, reason, to_write
from webapp.storage.notifications import tell
from webapp.storage.transaction import Changes, Transaction

GATHER_FOR = 0.02  # seconds; the longest wait for as many callbacks as shared the last commit
ANSWERED_WITHIN = 7.0  # seconds; the contract: 503 is said within 8
FRESH_FOR, TRIED_FOR = 0.5, 0.7  # seconds: after a commit `problem()` tries nothing; it waits for a try
SICK_AFTER = 5.0  # seconds without a commit though one was tried; the contract's

T = TypeVar("T")


def _overdue() -> SQLAlchemyError:
    return SQLAlchemyError(f"no answer of the database within {ANSWERED_WITHIN:g} seconds")


@dataclass(slots=True, eq=False)
class _Pending:
    """A callback, or another change, that waits for its transaction; its outcome may be an exception."""

    what: Any  # a Report, or a Callable[[Transaction], Any]
    due_at: float
    outcome: "AsyncResult[Any]" = field(default_factory=AsyncResult)


@dataclass(eq=False)
class Writer:
    """Runs the transactions of this process, one at a time, and wakes the streams after each commit."""

    engine: Engine
    files: SQLiteFiles | None
    settings: Settings
    wake: Callable[[Changes], None]

    def __post_init__(self) -> None:
        self._waiting: list[_Pending] = []
        self._connection: Connection | None = None
        self._writing: gevent.Greenlet[[], None] | None = None
        self._trying: gevent.Greenlet[[], None] | None = None
        self._enough, self._is_enough, self._wait_until = 1, Event(), 0.0
        self._bound = gevent.Timeout(None)
        self._disk = ThreadPool(1)  # not gevent's own, whose ten threads may all wait for a resolver
        self._stored_at = -inf  # the last commit
        self._tried_since = inf  # the first try after it that has not succeeded
        self._problem: str | None = None  # why the last try failed, in the driver's words

    def receive(self, report: Report) -> tuple[bool, int]:
        """Store a callback durably; whether it is a duplicate, and how many links of its job were revoked.

        Raises SQLAlchemyError or BadField: nothing is stored.
        """
        return cast("tuple[bool, int]", self._wait_for(report))

    def run(self, change: Callable[[Transaction], T]) -> T:
        """Run one other change in a transaction of its own; its errors are raised."""
        return cast("T", self._wait_for(change))

    def problem(self) -> str | None:
        """Why no callback could be stored now, None where one could: tried for real, within a second."""
        if monotonic() - self._stored_at > FRESH_FOR:
            if not self._trying:  # none, or one that has ended
                self._trying = gevent.spawn(self._try)
            self._trying.join(TRIED_FOR / 5 if self._is_overdue() else TRIED_FOR)
        return self._problem or (f"no commit for {SICK_AFTER:g} seconds" if self._is_overdue() else None)

    def _is_overdue(self) -> bool:
        return monotonic() - self._tried_since >= SICK_AFTER

    def _try(self) -> None:
        try:
            self.run(try_to_store)
        except Exception as error:
            self._problem = self._problem or reason(error)

    def _wait_for(self, what: Any) -> Any:
        pending = _Pending(what, monotonic() + ANSWERED_WITHIN)
        self._waiting.append(pending)
        if len(self._waiting) >= self._enough:
            self._is_enough.set()
        if not self._writing:  # none, or one that has ended
            self._writing = gevent.spawn(self._write)
        try:
            with gevent.Timeout(ANSWERED_WITHIN + 0.5, _overdue()):  # the writer itself gives up before
                outcome = pending.outcome.get()
        finally:
            if pending in self._waiting:  # what is answered without it is not stored later
                self._waiting.remove(pending)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _write(self) -> None:
        """A greenlet, while anything waits: what gathers during one commit shares the next."""
        while self._waiting:
            self._is_enough.wait(max(self._wait_until - monotonic(), 0))
            gathered = 0
            while gathered < len(self._waiting):  # as long as a turn of the event loop brings more
                gathered = len(self._waiting)
                gevent.sleep(0)
            group, self._waiting = self._waiting, []
            self._enough, self._wait_until = len(group), monotonic() + GATHER_FOR
            self._is_enough.clear()
            try:
                in_time = [pending for pending in group if pending.due_at > monotonic()]
                if callbacks := [pending for pending in in_time if isinstance(pending.what, Report)]:
                    self._receive_together(callbacks)
                for pending in in_time:
                    if not isinstance(pending.what, Report) and pending.due_at > monotonic():
                        pending.outcome.set(self._transact(pending.what, pending.due_at))
            finally:  # whatever happens here, as without memory, nobody waits in vain
                for pending in group:
                    if not pending.outcome.ready():
                        pending.outcome.set(_overdue())

    def _receive_together(self, group: list[_Pending]) -> None:
        """One transaction for all; one each where something in one of them failed the others."""
        reports = [pending.what for pending in group]
        due_at = min(pending.due_at for pending in group)
        outcome = self._transact(lambda transaction: receive(transaction, reports), due_at)
        if isinstance(outcome, Exception) and len(group) > 1 and is_about_one_job(outcome):
            for pending in group:
                self._receive_together([pending])
            return
        for i, pending in enumerate(group):
            pending.outcome.set(outcome if isinstance(outcome, Exception) else outcome[i])

    def _transact(self, change: Callable[[Transaction], T], due_at: float) -> T | Exception:
        """What `change` returned, committed, or raised."""
        tried_since = self._tried_since
        self._tried_since = min(tried_since, monotonic())
        self._bound = gevent.Timeout.start_new(max(due_at - monotonic(), 0.001))
        try:
            result, changes = self._commit(change)
        except (gevent.Timeout, Exception) as raised:
            error = _overdue() if isinstance(raised, gevent.Timeout) else raised
            if is_about_one_job(error):
                self._tried_since = tried_since
            else:
                self._problem = reason(error)
                self._drop()
            return error  # for the greenlet that asked
        finally:
            self._bound.close()
        self._stored_at, self._tried_since, self._problem = monotonic(), inf, None
        if changes:
            gevent.get_hub().loop.run_callback(self.wake, changes)  # after the answers
        return result

    def _commit(self, change: Callable[[Transaction], T], retry: bool = True) -> tuple[T, Changes]:
        if self._connection is None or self._connection.closed:
            self._connection = to_write(self.engine)
        try:
            with self._connection.begin() as begun:
                transaction = Transaction(self._connection, self.settings)
                result = change(transaction)
                transaction.notify()
                self._to_disk(begun)
        except DBAPIError as error:
            if error.connection_invalidated and retry:  # the database was restarted meanwhile
                self._drop()
                return self._commit(change, retry=False)
            raise
        if self.files and not self.files.are_kept():
            self.files.reopen()
            raise OperationalError("COMMIT", None, sqlite3.OperationalError(PROBLEM))
        tell(transaction.transitions)
        return result, transaction.changes

    def _to_disk(self, begun: RootTransaction) -> None:
        """Commit, off the event loop where to wait for the disk would block it."""
        if self.files and is_module_patched("threading"):
            self._bound.close()  # a thread cannot be called back; and no lock is waited for any more
            error = self._disk.apply(wrap_errors((Exception,), begun.commit))  # the pool would print it
            if error:
                raise error
        else:
            begun.commit()

    def _drop(self) -> None:
        """Let go of every connection: the trouble may be theirs alone, as after a change of the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()
        self.engine.dispose()
