"""Who has a place: the connections of a worker, and the gate before the app.

Watchers enter a few at a time, so that thousands never stand before a callback. The machine's door and
`/healthz` do not pass the gate.
"""

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
INSIDE = 8  # at once: fewer than the database has connections
OTHERS = 6  # of these what is no stream: some of it may wait for GitHub
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
    """WSGI: requests wait here in line.

    Streams in one line, all others in another that enters the first a few at a time, so that a stream is
    hardly ever behind them: a page whose stream has come polls no more.
    """

    def __init__(self, app: Any, connections: Connections) -> None:
        self._app, self._connections = app, connections
        self._inside, self._others = BoundedSemaphore(INSIDE), BoundedSemaphore(OTHERS)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Wait for a turn, and a turn of the event loop, in which it looks at everything else."""
        path = environ["PATH_INFO"]
        if path.endswith(("/healthz", CALLBACK_PATH)):
            return self._app(environ, start_response)
        is_stream = path.endswith("/events")
        if is_stream and len(self._connections.served) > self._connections.most * 0.9:  # a few stay free
            return ServiceUnavailable("too many streams are open")(environ, start_response)
        with nullcontext() if is_stream else self._others, self._inside:
            gevent.sleep(A_TURN)
            return self._app(environ, start_response)  # what it sends, and a stream, goes on outside
