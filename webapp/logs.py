"""One line per request and per event that matters: JSON on stderr, so that no input can forge a line.

A path can carry a share token and a query a search, so a request is logged by its route alone.
"""

import itertools
import json
import logging
import secrets
import sys
from time import perf_counter
from typing import Any

from flask import Flask, Response, g, has_request_context, request

from webapp.page.view import iso

LONGEST = 300  # characters of any one value
_ENCODER = json.JSONEncoder(default=str)
log = logging.getLogger("webapp")
_process = secrets.token_hex(4)
_count = itertools.count(1)


class JsonLines(logging.Formatter):
    """A record as one line of ASCII JSON, with the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        """`extra={"fields": {...}}` are members of the line."""
        line: dict[str, Any] = {"time": iso(record.created), "level": record.levelname.lower()}
        if has_request_context():
            line["request"] = g.request_id
        line |= {"event": record.getMessage()[:LONGEST], **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _ENCODER.encode(line)


def event(name: str, **fields: object) -> None:
    """Log something that matters, with what it was about; never a secret, never a link's token."""
    log.info(name, extra={"fields": fields})


def set_up(app: Flask) -> None:
    """A line and an `X-Request-Id` for each request."""
    logging.logThreads = False  # a record's thread is not told, and would cost each stream a stand-in of one
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)

    @app.before_request
    def begin() -> None:
        g.began, g.request_id = perf_counter(), f"{_process}-{next(_count):x}"

    @app.after_request
    def end(response: Response) -> Response:
        response.headers.add("X-Request-Id", g.request_id)
        write(response)
        return response


def write(response: Response) -> None:
    """The line of a request; `g.job_id` and `g.cause` are set by who knows them."""
    rule = request.url_rule
    fields = {
        "method": request.method[:LONGEST],
        "route": rule.rule if rule else None,
        "status": response.status_code,
        "ms": round((perf_counter() - g.began) * 1000, 1),
        "address": request.remote_addr,
    }
    if job_id := g.get("job_id") or (request.view_args or {}).get("job_id"):
        fields["job"] = job_id[:LONGEST]
    if cause := g.get("cause"):
        fields["cause"] = cause[:LONGEST]
    log.info("request", extra={"fields": fields})
