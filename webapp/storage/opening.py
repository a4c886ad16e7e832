"""What each process does before and beside its work: refuse a database, record the start, look again."""

from collections.abc import Callable
from functools import partial

import gevent
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from webapp import logs
from webapp.storage import jobs as reads
from webapp.storage.arrivals import try_to_store
from webapp.storage.database import reason
from webapp.storage.tables import closures
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

CLOSURES_KEPT = 7 * 86_400.0  # seconds
LOOK_EVERY = 1.0  # seconds
SQLITE_ERROR, SQLITE_NOTADB = 1, 26  # no such table or column; not a database: waiting mends neither


class CannotStart(Exception):
    """The database is there, and will not do."""


def begin(writer: Writer, started_at: float) -> None:
    """Be ready to store, or raise CannotStart; a database that is away is waited for beside the work.

    `started_at` is when the server started (Unix seconds), the same for all of its processes.
    """
    reads.started_at = started_at
    record, is_recorded = partial(_record, started_at), False
    try:
        _refuse_pooler(writer.engine)
        writer.run(record)
        is_recorded = True
    except SQLAlchemyError as error:
        if _is_schema(error):
            raise CannotStart(f"{reason(error)}: flask db upgrade may help") from None
        logs.log.warning("the server starts without its database: %s", reason(error))

    def look() -> None:
        nonlocal is_recorded
        gevent.sleep(LOOK_EVERY)
        if not is_recorded or (writer.files and not writer.files.are_kept()):
            writer.run(record)  # which opens an exchanged file anew
            is_recorded = True

    keep_doing("looking after the database", look)


def keep_doing(what: str, act: Callable[..., object], *given: object) -> None:
    """Start a greenlet that does it for ever, whatever goes wrong; `act` waits first."""

    def for_ever() -> None:
        while True:
            try:
                act(*given)
            except SQLAlchemyError as error:
                logs.log.warning("%s failed: %s", what, reason(error))
            except Exception:
                logs.log.exception("%s failed", what)

    gevent.spawn(for_ever)


def _refuse_pooler(engine: Engine) -> None:
    """Raise CannotStart where a connection has another server process at each transaction: LISTEN is lost."""
    if engine.dialect.name == "sqlite":
        return
    process = select(func.pg_backend_pid())
    with engine.connect() as first, engine.connect() as second:
        before = first.scalar(process)
        first.commit()
        if before == second.scalar(process) or before != first.scalar(process):
            raise CannotStart(
                "DATABASE_URL leads to a pooler in transaction mode, where LISTEN is lost: set its"
                " pool_mode to session, or go to the server itself"
            )


def _record(started_at: float, transaction: Transaction) -> None:
    """Try to store a callback; then record since when no door was open, which is not the jobs' silence."""
    try_to_store(transaction)
    connection = transaction.connection
    connection.execute(closures.delete().where(closures.c.until < started_at - CLOSURES_KEPT))
    # Until it is recorded each look at the clock asks for this, and walks over all that came after the start.
    row = {"until": started_at, "since": reads.newest_arrival(connection, started_at) or started_at}
    connection.execute(transaction.insert(closures).on_conflict_do_nothing(), row)


def _is_schema(error: SQLAlchemyError) -> bool:
    if isinstance(error, OperationalError):
        return getattr(error.orig, "sqlite_errorcode", None) in (SQLITE_ERROR, SQLITE_NOTADB)
    return isinstance(error, ProgrammingError | IntegrityError)
