"""How the two databases are opened: SQLite for one machine, PostgreSQL for more. Every wait has a bound.

gevent switches to other greenlets while psycopg waits, but not while sqlite3 does: so sqlite3 never waits
for a lock by itself, and all that happens to its files is noticed by looking at them.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from select import POLLIN
from time import monotonic, sleep
from typing import Any

import psycopg
from gevent.monkey import get_original
from psycopg.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, IntegrityError, InvalidatePoolError, OperationalError, SQLAlchemyError

WRITES_WITHIN, READS_WITHIN = 5.0, 1.0  # seconds to wait for another's lock on SQLite's file
CONNECTS_WITHIN, ANSWERS_WITHIN = 3, 5.0  # seconds, of PostgreSQL
SESSION = (
    "SET lock_timeout = '3s'; SET statement_timeout = '4s'; SET idle_in_transaction_session_timeout = '20s';"
    # Until its first ANALYZE a new database keeps plans that read whole tables: two fifths of its time for a
    # callback. What has no index is read as before, and would be compiled first for its supposed cost.
    "SET enable_seqscan = off; SET jit = off"
)
FIRST_READ = "PRAGMA user_version"  # takes the lock of the first SELECT, where another's can be waited for
LARGEST_WAL = 4 * 2**20  # bytes that the -wal keeps once it was written back
PROBLEM = "the file at its path is not as it was opened"
READ_ONLY = "attempt to write a readonly database"  # in SQLite's words

log = logging.getLogger(__name__)


def reason(error: BaseException) -> str:
    """The driver's own first line."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is given up when the server, frozen or cut off, says nothing for long."""

    bound: float | None = ANSWERS_WITHIN

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """As psycopg's own; `timeout` is given only for waits that end well by it."""
        if timeout is not None or self.bound is None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.bound)
        except psycopg.errors._WaitTimeout:
            self.close()
            raise psycopg.OperationalError(f"no answer within {self.bound:g} seconds") from None


def engine_options(database_url: str) -> dict[str, Any]:
    """For `create_engine`.

    JSON that was read before is not parsed again, 13 % of the operator's list: so nobody may change a value.
    """
    url, kept = make_url(database_url), {"json_deserializer": lru_cache(1024)(json.loads)}
    if url.get_backend_name() == "sqlite":
        # BEGIN is ours, below, and so is the wait for a lock.
        return kept | {"connect_args": {"timeout": 0, "check_same_thread": False, "isolation_level": None}}
    pool = {"pool_size": 10, "max_overflow": 10, "pool_timeout": 3}
    connect = {"connect_timeout": CONNECTS_WITHIN, "tcp_user_timeout": 5_000}
    # Without BEGIN and ROLLBACK, and with `_look` in place of a ping, a read is one round trip, not four.
    return kept | pool | {"connect_args": connect, "isolation_level": "AUTOCOMMIT"}


def to_write(engine: Engine) -> Connection:
    """A connection for transactions that write; those of all others only read."""
    own = {"writes": True} if engine.dialect.name == "sqlite" else {"isolation_level": "READ COMMITTED"}
    return engine.connect().execution_options(**own)


def prepare(engine: Engine) -> "SQLiteFiles | None":
    """Give an engine the ways in which its connections are opened and its transactions begun."""
    if engine.dialect.name == "sqlite":
        return SQLiteFiles(engine)

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> psycopg.Connection[Any]:
        connection = BoundedConnection.connect(*arguments, **options)
        connection.execute(SESSION)  # not as options of the connection, which pgbouncer refuses
        connection.commit()
        return connection

    @event.listens_for(engine, "checkout")
    def _look(connection: psycopg.Connection[Any], _record: Any, _proxy: Any) -> None:
        waiting = get_original("select", "poll")()
        waiting.register(connection.fileno(), POLLIN)
        if waiting.poll(0):  # nobody has asked anything, so the server has said good-bye
            raise InvalidatePoolError

    return None


class SQLiteFiles:
    """The open connections to SQLite's file, and whether it and its -wal are still what is at their paths.

    SQLite goes on writing into a file that was deleted or exchanged, and what it writes is lost; and into
    one that was made read-only, until it is opened the next time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._path = Path(engine.url.database or "")
        self._wal = Path(f"{self._path}-wal")
        self._open: dict[sqlite3.Connection, Any] = {}  # with the identity of the files that each has open
        self._was_open = False
        os.umask(0o077)  # the files are for their owner alone, whatever the umask was
        for path in (self._path, self._wal, Path(f"{self._path}-shm")):
            with suppress(OSError):  # not there yet, or another user's
                path.chmod(0o600)
        event.listen(engine, "do_connect", self._before_connect)
        event.listen(engine, "connect", self._set_up)
        event.listen(engine, "close", lambda connection, _: self._open.pop(connection, None))
        event.listen(engine, "begin", self._begin)

    def are_kept(self) -> bool:
        """Whether each connection has open what is at the path, and may write it if now that is allowed."""
        now = self._identity()
        return all(identity == now for identity in self._open.values())

    def reopen(self) -> None:
        """Close every connection of this process; the next use of the database opens the path anew.

        First what is in a -wal without a name is saved into the file; and all have to go before one is
        opened, or old and new ones would share the index of two different -wal files.
        """
        log.warning("the database is opened anew: %s", PROBLEM)
        for connection in [*self._open]:
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                log.warning("what its -wal held may be lost: %s", reason(error))
            connection.close()
        self._open.clear()
        self._engine.dispose()

    def _identity(self) -> tuple[int, ...] | None:
        try:
            file, wal = self._path.stat(), self._wal.stat()
        except FileNotFoundError:
            return None
        return file.st_dev, file.st_ino, wal.st_ino, os.access(self._path, os.W_OK)

    def _before_connect(self, *_: object) -> None:
        if self._was_open and not self._path.exists():  # SQLite would make an empty one
            raise sqlite3.OperationalError("the database file is gone")

    def _set_up(self, connection: sqlite3.Connection, _: object) -> None:
        if not self._path.stat().st_size:  # new
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # so that `prune` can give space back
        _patiently(connection.execute, "PRAGMA journal_mode=WAL", READS_WITHIN)
        connection.execute("PRAGMA synchronous=FULL")  # durable at each commit
        connection.execute("PRAGMA secure_delete=FAST")  # Debian's overwrites all: 30 times a prune's writes
        connection.execute(f"PRAGMA journal_size_limit={LARGEST_WAL}")
        _patiently(connection.execute, "SELECT * FROM sqlite_master LIMIT 0", READS_WITHIN)  # opens -wal
        self._open[connection] = self._identity()
        self._was_open = True

    def _begin(self, connection: Connection) -> None:
        execute = connection.exec_driver_sql
        if not connection.get_execution_options().get("writes"):
            driver: Any = connection.connection.driver_connection
            try:
                driver.execute("BEGIN")  # through SQLAlchemy these two took 6 % of opening a stream
                driver.execute(FIRST_READ)
            except sqlite3.Error:  # once more, so that SQLAlchemy names the fault, and a lock is waited for
                with suppress(sqlite3.Error):
                    driver.rollback()
                execute("BEGIN")
                _patiently(execute, FIRST_READ, READS_WITHIN)
            return
        # A reader that turned writer would fail at once with "locked".
        _patiently(execute, "BEGIN IMMEDIATE", WRITES_WITHIN)
        if not self.are_kept():
            execute("ROLLBACK")
            self.reopen()
            connection.invalidate()
            _patiently(execute, "BEGIN IMMEDIATE", WRITES_WITHIN)
        if not os.access(self._path, os.W_OK):  # SQLite has begun to read
            execute("ROLLBACK")
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError(READ_ONLY))


def _patiently(execute: Callable[[str], object], statement: str, within: float) -> None:
    """Wait for a lock here: inside sqlite3 the event loop would wait, too."""
    give_up_at = monotonic() + within
    while True:
        try:
            execute(statement)
            return
        except (sqlite3.OperationalError, OperationalError) as error:
            code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > give_up_at:
                raise
        sleep(0.001)


def is_about_one_job(error: Exception) -> bool:
    """Whether it is about what was to be stored, or another's lock on it, and not the database's trouble."""
    if isinstance(getattr(error, "orig", None), LockNotAvailable | DeadlockDetected):
        return True
    return not isinstance(error, SQLAlchemyError) or isinstance(error, IntegrityError | DataError)
