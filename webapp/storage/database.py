"""How the two databases are opened: SQLite for one machine, PostgreSQL for more."""

import sqlite3
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

BUSY_TIMEOUT = 5  # seconds that a writer waits for another process's transaction


def engine_options(database_url: str) -> dict[str, Any]:
    """For `create_engine`; every wait has a bound."""
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        Path(url.database or "").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            "connect_args": {
                "timeout": BUSY_TIMEOUT,
                "check_same_thread": False,
                "isolation_level": None,  # BEGIN is ours, below
            }
        }
    bounds = "-c lock_timeout=5s -c statement_timeout=15s -c idle_in_transaction_session_timeout=30s"
    return {
        "pool_size": 10,
        "max_overflow": 10,
        "pool_timeout": 5,
        "pool_pre_ping": True,
        "connect_args": {"connect_timeout": 5, "tcp_user_timeout": 10_000, "options": bounds},
    }


def prepare(engine: Engine) -> None:
    """SQLite only: durable at each commit, readers beside one writer, writers in line from the start."""
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _set_up(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A reader that turned writer would fail at once with "locked".
        if connection.get_execution_options().get("writes"):
            _begin_immediate(connection)
        else:
            connection.exec_driver_sql("BEGIN")


def writing(engine: Engine) -> Connection:
    """A connection for transactions that write."""
    connection = engine.connect().execution_options(writes=True)
    if engine.dialect.name == "sqlite":
        connection.detach()
        connection.connection.cursor().execute("PRAGMA busy_timeout=0")
    return connection


def _begin_immediate(connection: Connection) -> None:
    """Wait in line here: inside sqlite3, which looks ever less often, the event loop would wait too."""
    give_up_at = monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) != sqlite3.SQLITE_BUSY or monotonic() > give_up_at:
                raise
        sleep(0.001)
