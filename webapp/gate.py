"""The gate before the app: watchers enter a few at a time, so that thousands never stand before a callback.

The machine's door and `/healthz` do not pass here.
"""

from contextlib import nullcontext
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore
from werkzeug.exceptions import ServiceUnavailable

from webapp.config import CALLBACK_PATH
from webapp.connections import Connections

INSIDE = 8  # at once: fewer than the database has connections
OTHERS = 6  # of these what is no stream: some of it may wait for GitHub
A_TURN = 1e-6  # seconds; gevent runs 50 ready greenlets before it looks at the sockets, but a timer after it


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
        if is_stream and self._connections.are_crowded:
            return ServiceUnavailable("too many streams are open")(environ, start_response)
        with nullcontext() if is_stream else self._others, self._inside:
            gevent.sleep(A_TURN)
            return self._app(environ, start_response)  # what it sends, and a stream, goes on outside
