"""Who has a place: the connections of a worker, whose turn it is, and the gate before the app.

Watchers come in a few at a time, so that thousands never stand before a callback. The machine's door and
`/healthz` wait for no turn and pass no gate.
"""

import re
import resource
from collections import defaultdict
from contextlib import nullcontext
from math import inf
from time import monotonic
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore
from greenlet import greenlet
from werkzeug.exceptions import ServiceUnavailable

from webapp.config import CALLBACK_PATH

MOST = 20_000  # connections of a worker, as far as the limit of open files allows
UNFINISHED_PER_ORIGIN = 100  # requests of one address that have arrived in part; a proxy is one address, too
AT_ONCE = 16  # requests that begin in one turn of the event loop
INSIDE = 6  # of each line at the gate: all of them are fewer than the database has connections
URGENT = re.compile(rb"POST |GET [^ ?]*/healthz[ ?]")
STREAM = re.compile(rb"GET [^ ?]*/events[ ?]")
PAUSE = 0.02  # seconds, in place of a turn, while connections wait to be accepted
A_TURN = 1e-6  # seconds; gevent runs 50 ready greenlets before it looks at the sockets, but a timer after it


class Connections:
    """The connections of a worker, each known by the greenlet that serves it.

    A whole request is never refused: the connection that waits longest for its client makes room.
    """

    def __init__(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(files - min(files // 4, 200), MOST)  # the database and the log have files, too
        # Those that wait for their clients, the longest wait first: since when (monotonic seconds) no
        # request has begun, inf where one has.
        self.waiting: dict[greenlet, float] = {}
        self.served: set[greenlet] = set()
        # Those whose request has arrived in part, the oldest first, by origin.
        self._unfinished: defaultdict[str, dict[greenlet, None]] = defaultdict(dict)
        self.are_all_accepted = True
        # One line for streams; all else has another, which enters the first a few at a time, so that a stream
        # is hardly ever behind it: a page whose stream has come asks for nothing more.
        self._turns, self._others = BoundedSemaphore(AT_ONCE), BoundedSemaphore(INSIDE)

    def wait(self, this: greenlet) -> None:
        """It waits for a request, from now on."""
        self.served.discard(this)
        self.waiting[this] = monotonic()
        if len(self.waiting) + len(self.served) > self.most:
            self.make_room()

    def make_room(self) -> None:
        """End the one that has waited longest."""
        if self.waiting:
            self._end(next(iter(self.waiting)))

    def arrive(self, this: greenlet, origin: str) -> None:
        """Its request has arrived in part; of one origin's, the oldest is ended for a newer one."""
        unfinished = self._unfinished[origin]
        self.waiting[this], unfinished[this] = inf, None
        if len(unfinished) > min(UNFINISHED_PER_ORIGIN, self.most // 4):
            oldest = next(iter(unfinished))
            del unfinished[oldest]
            self._end(oldest)

    def take_turn(self, this: greenlet, origin: str, came: bytes) -> None:
        """Wait before a request is parsed of which this `came`; what may be the machine's does not.

        A restart can bring 7,000 connections at once, and a callback may be the last of them: to accept them
        takes half a second, to parse and answer what they ask for many times as long.
        """
        if URGENT.match(came):
            return
        if b"\r\n\r\n" in came:
            self.serve(this, origin)
        with nullcontext() if STREAM.match(came) else self._others, self._turns:
            gevent.sleep(A_TURN if self.are_all_accepted else PAUSE)
            self.are_all_accepted = True  # as far as is known, until the next is accepted

    def serve(self, this: greenlet, origin: str) -> None:
        """Its request has arrived."""
        self.remove(this, origin)
        self.served.add(this)

    def remove(self, this: greenlet, origin: str) -> None:
        """It has ended."""
        self.served.discard(this)
        self.waiting.pop(this, None)
        self._unfinished[origin].pop(this, None)
        if not self._unfinished[origin]:
            del self._unfinished[origin]

    def _end(self, this: greenlet) -> None:
        self.waiting.pop(this, None)  # it ends a little later
        gevent.kill(this)


class Gate:
    """WSGI: what is no stream and not the machine's waits here in line, so that a few are inside at once.

    What is posted has a line of its own: it may wait for GitHub, in front of every page.
    """

    def __init__(self, app: Any, connections: Connections) -> None:
        self._app, self._connections = app, connections
        self._posts, self._others = BoundedSemaphore(INSIDE), BoundedSemaphore(INSIDE)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Wait for a place, and for a turn of the event loop, in which it looks at everything else."""
        path = environ["PATH_INFO"]
        is_stream = path.endswith("/events")
        if is_stream and len(self._connections.served) > self._connections.most * 0.9:  # a few stay free
            return ServiceUnavailable("too many streams are open")(environ, start_response)
        if is_stream or path.endswith(("/healthz", CALLBACK_PATH)):
            return self._app(environ, start_response)
        with self._posts if environ["REQUEST_METHOD"] == "POST" else self._others:
            gevent.sleep(A_TURN)
            return self._app(environ, start_response)  # what it sends goes on outside
