"""The open connections of a worker, and which must end when there are too many."""

import resource
from collections import defaultdict
from math import inf
from time import monotonic

import gevent
from greenlet import greenlet

MOST = 20_000  # connections of a worker, as far as the limit of open files allows
UNFINISHED_PER_ORIGIN = 100  # requests of one address that have arrived in part; a proxy is one address, too


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

    @property
    def are_crowded(self) -> bool:
        """Whether another stream would take one of the connections that are kept for everything else."""
        return len(self.served) > self.most * 0.9

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
