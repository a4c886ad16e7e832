"""Floors in the product's own worker: the product's app with a door that does less.

A callback is verified, read and answered, and not stored; with BENCH_ROUTE by a route of Flask, not by
the door before it. Where BENCH_FRAME names a file, each stream is answered with its bytes, without Flask,
hub and database.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flask import Response, g, jsonify, request
from gevent.event import Event

from webapp.app import create_app
from webapp.parts import parts
from webapp.routes import callbacks


def verify() -> Response:
    """The door, as a route."""
    return jsonify(callbacks._receive(request.environ, parts(), g.noted))


if is_route := "BENCH_ROUTE" in os.environ:
    callbacks.set_up = lambda app: None
app = create_app()
if is_route:
    app.view_functions["callbacks.receive"] = verify
app.extensions["milepost"].writer.receive = lambda report: (False, 0)


class Bare:
    """Each stream gets the same bytes and stays open; everything else is the app's."""

    def __init__(self, wsgi_app: Any, frame: bytes) -> None:
        self._app, self._frame = wsgi_app, frame

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """WSGI."""
        if not environ["PATH_INFO"].endswith("/events"):
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return self._stream()

    def _stream(self) -> Iterator[bytes]:
        yield self._frame
        Event().wait()


if frame := os.environ.get("BENCH_FRAME"):
    app.wsgi_app = Bare(app.wsgi_app, Path(frame).read_bytes())  # type: ignore[method-assign]
