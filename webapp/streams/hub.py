"""The watched jobs of this process: whoever watches one is shown each of its changes, promptly and in order.

This process's writer tells of its changes here, `siblings` of those of other processes. Each stream is a
greenlet: a thread that costs little, and gives way to others only where it waits, as for an event, for
its client or for PostgreSQL. Between two waits nothing else runs, so nothing here needs a lock.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic, time

import gevent
from gevent import getcurrent
from gevent.event import Event
from greenlet import greenlet
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from webapp import logs
from webapp.page.view import View
from webapp.storage.database import reason
from webapp.storage.transaction import ANEW, Change, Changes
from webapp.streams.frames import ANY, Frame, Frames
from webapp.streams.siblings import Siblings

Comment = Callable[[], object]  # sends `: …` to a client at once, or raises OSError
COMMENT_EVERY = 19.0  # seconds; the contract: at least every 20 s
BEATS = 76  # in which each stream that waits is commented to once
SHORTEST_INTERVAL, SHORTEST_OF_ANY = 0.1, 1.0  # seconds between two frames of one job; of any
ASK_WANTED = 1.0  # seconds between two checks that the operator's session is open
RETRY_AFTER = 1.0  # seconds, when the database is away
BACK_PER_SECOND = 2000  # streams that come back after a restart, at random in the time that this takes


@dataclass(slots=True, eq=False)
class Topic:
    """One job that somebody watches, and the newest frame of it, made once however many there are.

    At rest `change` and `renewal` are None. A change starts the renewal: a greenlet that waits until the
    frame is old enough, makes the next one, sets `changed`, and ends if nothing has changed meanwhile.
    """

    job_id: str
    frame: Frame
    made_at: float = field(default_factory=monotonic)
    changed: Event = field(default_factory=Event)  # of this frame; the next one has one of its own
    watchers: int = 0
    change: Change | None = None  # the newest that the frame does not show
    renewal: "gevent.Greenlet[[Topic], None] | None" = None


class Hub:
    """Shows the streams what changes."""

    def __init__(self, engine: Engine, frames: Frames) -> None:
        self._frames = frames
        self._topics: dict[str, Topic] = {}
        self._is_ending, self._open = False, 0
        self._resting: list[dict[greenlet, Comment]] = [{} for _ in range(BEATS)]
        self._beat = 0
        self._beating: gevent.Greenlet[[], None] | None = None
        self.siblings = Siblings(engine, self._topics, self.wake)

    def watchers(self, job_id: str | None = None) -> int:
        """How many streams of this process are open: of a job, or all."""
        if job_id is None:
            return self._open
        return self._topics[job_id].watchers if job_id in self._topics else 0

    def end(self) -> None:
        """End all streams, now and from now on: the server stops."""
        self._is_ending = True
        logs.event("streams end", count=self._open, why="the server stops")
        for topic in self._topics.values():
            topic.changed.set()

    def events(
        self, view: View | None, comment: Comment, is_wanted: Callable[[], bool] | None = None, seen: str = ""
    ) -> Iterator[bytes]:
        """The newest frame of a job at once and after each change; without a view, of any job.

        A page that has the version `seen` is sent only the last sign of life, until something else changes.
        While this waits, `comment` is called now and then, past it: to wake it for that would cost ten times
        as much.
        Ends after the frame of a job that is over, when the link was revoked, and when `is_wanted`, which is
        asked before each frame and every second, says no. A slow reader gets the newest frame, no backlog.
        """
        if view is None or view.condition == "over" or view.attempt.last_signal_at is None:
            seen = ""
        topic, link = self._join(view, seen), view.link if view else 0
        del view  # of ten thousand streams
        began, frames, alive, ending = monotonic(), 0, b"", ""
        this, resting = getcurrent(), self._resting[self._later_beat()]
        try:
            while not (ending := self._ending(topic, link, is_wanted)):
                frame = topic.frame
                if frame.version != seen:
                    seen, alive, frames = frame.version, frame.alive, frames + 1
                    yield frame.body.replace(b"\n\n", self._retry(), 1)
                    if frame.is_over:
                        ending = "the job is over"
                        gevent.sleep(0)  # to close costs more than to send, so the others' frames first
                        break
                    if topic.watchers == 1 and topic.frame.version == seen:  # `_join` renders it again
                        topic.frame = topic.frame._replace(body=b"")  # 10,000 would be most of the memory
                elif frame.alive != alive:
                    alive = frame.alive
                    yield alive
                else:
                    resting[this] = comment
                    self._wait(topic, ASK_WANTED if is_wanted else inf)
                    del resting[this]
        finally:
            resting.pop(this, None)
            self._leave(topic, began, frames, ending or "the connection was closed")

    def wake(self, changes: Changes) -> None:
        """Show the streams of these jobs what has changed."""
        for job_id, change in changes.items():
            topic = self._topics.get(job_id)
            if topic is None or change.number == (known := topic.change or topic.frame).number:
                continue
            topic.change = change if change.number > known.number else ANEW  # after a restore they are lower
            if not topic.renewal:  # none, or one that has ended
                topic.renewal = gevent.spawn(self._renew, topic)

    def _renew(self, topic: Topic) -> None:
        interval = SHORTEST_INTERVAL if topic.job_id else SHORTEST_OF_ANY
        while topic.watchers and topic.change:
            gevent.sleep(max(topic.made_at + interval - monotonic(), 0))
            change, topic.change = topic.change, None
            if change.number <= topic.frame.number:  # a stream that joined meanwhile has shown a newer one
                self._show(topic, topic.frame)  # what waits for this one looks at the clock again
                continue
            try:
                if topic.job_id == ANY:
                    self._show(topic, self._frames.of_any_job())
                else:
                    view = self._frames.find(topic.job_id, change)  # may wait; `topic.frame` is read after it
                    self._show(topic, self._frames.of(view, topic.frame))
            except SQLAlchemyError as error:
                logs.log.warning("a stream waits for the database: %s", reason(error))
                topic.change = ANEW
                gevent.sleep(RETRY_AFTER)
            except Exception:  # `siblings` compares what is shown, and so has it tried again
                logs.log.exception("no frame of a job", extra={"fields": {"job": topic.job_id}})
        topic.renewal = None

    def _show(self, topic: Topic, frame: Frame) -> None:
        topic.frame, topic.made_at = frame, monotonic()
        changed, topic.changed = topic.changed, Event()
        changed.set()

    def _wait(self, topic: Topic, seconds: float) -> None:
        """Wait for another frame, for so long, or until the moment at which time alone makes another one."""
        if topic.change is None:
            seconds = min(seconds, topic.frame.changes_at - time())
            if seconds <= 0:
                self.wake({topic.job_id: ANEW})
        topic.changed.wait(None if seconds == inf else max(seconds, 0.01))

    def _retry(self) -> bytes:
        """The line that ends an event: after how many ms a page that lost its stream returns, at random."""
        spread = random.random() * self._open / BACK_PER_SECOND  # noqa: S311
        return b"\nretry: %d\n\n" % (1000 + 1000 * spread)

    def _ending(self, topic: Topic, link: int, is_wanted: Callable[[], bool] | None) -> str:
        """Why a stream ends now, "" where it does not."""
        if self._is_ending:
            return "the server stops"
        if is_wanted and not is_wanted():
            return "the session ended"
        return "" if topic.frame.link == link else "the link opens nothing any more"

    def _join(self, view: View | None, seen: str) -> Topic:
        """The topic of a view's job: its frame is no older than the view, with a body unless it was seen."""
        job_id = view.job_id if view else ANY
        topic = self._topics.get(job_id)
        has_all = topic and (topic.frame.body or topic.frame.version == seen)
        if topic is None or not has_all or (view and topic.frame.number < view.attempt.change):
            frame = self._frames.of(view, seen="" if topic else seen) if view else self._frames.of_any_job()
            if topic is None:
                topic = self._topics[job_id] = Topic(job_id, frame)
            else:
                self._show(topic, frame)
        topic.watchers += 1
        self._open += 1
        self.siblings.listen()
        if not self._beating:  # none, or one that has ended
            self._beating = gevent.spawn(self._keep_beating)
        return topic

    def _later_beat(self) -> int:
        """At random, so that what came back together rests apart; not at once, for it was just written to."""
        return (self._beat + random.randint(BEATS // 3, BEATS - 1)) % BEATS  # noqa: S311

    def _keep_beating(self) -> None:
        """Comment to the streams that wait: to some at each beat, so that the process sleeps in between."""
        at = monotonic()
        while self._open:
            at = max(at + COMMENT_EVERY / BEATS, monotonic() - 1)  # late by more than that, it skips some
            gevent.sleep(max(at - monotonic(), 0))
            self._beat = (self._beat + 1) % BEATS
            with suppress(MemoryError):  # a comment is missing, then
                for stream, comment in [*self._resting[self._beat].items()]:
                    try:
                        comment()
                    except BlockingIOError:
                        pass  # it has yet to read what was sent before
                    except OSError:
                        gevent.kill(stream)
                self.siblings.listen()

    def _leave(self, topic: Topic, began: float, frames: int, why: str) -> None:
        topic.watchers -= 1
        self._open -= 1
        if not topic.watchers:
            del self._topics[topic.job_id]
        if not self._is_ending:  # ten thousand lines would delay the stop
            seconds = round(monotonic() - began, 1)
            logs.event("stream ended", job=topic.job_id or None, seconds=seconds, frames=frames, why=why)
