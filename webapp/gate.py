"""The gate before the app: watchers enter a few at a time, so that thousands never stand before a callback.

The machine's door and `/healthz` do not pass here.
"""

from collections import deque

import gevent
from gevent.event import Event

INSIDE = 8  # at once: fewer than the database has connections
A_TURN = 4  # in one turn of the event loop: gevent runs 50 ready greenlets before it looks at the sockets
SHORTEST_SLEEP = 1e-6  # seconds, after which the event loop has looked at everything else


class Gate:
    """Requests wait here in line, streams before all others: a page whose stream has come polls no more."""

    def __init__(self) -> None:
        self._inside, self._left = 0, A_TURN
        self._streams: deque[Event] = deque()
        self._others: deque[Event] = deque()
        self._turning: gevent.Greenlet[[], None] | None = None

    def enter(self, is_stream: bool) -> None:
        """Wait for a turn; `leave` after it."""
        if not self._turning:
            self._turning = gevent.spawn(self._turn)
        if self._left and self._inside < INSIDE:
            self._left -= 1
            self._inside += 1
            return
        line, turn = self._streams if is_stream else self._others, Event()
        line.append(turn)
        try:
            turn.wait()
        except BaseException:  # its connection was closed meanwhile
            if turn.is_set():
                self.leave()
            else:
                line.remove(turn)
            raise

    def leave(self) -> None:
        """Make way for the next."""
        self._inside -= 1

    def _turn(self) -> None:
        """A greenlet, while there is a line: let the next ones in at each turn of the event loop."""
        while self._left < A_TURN or self._streams or self._others:
            gevent.sleep(SHORTEST_SLEEP if self._inside < INSIDE else 0.002)
            self._left = A_TURN
            while self._left and self._inside < INSIDE and (line := self._streams or self._others):
                line.popleft().set()
                self._left -= 1
                self._inside += 1
