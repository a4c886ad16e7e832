"""Wakes the streams when a job changes: in this process, in its siblings, on other hosts.

This process is told by its own writer at each commit. The others' commits are seen on SQLite by
asking `PRAGMA data_version`, which costs microseconds, and heard on PostgreSQL with LISTEN.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EPIPE
from time import time
from typing import Any

import gevent
from gevent import getcurrent
from gevent.event import Event
from gevent.lock import Semaphore
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from webapp.storage.jobs import CURRENT, changes_since, newest_change
from webapp.storage.transaction import ANEW, CHANNEL, Change, Changes
from webapp.streams.frames import ANY, Frame, Make

ASK_EVERY, ASK_AT_REST = 0.02, 0.05  # seconds between two looks for a sibling's commits
AT_REST_AFTER = 10.0  # seconds in which nobody committed
KEEP_ALIVE, BEAT = 19.0, 0.25  # seconds; the contract: a comment at least every 20 s
SHORTEST_INTERVAL, SHORTEST_OF_ANY = 0.1, 1.0  # between two frames of one job; of any
ASK_WANTED = 1.0  # seconds between two looks whether an operator's stream goes on
RETRY_AFTER = 1.0  # when the database is away

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Topic:
    """One job that somebody watches: its newest frame, made once however many there are.

    `change` is the newest that the frame does not show yet, told at once or, where `due`, a little later;
    a frame that is `stale` is made anew.
    """

    changed: Event
    making: Semaphore
    watchers: int = 0
    frame: Frame | None = None
    change: Change | None = None
    stale: bool = True
    made_at: float = 0.0
    due: bool = False
    clock: Any = None


@dataclass(slots=True, eq=False)
class _Stream:
    """One watcher's open connection; `comment` sends one without waiting, or raises OSError."""

    greenlet: Any
    comment: Callable[[], object]
    due_at: float
    is_open: bool = True
    is_idle: bool = False


class Hub:
    """The watched jobs of this process; `make` renders a job's frame, from the change where that has all."""

    def __init__(self, engine: Engine, make: Make) -> None:
        self._engine = engine
        self._make = make
        self._topics: dict[str, _Topic] = {}
        self._streams: deque[_Stream] = deque()  # those whose comment is due soonest first
        self._listener: gevent.Greenlet[[], None] | None = None
        self._is_ending = False

    def end(self) -> None:
        """End all streams, now and from now on: the server stops."""
        self._is_ending = True
        for topic in self._topics.values():
            self._tell(topic)

    def events(
        self,
        job_id: str,
        comment: Callable[[], object],
        link: int = 0,
        is_wanted: Callable[[], bool] | None = None,
    ) -> Iterator[bytes]:
        """The newest frame at once and after each change; `comment` is called when it is idle for long.

        Ends after a frame that is over, without one of another link than this (it was revoked), and
        once `is_wanted`, asked before each frame and every second, says no.
        A slow reader gets the newest frame, never a backlog.
        """
        topic, seen, alive = self._join(job_id), None, b""
        stream = _Stream(getcurrent(), comment, time() + KEEP_ALIVE)
        if not self._streams:
            gevent.spawn(self._keep_alive)
        self._streams.append(stream)
        try:
            while not self._is_ending and (is_wanted is None or is_wanted()):
                changed = topic.changed  # taken before the look, so that no change falls in between
                frame = self._newest(topic, job_id)
                if frame is not None and frame.link != link:
                    return
                if frame is not None and frame.version != seen:
                    seen, alive = frame.version, frame.alive
                    yield frame.body or b""
                    if frame.is_over:
                        gevent.sleep(0)  # to close costs more than to send, so the others' frames first
                        return
                    if topic.watchers == 1 and topic.frame is frame:
                        topic.frame = frame._replace(body=None)  # 10,000 would be more than all the rest
                elif frame is not None and frame.alive != alive:
                    alive = frame.alive
                    yield alive
                else:
                    stream.is_idle = True
                    changed.wait(ASK_WANTED if is_wanted else None)
                    stream.is_idle = False
        finally:
            stream.is_open = stream.is_idle = False
            self._leave(job_id, topic)

    def watchers(self, job_id: str | None = None) -> int:
        """How many streams of this process are open: of a job, or all."""
        return sum(topic.watchers for id, topic in self._topics.items() if job_id in (id, None))

    def wake(self, changes: Changes) -> None:
        """Tell the streams of these jobs; a job that changes often is told at a bounded rate."""
        for job_id, change in changes.items():
            topic = self._topics.get(job_id)
            if topic is None:
                continue
            if topic.change is None or change.number > topic.change.number:
                topic.change = change
            if not topic.due:
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

    def _look_anew(self, topic: _Topic) -> None:
        topic.change = ANEW
        self._tell(topic)

    def _join(self, job_id: str) -> _Topic:
        topic = self._topics.get(job_id)
        if topic is None:
            topic = self._topics[job_id] = _Topic(Event(), Semaphore())
        elif topic.frame and topic.frame.body is None:
            topic.stale, topic.frame = True, None
        topic.watchers += 1
        if not self._listener:
            self._listener = gevent.spawn(self._listen)
        return topic

    def _leave(self, job_id: str, topic: _Topic) -> None:
        topic.watchers -= 1
        if not topic.watchers:
            self._wind(topic, None)
            del self._topics[job_id]

    def _newest(self, topic: _Topic, job_id: str) -> Frame | None:
        if topic.stale or topic.making.locked():
            with topic.making:
                if topic.stale:
                    change, topic.change = topic.change or ANEW, None
                    topic.stale, topic.made_at = False, time()
                    if topic.frame and change.number < topic.frame.number:
                        change = ANEW
                    try:
                        topic.frame = self._make(job_id, change, topic.frame)
                        self._wind(topic, topic.frame.changes_at)
                    except SQLAlchemyError as error:
                        log.warning("a stream waits for the database: %s", type(error).__name__)
                        gevent.spawn_later(RETRY_AFTER, self._look_anew, topic)
        return topic.frame

    def _wind(self, topic: _Topic, at: float | None) -> None:
        """Set the topic's clock to look anew at that time."""
        if topic.clock:
            topic.clock.close()
        topic.clock = None
        if at is not None and topic.watchers:
            topic.clock = gevent.get_hub().loop.timer(max(at - time(), 0.01))
            topic.clock.start(self._look_anew, topic)

    def _keep_alive(self) -> None:
        """Send the idle streams' comments, all from one greenlet: waking each of them costs far more."""
        while self._streams:
            gevent.sleep(BEAT)
            now = time()
            while self._streams and self._streams[0].due_at <= now:
                stream = self._streams.popleft()
                if not stream.is_open:
                    continue
                stream.due_at = now + KEEP_ALIVE
                self._streams.append(stream)
                if stream.is_idle:
                    try:
                        stream.comment()
                    except OSError:
                        gevent.kill(stream.greenlet, BrokenPipeError(EPIPE, "the watcher is gone"))

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
        return dict.fromkeys(self._topics, ANEW)

    def _ask(self) -> Iterator[Changes]:
        """SQLite: ask whether any other connection has committed, and then what."""
        with self._engine.connect() as connection:
            ask = connection.connection.cursor()
            known, number, last = -1, newest_change(connection), time()
            connection.rollback()
            yield self._everything()
            while self._topics:
                gevent.sleep(ASK_EVERY if time() < last + AT_REST_AFTER else ASK_AT_REST)
                now = ask.execute("PRAGMA data_version").fetchone()[0]
                if now != known:
                    known, last = now, time()
                    newer = changes_since(connection, number)
                    number = max([number, *newer.values()])
                    changes = self._others({job_id: Change(each) for job_id, each in newer.items()})
                    watched = connection.execute(CURRENT, {"ids": [*changes]}) if len(changes) > 1 else ()
                    changes |= {row.job_id: Change(row.change, row) for row in watched}
                    connection.rollback()
                    yield changes

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
                    yield self._others({job_id: Change(int(number)) for job_id, number in lines})
                connection.execute("SELECT 1")
        finally:
            connection.close()

    def _others(self, changes: Changes) -> Changes:
        """Without those that no stream shows, or shows already, as after a commit of our own; and ANY."""
        others = {
            job_id: change
            for job_id, change in changes.items()
            if (topic := self._topics.get(job_id))
            and not (topic.frame and topic.frame.number >= change.number)
        }
        return others | ({ANY: Change(max(c.number for c in changes.values()))} if changes else {})
