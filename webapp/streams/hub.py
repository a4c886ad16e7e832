"""The watched jobs of this process: whoever watches one is shown each of its changes, promptly and in order.

A change is told here by this process's writer, or by `siblings`. Each stream is a greenlet, a thread that
costs little and gives way to others only where it waits: for its topic's event, or for its client.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic, time
from typing import Any

import gevent
from gevent.event import Event
from gevent.lock import Semaphore
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from webapp import logs
from webapp.storage.database import reason
from webapp.storage.transaction import ANEW, Change, Changes
from webapp.streams.frames import Frame, Make
from webapp.streams.siblings import Siblings

COMMENT = b": still here\n\n"
COMMENT_EVERY = 19.0  # seconds; the contract: at least every 20 s
SHORTEST_INTERVAL, SHORTEST_OF_ANY = 0.1, 1.0  # seconds between two frames of one job; of any
ASK_WANTED = 1.0  # seconds between two looks whether an operator's stream goes on
RETRY_AFTER = 1.0  # seconds, when the database is away
BACK_PER_SECOND = 2000  # streams that come back after a restart, at random in the time that this takes


@dataclass(slots=True, eq=False)
class Topic:
    """One job that somebody watches: its newest frame, made once however many there are.

    `change` is the newest that the frame does not show yet; a stream that `changed` woke makes the next
    frame of it. While that waits a little, `due` is the greenlet that will wake them. `clock` is the timer
    of the moment at which time alone changes the page.
    """

    changed: Event
    making: Semaphore
    watchers: int = 0
    frame: Frame | None = None
    change: Change | None = ANEW
    made_at: float = 0.0
    due: Any = None
    clock: Any = None

    @property
    def is_stale(self) -> bool:
        """Whether the next frame is to be made now."""
        return self.change is not None and (self.due is None or self.frame is None)


class Hub:
    """Tells the streams; `make` renders a job's frame, from the change where that has all."""

    def __init__(self, engine: Engine, make: Make) -> None:
        self._make = make
        self._topics: dict[str, Topic] = {}
        self._is_ending, self._open = False, 0
        self.siblings = Siblings(engine, self._topics, self.wake)

    def watchers(self, job_id: str | None = None) -> int:
        """How many streams of this process are open: of a job, or all."""
        if job_id is None:
            return self._open
        topic = self._topics.get(job_id)
        return topic.watchers if topic else 0

    def end(self) -> None:
        """End all streams, now and from now on: the server stops."""
        self._is_ending = True
        logs.event("streams end", count=self.watchers(), why="the server stops")
        for topic in self._topics.values():
            self._tell(topic)

    def events(
        self, job_id: str, link: int = 0, is_wanted: Callable[[], bool] | None = None
    ) -> Iterator[bytes]:
        """The newest frame at once and after each change, and comments between them.

        Raises SQLAlchemyError where the first frame cannot be had; later ones are waited for.
        Ends after a frame that is over, without one of another link than this (it was revoked), and
        once `is_wanted`, asked before each frame and every second, says no.
        A slow reader gets the newest frame, never a backlog.
        """
        topic, began, frames, why = self._join(job_id), monotonic(), 0, "the connection was closed"
        seen, alive = None, b""
        # At random, or streams that came back together after a restart would all be woken together.
        comment_at = began + COMMENT_EVERY * random.uniform(0.3, 1)  # noqa: S311
        try:
            while not (ending := self._ending(is_wanted)):
                changed = topic.changed  # taken before the look, so that no change falls in between
                try:
                    frame = self._newest(topic, job_id)
                except SQLAlchemyError:
                    if seen is None:  # the answer has not begun: it can be a 503
                        raise
                    frame = None
                if frame and frame.link != link:
                    ending = "the link opens nothing any more"
                    break
                if (
                    frame and frame.version != seen and frame.body is None
                ):  # made anew for others, who have it
                    topic.change, topic.frame = ANEW, None
                    continue
                if frame and frame.version != seen:
                    seen, alive, frames = frame.version, frame.alive, frames + 1
                    yield (frame.body or b"").replace(b"\n\n", self._retry(), 1)
                    if frame.is_over:
                        ending = "the job is over"
                        gevent.sleep(0)  # to close costs more than to send, so the others' frames first
                        break
                    if topic.watchers == 1 and topic.frame is frame:  # 10,000 would be most of the memory
                        topic.frame = frame._replace(body=None)
                elif frame and frame.alive != alive:
                    alive = frame.alive
                    yield alive
                elif (left := comment_at - monotonic()) > 0:
                    changed.wait(min(left, ASK_WANTED) if is_wanted else left)
                else:
                    comment_at = monotonic() + COMMENT_EVERY
                    self.siblings.listen()
                    yield COMMENT
            why = ending
        finally:
            self._leave(job_id, topic)
            if not self._is_ending:  # ten thousand lines would delay the stop
                seconds = round(monotonic() - began, 1)
                logs.event("stream ended", job=job_id or None, seconds=seconds, frames=frames, why=why)

    def wake(self, changes: Changes) -> None:
        """Tell the streams of these jobs; a job that changes often is told at a bounded rate."""
        for job_id, change in changes.items():
            topic = self._topics.get(job_id)
            if topic is None:
                continue
            if topic.change is None or change.number > topic.change.number:
                topic.change = change
            elif change.number < topic.change.number:  # numbers can fall, as by a restore
                topic.change = ANEW
            if not topic.due:
                wait = topic.made_at + (SHORTEST_INTERVAL if job_id else SHORTEST_OF_ANY) - monotonic()
                if wait > 0:
                    topic.due = gevent.spawn_later(wait, self._tell, topic)
                else:
                    self._tell(topic)

    def _retry(self) -> bytes:
        """The end of an event: when a page comes back that loses its stream, spread out as there are many."""
        spread = random.random() * self._open / BACK_PER_SECOND  # noqa: S311
        return b"\nretry: %d\n\n" % (1000 + 1000 * spread)

    def _ending(self, is_wanted: Callable[[], bool] | None) -> str:
        """Why a stream ends now, "" where it does not."""
        if self._is_ending:
            return "the server stops"
        return "the session ended" if is_wanted and not is_wanted() else ""

    def _tell(self, topic: Topic) -> None:
        topic.due = None
        changed, topic.changed = topic.changed, Event()
        changed.set()

    def _look_anew(self, topic: Topic) -> None:
        topic.change = ANEW
        self._tell(topic)

    def _join(self, job_id: str) -> Topic:
        topic = self._topics.get(job_id)
        if topic is None:
            topic = self._topics[job_id] = Topic(Event(), Semaphore())
        elif topic.frame and topic.frame.body is None:
            topic.change, topic.frame = ANEW, None
        topic.watchers += 1
        self._open += 1
        self.siblings.listen()
        return topic

    def _leave(self, job_id: str, topic: Topic) -> None:
        topic.watchers -= 1
        self._open -= 1
        if not topic.watchers:
            self._wind(topic, None)
            del self._topics[job_id]

    def _newest(self, topic: Topic, job_id: str) -> Frame | None:
        """The topic's frame, after its change where there is one that nobody has shown yet."""
        if topic.is_stale or topic.making.locked():
            with topic.making:
                if topic.is_stale and topic.change:
                    self._show_change(topic, job_id, topic.change)
        return topic.frame

    def _show_change(self, topic: Topic, job_id: str, change: Change) -> None:
        topic.change, topic.made_at = None, monotonic()
        if topic.frame and change.number < topic.frame.number:
            change = ANEW
        try:
            topic.frame = self._make(job_id, change, topic.frame)
            self._wind(topic, topic.frame.changes_at)
        except SQLAlchemyError as error:
            logs.log.warning("a stream waits for the database: %s", reason(error))
            topic.change, topic.due = ANEW, gevent.spawn_later(RETRY_AFTER, self._tell, topic)
            raise
        except BaseException:  # such as MemoryError: this stream ends, the next one tries again
            topic.change = ANEW
            raise

    def _wind(self, topic: Topic, at: float | None) -> None:
        """Set the topic's clock to look anew at that time."""
        if topic.clock:
            topic.clock.close()
        topic.clock = None
        if at is not None and topic.watchers:
            topic.clock = gevent.get_hub().loop.timer(max(at - time(), 0.01))
            topic.clock.start(self._look_anew, topic)
