"""Wakes the streams when a job changes: in this process, in its siblings, on other hosts.

This process is told by its own writer at each commit. The others' commits are seen on SQLite by
asking `PRAGMA data_version`, which costs microseconds, and heard on PostgreSQL with LISTEN.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import time
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import Semaphore
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from .models import attempts, newest_version
from .store import CHANNEL, Changes

ANY = ""  # in place of a job id: any job
ASK_EVERY = 0.02  # seconds between two looks for a sibling's commits
KEEP_ALIVE = 19.0  # the contract: a comment at least every 20 s
TOGETHER = 0.25  # comments are due at multiples of this: one wake-up of the process for many streams
SHORTEST_INTERVAL, SHORTEST_OF_ANY = 0.1, 1.0  # between two frames of one job; of any
RETRY_AFTER = 1.0  # when the database is away

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a stream sends of a job: one state, rendered.

    `number` is the change that made it; at `changes_at` (Unix seconds) the clock alone makes
    it another one; `body` is None where it was let go of.
    """

    number: int
    version: str
    link: int
    changes_at: float | None
    is_over: bool
    body: bytes | None


@dataclass(slots=True, eq=False)
class _Topic:
    """One job that somebody watches: its newest frame, made once however many there are."""

    changed: Event
    making: Semaphore
    watchers: int = 0
    frame: Frame | None = None
    stale: bool = True
    made_at: float = 0.0
    due: bool = False


class Live:
    """The watched jobs of this process."""

    def __init__(self, engine: Engine, make: Callable[[str], Frame]) -> None:
        self._engine = engine
        self._make = make
        self._topics: dict[str, _Topic] = {}
        self._listener: gevent.Greenlet[[], None] | None = None

    def events(self, job_id: str, link: int = 0) -> Iterator[bytes]:
        """The newest frame at once and after each change; a comment when nothing changed for long.

        Ends after a frame that is over, and without one of another link than this: it was revoked.
        A slow reader gets the newest frame, never a backlog.
        """
        topic, seen = self._join(job_id), None
        try:
            while True:
                changed = topic.changed  # taken before the look, so that no change falls in between
                frame = self._newest(topic, job_id)
                if frame is not None and frame.link != link:
                    return
                if frame is not None and frame.version != seen:
                    seen = frame.version
                    yield frame.body or b""
                    if frame.is_over:
                        return
                    if topic.watchers == 1 and topic.frame is frame:
                        topic.frame = replace(frame, body=None)  # 10,000 would be more than all the rest
                elif not changed.wait(self._patience(topic)) and not self._is_due(topic):
                    yield b": still here\n\n"
        finally:
            self._leave(job_id, topic)

    def wake(self, changes: Changes) -> None:
        """Tell the streams of these jobs; a job that changes often is told at a bounded rate."""
        for job_id in changes:
            topic = self._topics.get(job_id)
            if topic and not topic.due:
                topic.due = True
                wait = topic.made_at + (SHORTEST_INTERVAL if job_id else SHORTEST_OF_ANY) - time()
                if wait > 0:
                    gevent.spawn_later(wait, self._tell, topic)
                else:
                    self._tell(topic)

    def _tell(self, topic: _Topic) -> None:
        topic.due, topic.stale = False, True
        changed, topic.changed = topic.changed, Event()
        changed.set()

    def _join(self, job_id: str) -> _Topic:
        topic = self._topics.get(job_id)
        if topic is None:
            topic = self._topics[job_id] = _Topic(Event(), Semaphore())
        elif topic.frame and topic.frame.body is None:
            topic.stale = True
        topic.watchers += 1
        if not self._listener:
            self._listener = gevent.spawn(self._listen)
        return topic

    def _leave(self, job_id: str, topic: _Topic) -> None:
        topic.watchers -= 1
        if not topic.watchers and self._topics.get(job_id) is topic:
            del self._topics[job_id]

    def _newest(self, topic: _Topic, job_id: str) -> Frame | None:
        if topic.stale or topic.making.locked() or self._is_due(topic):
            with topic.making:
                if topic.stale or self._is_due(topic):
                    topic.stale, topic.made_at = False, time()
                    try:
                        topic.frame = self._make(job_id)
                    except SQLAlchemyError as error:
                        log.warning("a stream waits for the database: %s", type(error).__name__)
                        gevent.spawn_later(RETRY_AFTER, self._tell, topic)
        return topic.frame

    @staticmethod
    def _is_due(topic: _Topic) -> bool:
        """Whether the clock alone has made the frame another state."""
        at = topic.frame.changes_at if topic.frame else None
        return at is not None and time() >= at and topic.made_at < at

    @staticmethod
    def _patience(topic: _Topic) -> float:
        now, at = time(), topic.frame.changes_at if topic.frame else None
        keep_alive = KEEP_ALIVE - now % TOGETHER
        return keep_alive if at is None else min(keep_alive, max(at - now, 0.01))

    def _listen(self) -> None:
        """While somebody watches: hear of the others' commits, and look anew after each interruption."""
        while self._topics:
            try:
                hear = self._ask if self._engine.dialect.name == "sqlite" else self._hear
                for changes in hear():
                    self.wake(changes)
            except Exception as error:  # whatever it was, a silent listener would be worse
                log.warning("listening for changes again: %s", type(error).__name__)
                gevent.sleep(RETRY_AFTER)

    def _everything(self) -> Changes:
        return dict.fromkeys(self._topics, 0)

    def _ask(self) -> Iterator[Changes]:
        """SQLite: ask whether any other connection has committed, and then what."""
        with self._engine.connect() as connection:
            ask = connection.connection.cursor()
            known, version = -1, newest_version(connection)
            connection.rollback()
            yield self._everything()
            while self._topics:
                gevent.sleep(ASK_EVERY)
                now = ask.execute("PRAGMA data_version").fetchone()[0]
                if now != known:
                    known = now
                    newer = select(attempts.c.job_id, attempts.c.version)
                    rows = connection.execute(newer.where(attempts.c.version > version))
                    changes = {row.job_id: row.version for row in rows}
                    connection.rollback()
                    version = max(changes.values(), default=version)
                    yield self._others(changes)

    def _hear(self) -> Iterator[Changes]:
        """PostgreSQL: LISTEN on a connection of its own, looked after every half minute."""
        raw = self._engine.raw_connection()
        connection: Any = raw.driver_connection
        raw.detach()  # from the pool, which would otherwise be one short
        try:
            connection.rollback()
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            yield self._everything()
            while self._topics:
                for notification in connection.notifies(timeout=30):
                    lines = (line.split() for line in notification.payload.splitlines())
                    yield self._others({job_id: int(version) for job_id, version in lines})
                connection.execute("SELECT 1")
        finally:
            connection.close()

    def _others(self, changes: Changes) -> Changes:
        """Without those that the streams show already, as after a commit of our own."""
        if changes:
            changes = changes | {ANY: max(changes.values())}
        return {
            job_id: version
            for job_id, version in changes.items()
            if (topic := self._topics.get(job_id)) and not (topic.frame and topic.frame.number >= version)
        }
