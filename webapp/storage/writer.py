"""The one writer of this process: concurrent callbacks are gathered, committed together, then told.

A greenlet that waits inside sqlite3 would freeze every stream, so on SQLite commits wait for the disk
in gevent's thread pool. One greenlet, there while anything waits, commits all that has gathered. A
commit costs as much as several callbacks, so after a shared one the next waits a little, until as many
have come again. A single callback is committed at once.

Nobody waits for longer than ANSWERED_WITHIN: then the connection is dropped, and all that waited for it
are told that nothing was stored.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar, cast

import gevent
from gevent import get_hub
from gevent.event import AsyncResult, Event
from gevent.monkey import is_module_patched
from gevent.threadpool import ThreadPool
from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from webapp.config import Settings
from webapp.rules.attempt import Report
from webapp.rules.pipeline import Pipeline
from webapp.rules.silence import Transition
from webapp.storage.arrivals import Receipt, receive
from webapp.storage.database import PROBLEM, SQLiteFiles, is_about_one_job, reason
from webapp.storage.transaction import Changes, Transaction

GATHER_FOR = 0.02  # seconds; the longest wait for as many callbacks as shared the last commit
ANSWERED_WITHIN = 7.0  # seconds; the contract: 503 is said within 8

T = TypeVar("T")


class Overdue(SQLAlchemyError):
    """The database did not answer in time."""

    def __init__(self) -> None:
        super().__init__(f"no answer of the database within {ANSWERED_WITHIN:g} seconds")


@dataclass(slots=True, eq=False)
class _Pending:
    """A callback, or another change, that waits for its transaction."""

    report: Report | None
    change: Callable[[Transaction], Any] | None
    outcome: "AsyncResult[Any]"
    due_at: float


class Writer:
    """Runs the transactions of this process, one at a time, and wakes the streams after each commit."""

    def __init__(
        self,
        engine: Engine,
        files: SQLiteFiles | None,
        pipelines: Mapping[str, Pipeline],
        settings: Settings,
        wake: Callable[[Changes], None],
        tell: Callable[[Sequence[Transition]], None],
    ) -> None:
        self.engine = engine
        self._files = files
        self._settings, self._tell = settings, tell
        self._pipelines = pipelines
        self._wake = wake
        self._waiting: list[_Pending] = []
        self._connection: Connection | None = None
        self._greenlet: gevent.Greenlet[[], None] | None = None
        self._enough, self._is_enough, self._wait_until = 1, Event(), 0.0
        self._bound = gevent.Timeout(None)
        self._disk = ThreadPool(1)  # not gevent's own, whose ten threads may all wait for a resolver
        self.stored_at = float("-inf")  # when a transaction was last committed; both by the monotonic clock
        self.tried_since: float | None = None  # the first try since then that did not come to an end well
        self.problem: str | None = None  # why the last one did not, in the driver's words

    def has_its_files(self) -> bool:
        """Whether SQLite's file is still the one that is open."""
        return self._files is None or self._files.are_kept()

    def receive(self, report: Report) -> Receipt:
        """Store a callback durably. Raises SQLAlchemyError or UnknownPipeline: nothing is stored."""
        return cast("Receipt", self._wait_for(report, None))

    def run(self, change: Callable[[Transaction], T]) -> T:
        """Run one other change in a transaction of its own; its errors are raised."""
        return cast("T", self._wait_for(None, change))

    def _wait_for(self, report: Report | None, change: Callable[[Transaction], Any] | None) -> Any:
        pending = _Pending(report, change, AsyncResult(), monotonic() + ANSWERED_WITHIN)
        self._waiting.append(pending)
        if len(self._waiting) >= self._enough:
            self._is_enough.set()
        if not self._greenlet:  # none, or one that has ended
            self._greenlet = gevent.spawn(self._write)
        try:
            with gevent.Timeout(ANSWERED_WITHIN + 0.5, Overdue()):  # the writer itself gives up before
                return pending.outcome.get()
        finally:
            if pending in self._waiting:  # what is answered without it is not stored later
                self._waiting.remove(pending)

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
                self._write_group([pending for pending in group if pending.due_at > monotonic()])
            finally:  # whatever happens here, as without memory, nobody waits in vain
                for pending in group:
                    if not pending.outcome.ready():
                        _settle(pending, Overdue())

    def _write_group(self, group: list[_Pending]) -> None:
        reports = [pending for pending in group if pending.report]
        if reports:
            self._receive_together(reports)
        for pending in group:
            if pending.change:
                _settle(pending, self._transact(pending.change, pending.due_at))

    def _receive_together(self, group: list[_Pending]) -> None:
        """One transaction for all; one each where something in one of them failed the others."""
        reports = [pending.report for pending in group if pending.report]
        due_at = min(pending.due_at for pending in group)
        outcome = self._transact(lambda transaction: receive(transaction, reports), due_at)
        if isinstance(outcome, Exception) and len(group) > 1 and is_about_one_job(outcome):
            for pending in group:
                self._receive_together([pending])
            return
        for index, pending in enumerate(group):
            _settle(pending, outcome if isinstance(outcome, Exception) else outcome[index])

    def _transact(self, change: Callable[[Transaction], T], due_at: float) -> T | Exception:
        """What `change` returned, committed, or raised."""
        tried_since = self.tried_since
        self.tried_since = self.tried_since or monotonic()
        self._bound = gevent.Timeout.start_new(max(due_at - monotonic(), 0.001))
        try:
            result, changes = self._commit(change)
        except gevent.Timeout as timeout:
            if timeout is not self._bound:
                raise
            return self._fail(Overdue())
        except Exception as error:  # for the greenlet that asked
            if is_about_one_job(error) or not isinstance(error, SQLAlchemyError):
                self.tried_since = tried_since
                return error
            return self._fail(error)
        finally:
            self._bound.close()
        self.stored_at, self.tried_since, self.problem = monotonic(), None, None
        if changes:
            get_hub().loop.run_callback(self._wake, changes)  # after the answers
        return result

    def _commit(self, change: Callable[[Transaction], T], retry: bool = True) -> tuple[T, Changes]:
        if self._connection is None or self._connection.closed:
            self._connection = self.engine.connect().execution_options(writes=True)
        try:
            with self._connection.begin() as begun:
                transaction = Transaction(self._connection, self._pipelines, self._settings)
                result = change(transaction)
                transaction.notify()
                self._to_disk(begun)
        except DBAPIError as error:
            if error.connection_invalidated and retry:  # the database was restarted meanwhile
                self._drop()
                return self._commit(change, retry=False)
            raise
        if self._files and not self.has_its_files():
            self._files.reopen()
            raise OperationalError("COMMIT", None, sqlite3.OperationalError(PROBLEM))
        if transaction.transitions:
            self._tell(transaction.transitions)
        return result, transaction.changes

    def _fail(self, error: Exception) -> Exception:
        self.problem = reason(error)
        self._drop()
        return error

    def _drop(self) -> None:
        """Let go of every connection: the trouble may be theirs alone, as after a change of the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()
        self.engine.dispose()

    def _to_disk(self, begun: RootTransaction) -> None:
        """Commit, off the event loop where to wait for the disk would block it."""
        if self.engine.dialect.name == "sqlite" and is_module_patched("threading"):
            self._bound.close()  # a thread cannot be called back; and no lock is waited for any more
            error = self._disk.apply(_error_of, (begun.commit,))
            if error:
                raise error
        else:
            begun.commit()


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
