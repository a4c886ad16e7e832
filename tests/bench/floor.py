"""Floors in the product's own worker.

`app` is the product's, with a route that verifies and reads a callback, and stores nothing. `bare`
answers each stream without Flask, hub and database.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import time
from typing import Any

from flask import Response, jsonify
from gevent.event import Event

from webapp.app import create_app
from webapp.parts import parts
from webapp.routes import callbacks
from webapp.rules.report import BadField, parse, read, sent_at

app = create_app()
app.view_functions["callbacks.receive"] = lambda: verify()


def verify() -> Response:
    arrived_at = time()
    settings = parts().settings
    body = callbacks._proved("X-Signature", settings.callback_keys)
    fields = parse(body)
    if abs(arrived_at - (sent_at(fields) or arrived_at)) > settings.callback_max_skew:
        raise BadField("sent_at")
    read(fields, body, arrived_at)
    return jsonify(received=True, duplicate=False)


class Bare:
    """Each stream gets the bytes of a file and stays open; everything else is the product's."""

    def __init__(self, frame: bytes) -> None:
        self.frame, self.extensions = frame, app.extensions  # of which the worker asks

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """WSGI."""
        if not environ["PATH_INFO"].endswith("/events"):
            return app(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return self._stream()

    def _stream(self) -> Iterator[bytes]:
        yield self.frame
        Event().wait()


bare = Bare(Path(os.environ.get("BENCH_FRAME", os.devnull)).read_bytes())
