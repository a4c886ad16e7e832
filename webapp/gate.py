"""The gate before the app: watchers enter a few at a time, so that thousands never stand before a callback.

The machine's door and `/healthz` do not pass here.
"""

from collections import deque
from collections.abc import Callable

from gevent.event import Event

AT_ONCE = 8


class Gate:
    """Requests wait here in turn, streams before all others: a page whose stream has come polls no more."""

    def __init__(self) -> None:
        self._free = AT_ONCE
        self._streams: deque[Event] = deque()
        self._others: deque[Event] = deque()

    def enter(self, is_stream: bool) -> Callable[[], None]:
        """Wait for a turn; call what this returns at its end."""
        if self._free:
            self._free -= 1
            return self._leave
        line, turn = self._streams if is_stream else self._others, Event()
        line.append(turn)
        try:
            turn.wait()
        except BaseException:  # its connection was closed meanwhile
            if turn.is_set():
                self._leave()
            else:
                line.remove(turn)
            raise
        return self._leave

    def _leave(self) -> None:
        if line := self._streams or self._others:
            line.popleft().set()
        else:
            self._free += 1
