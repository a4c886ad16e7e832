"""The open connections of a worker, and who must leave when there are too many."""

import resource
from ipaddress import ip_network
from time import monotonic

import gevent
from gevent import getcurrent

MOST = 20_000  # connections of a worker, as far as the limit of open files allows
UNFINISHED_PER_ORIGIN = 100  # requests of one address that have arrived in part; a proxy is one address, too


class Connection:
    """One client's connection, and the greenlet that serves it.

    `idle_since` (monotonic seconds) before a request has begun; `origin` is its address or IPv6 network.
    """

    __slots__ = ("greenlet", "idle_since", "origin")

    def __init__(self, address: str) -> None:
        self.greenlet = getcurrent()
        self.idle_since: float | None = monotonic()
        self.origin = address if "." in address else str(ip_network((address, 64), strict=False))


class Connections:
    """The open connections of a worker, and who must leave when there are too many.

    A whole request is never refused: what waits longest for its client makes room.
    """

    def __init__(self) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.most = min(files - min(files // 4, 200), MOST)  # the database and the log have files, too
        self.waiting: dict[Connection, None] = {}  # for their clients, the longest wait first
        self.served: dict[Connection, None] = {}
        self.unfinished: dict[str, dict[Connection, None]] = {}  # by origin, the oldest first

    @property
    def is_crowded(self) -> bool:
        """Whether another stream would take one of the connections that are kept for everything else."""
        return len(self.served) > self.most * 0.9

    def add(self, connection: Connection) -> None:
        """A connection that waits for a request, from now on."""
        self.served.pop(connection, None)
        self.waiting[connection] = None
        if len(self.waiting) + len(self.served) > self.most:
            self.make_room()

    def make_room(self) -> None:
        """Close the connection that has waited longest."""
        for connection in self.waiting:
            self._close(connection)
            return

    def is_arriving(self, connection: Connection) -> None:
        """A request has arrived in part; of one origin's, the oldest is closed for a newer one."""
        siblings = self.unfinished.setdefault(connection.origin, {})
        siblings[connection] = None
        if len(siblings) > min(UNFINISHED_PER_ORIGIN, self.most // 4):
            self._close(next(iter(siblings)))

    def is_whole(self, connection: Connection) -> None:
        """Its request has arrived."""
        self._forget(connection)
        self.served[connection] = None

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        self._forget(connection)
        self.served.pop(connection, None)

    def _close(self, connection: Connection) -> None:
        self._forget(connection)
        gevent.kill(connection.greenlet)

    def _forget(self, connection: Connection) -> None:
        self.waiting.pop(connection, None)
        if siblings := self.unfinished.get(connection.origin):
            siblings.pop(connection, None)
            if not siblings:
                del self.unfinished[connection.origin]
