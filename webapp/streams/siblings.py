"""What other processes and hosts commit: asked for on SQLite, heard by LISTEN on PostgreSQL.

Nothing depends on the numbers of changes growing, which they do not after a restore: a number that
differs from the one that a page shows is a change, and every watched job is compared now and then.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from time import monotonic, time
from typing import Any, Protocol

import gevent
from sqlalchemy import Engine

from webapp.storage.database import reason
from webapp.storage.jobs import CURRENT, changes_since, newest_change, numbers_of
from webapp.storage.transaction import ANEW, CHANNEL, Change, Changes
from webapp.streams.frames import ANY, Frame

ASK_EVERY, ASK_AT_REST = 0.02, 0.05  # seconds between two looks for a sibling's commits
AT_REST_AFTER = 10.0  # seconds in which nobody committed
COMPARE_EVERY, COMPARED_AT_ONCE = 20.0, 500  # seconds, jobs
RETRY_AFTER = 1.0  # seconds, when the database is away

log = logging.getLogger(__name__)


class Watched(Protocol):
    """A job that somebody watches, and what is shown of it."""

    frame: Frame


class Siblings:
    """Listens for the others' commits while anything is watched, and wakes the streams of their jobs."""

    def __init__(
        self, engine: Engine, watched: Mapping[str, Watched], wake: Callable[[Changes], None]
    ) -> None:
        self._engine, self._watched, self._wake = engine, watched, wake
        self._listener: gevent.Greenlet[[], None] | None = None
        self._compared_at = 0.0
        self._alike_at: int | None = None  # the version of SQLite's file that was found to be shown
        self.hears_since: float | None = None  # Unix seconds; None while it does not hear

    def listen(self) -> None:
        """Start the greenlet that listens, unless it is at work."""
        if not self._listener:  # none, or one that has ended
            self._listener = gevent.spawn(self._listen)

    def _listen(self) -> None:
        hear = self._ask if self._engine.dialect.name == "sqlite" else self._hear
        while self._watched:
            try:
                for changes in hear():
                    self._wake(changes)
            except Exception as error:  # whatever it was, a silent listener would be worse
                log.warning("listening for changes again: %s", reason(error))
                gevent.sleep(RETRY_AFTER)
            finally:
                self.hears_since = None

    def _begin(self) -> Changes:
        """From now on everything is heard; what came before may not have been."""
        self.hears_since, self._compared_at, self._alike_at = time(), monotonic(), None
        return dict.fromkeys(self._watched, ANEW)

    def _ask(self) -> Iterator[Changes]:
        """SQLite: ask whether any other connection has committed, which costs microseconds, and then what."""
        with self._engine.connect() as connection:
            ask = connection.connection.cursor()
            known, number, last = -1, newest_change(connection), monotonic()
            connection.rollback()
            yield self._begin()
            while self._watched:
                gevent.sleep(ASK_EVERY if monotonic() < last + AT_REST_AFTER else ASK_AT_REST)
                try:
                    now = ask.execute("PRAGMA data_version").fetchone()[0]
                except sqlite3.Error:  # the file was exchanged, and all its connections were closed
                    connection.invalidate()
                    raise
                if now != known:
                    known, last = now, monotonic()
                    newer, newest = changes_since(connection, number), newest_change(connection)
                    shown_otherwise = self._differing(newer)  # our own process's commits are shown already
                    rows = connection.execute(CURRENT, {"ids": shown_otherwise}) if shown_otherwise else ()
                    changes = {job_id: Change(newer[job_id]) for job_id in shown_otherwise}
                    changes |= {row.job_id: Change(row.change, row) for row in rows}
                    connection.rollback()
                    yield self._begin() if newest < number else changes | ({ANY: ANEW} if newer else {})
                    number = newest
                yield from self._compare(known)

    def _hear(self) -> Iterator[Changes]:
        """PostgreSQL: LISTEN on a connection of its own, given up when the writer gives up the others."""
        pool = self._engine.pool
        raw = self._engine.raw_connection()
        connection: Any = raw.driver_connection
        raw.detach()  # from the pool, which would otherwise be one short
        try:
            connection.rollback()
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            yield self._begin()
            while self._watched and self._engine.pool is pool:
                for notification in connection.notifies(timeout=1, stop_after=1):
                    lines = (line.split() for line in notification.payload.splitlines())
                    yield {ANY: ANEW} | {job_id: Change(int(number)) for job_id, number in lines}
                if monotonic() > self._compared_at + COMPARE_EVERY:
                    if not connection.execute("SELECT pg_listening_channels()").fetchone():
                        raise ConnectionError("LISTEN was lost: is this a pooler in transaction mode?")
                    yield from self._compare()
        finally:
            connection.close()

    def _compare(self, version: int | None = None) -> Iterator[Changes]:
        """Now and then: the watched jobs that are not as they are shown, whyever nobody told.

        Not again while SQLite's file has the same version: a fifth of what 5,000 streams took at rest.
        """
        if monotonic() < self._compared_at + COMPARE_EVERY:
            return
        self._compared_at = monotonic()
        if version is not None and version == self._alike_at:
            return
        self._alike_at = version
        ids = [job_id for job_id in self._watched if job_id != ANY]
        for start in range(0, len(ids), COMPARED_AT_ONCE):
            some = ids[start : start + COMPARED_AT_ONCE]
            with self._engine.connect() as connection:
                known = numbers_of(connection, some)
            if differing := self._differing({job_id: known.get(job_id, 0) for job_id in some}):
                self._alike_at = None
                yield dict.fromkeys(differing, ANEW)
            gevent.sleep(0)

    def _differing(self, numbers: Mapping[str, int]) -> list[str]:
        """The watched jobs of which another change is shown than this one."""
        watched = self._watched
        return [id for id, number in numbers.items() if id in watched and watched[id].frame.number != number]
