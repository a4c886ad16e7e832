"""The one writer of this process: concurrent callbacks are gathered, committed together, then told.

A greenlet that waits inside sqlite3 would freeze every stream, so on SQLite commits wait for the disk
in gevent's thread pool. One greenlet, there while anything waits, commits all that has gathered. A
commit costs as much as several callbacks, so after a shared one the next waits a little, until as many
have come again. A single callback is committed at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar, cast

import gevent
from gevent import get_hub
from gevent.event import AsyncResult, Event
from gevent.monkey import is_module_patched
from sqlalchemy import Connection, Engine, RootTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from webapp.rules.pipeline import Pipeline
from webapp.rules.progress import Report
from webapp.storage.database import writing
from webapp.storage.transaction import Changes, Receipt, Transaction

GATHER_FOR = 0.02  # seconds; the longest wait for as many callbacks as shared the last commit

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Pending:
    """A callback, or another change, that waits for its transaction."""

    report: Report | None
    change: Callable[[Transaction], Any] | None
    outcome: "AsyncResult[Any]"


class Writer:
    """Runs the transactions of this process, one at a time, and wakes the streams after each commit."""

    def __init__(
        self, engine: Engine, pipelines: Mapping[str, Pipeline], wake: Callable[[Changes], None]
    ) -> None:
        self._engine = engine
        self._pipelines = pipelines
        self._wake = wake
        self._waiting: list[_Pending] = []
        self._connection: Connection | None = None
        self._is_writing = False
        self._enough, self._is_enough, self._wait_until = 1, Event(), 0.0

    def receive(self, report: Report) -> Receipt:
        """Store a callback durably. Raises SQLAlchemyError or UnknownPipeline: nothing is stored."""
        return cast("Receipt", self._wait_for(_Pending(report, None, AsyncResult())))

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
                transaction = Transaction(self._connection, self._pipelines)
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


def _is_unavailable(error: Exception) -> bool:
    """Whether it is the database's trouble, and not that of one callback."""
    return isinstance(error, OperationalError | InterfaceError)
