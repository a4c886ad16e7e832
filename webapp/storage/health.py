"""Whether a callback could be stored now: tried for real, and undone."""

from time import monotonic, time

import gevent

from webapp.rules.attempt import Report
from webapp.storage.arrivals import receive
from webapp.storage.database import reason
from webapp.storage.tables import marks
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

FRESH_FOR, WAITS_FOR = 0.5, 0.7  # seconds since the last commit in which nothing is tried; for a try
SICK_AFTER = 5.0  # seconds without a commit though one was tried; the contract's
PROBE = Report(" probe", "provisioning", 0.0)  # no job can have this id


class Health:
    """One process's ability to store; asking never waits for a database that does not answer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._trying: gevent.Greenlet[[], None] | None = None

    def problem(self) -> str | None:
        """Why no callback can be stored now, None where one can; within a second."""
        writer = self._writer
        if monotonic() - writer.stored_at > FRESH_FOR:
            if not self._trying:  # none, or one that has ended
                self._trying = gevent.spawn(self._try)
            self._trying.join(WAITS_FOR / 5 if self._is_overdue() else WAITS_FOR)
        if self._is_overdue():
            return writer.problem or f"no commit for {SICK_AFTER:g} seconds"
        return writer.problem

    def _is_overdue(self) -> bool:
        since = self._writer.tried_since
        return since is not None and monotonic() - since >= SICK_AFTER

    def _try(self) -> None:
        try:
            self._writer.run(try_to_store)
        except Exception as error:
            self._writer.problem = self._writer.problem or reason(error)


def try_to_store(transaction: Transaction) -> None:
    """Store a callback, undo that, and leave a mark, so that there is something to commit."""
    connection = transaction.connection
    with connection.begin_nested() as savepoint:
        receive(Transaction(connection, transaction.pipelines, transaction.settings), [PROBE])
        savepoint.rollback()
    mark = transaction.insert(marks).values(name="health", at=time())
    connection.execute(mark.on_conflict_do_update(index_elements=["name"], set_={"at": mark.excluded.at}))
