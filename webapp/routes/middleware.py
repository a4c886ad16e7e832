"""What every answer has: headers that protect, errors without internals, the log's line; and `/healthz`."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, g, has_request_context, jsonify, render_template, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadRequest, HTTPException, ServiceUnavailable
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import BaseConverter

from webapp import logs
from webapp.config import Settings
from webapp.parts import parts
from webapp.rules.report import JOB_ID, BadField
from webapp.storage.database import reason

WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9.]+):\d+")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors "
)
COMMENT = b": still here\n\n"
CHUNK = b"%X\r\n%b\r\n" % (len(COMMENT), COMMENT)  # the same in HTTP/1.1's framing
EVENT_STREAM = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx's
}

Wsgi = Callable[[dict[str, Any], Any], Any]


class JobId(BaseConverter):
    """`<id:…>` in a route: what cannot be the id of a job is a 404 like an unknown one."""

    regex = JOB_ID.pattern


def _adapted(app: Any, path: str) -> Any:
    """An app below the path of PUBLIC_URL, whether the proxy strips that path or passes it on.

    To it a client is its address alone, where a proxy tells its port, too.
    """

    def call(environ: dict[str, Any], start_response: Any) -> Any:
        if with_port := WITH_PORT.fullmatch(environ.get("REMOTE_ADDR", "")):
            environ["REMOTE_ADDR"] = with_port[1] or with_port[2]
        asked = environ["PATH_INFO"]
        if asked == path or asked.startswith(f"{path}/"):
            environ["PATH_INFO"] = asked[len(path) :] or "/"
        environ["SCRIPT_NAME"] = path
        return app(environ, start_response)

    return call


def framed_by(settings: Settings) -> str:
    """Who may frame a progress page."""
    return " ".join(settings.embed_origins) or "'none'"


def protective(settings: Settings, framers: str = "'none'") -> list[tuple[str, str]]:
    """The headers that protect an answer."""
    url = urlsplit(settings.public_url)
    headers = [("Content-Security-Policy", POLICY + framers)]
    headers += [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    if url.scheme == "https" and not url.path:  # below a path, the host is not ours to bind to https
        headers.append(("Strict-Transport-Security", "max-age=31536000"))
    return headers


def set_up(app: Flask, settings: Settings) -> None:
    """Proxies, headers, errors, the log's lines and `/healthz` for an app."""
    proxies, path = settings.trusted_proxies, urlsplit(settings.public_url).path
    inner = _adapted(app.wsgi_app, path)  # set as Flask documents it, which mypy takes for a method
    app.wsgi_app = ProxyFix(inner, x_for=proxies, x_proto=proxies)  # type: ignore[method-assign]
    everywhere = protective(settings)
    of_pages = protective(settings, framed_by(settings))

    @app.before_request
    def begin() -> None:
        g.began, g.request_id = perf_counter(), os.urandom(8).hex()  # a counter would tell how busy we are
        g.noted = {"job": job_id} if (job_id := (request.view_args or {}).get("job_id")) else {}

    @app.after_request
    def end(response: Response) -> Response:
        headers = response.headers
        headers.add("X-Request-Id", g.request_id)
        for name, value in of_pages if request.blueprint == "watch" else everywhere:
            headers.add(name, value)
        if "Cache-Control" not in headers:
            headers.add("Cache-Control", "no-store")
        if response.status_code != 200 or request.path != "/healthz":
            route = request.url_rule.rule if request.url_rule else None
            write_line(request.environ, route, response.status_code, g.began, g.noted)
        return response

    logs.request = lambda: (
        {"request": g.get("request_id"), "address": request.remote_addr} if has_request_context() else {}
    )
    app.register_error_handler(HTTPException, say)
    app.register_error_handler(BadField, lambda error: say(BadRequest(str(error))))
    app.register_error_handler(SQLAlchemyError, unavailable)
    app.register_error_handler(MemoryError, unavailable)
    app.add_url_rule("/healthz", view_func=healthz)


def note(**fields: object) -> None:
    """Have the request's line say more, as its `job` or the `cause` of a refusal; never a secret, a link."""
    g.noted.update(fields)


def begin_answer(
    environ: dict[str, Any],
    start_response: Any,
    headers: Sequence[tuple[str, str]],
    route: str,
    began: float,
    **noted: object,
) -> None:
    """Begin a 200 that goes without Flask, and write its line."""
    request_id = os.urandom(8).hex()
    start_response("200 OK", [*headers, ("X-Request-Id", request_id)])
    told = {"request": request_id, "address": environ.get("REMOTE_ADDR")}
    write_line(environ, route, 200, began, told | noted)


def write_line(
    environ: dict[str, Any], route: str | None, status: int, began: float, noted: dict[str, Any]
) -> None:
    """The line of a request: a path can carry a token and a query a search, so it names the route alone."""
    fields = {
        "method": environ["REQUEST_METHOD"],
        "route": route,
        "status": status,
        "ms": round((perf_counter() - began) * 1000, 1),
    }
    is_refused = status >= 400 and environ["PATH_INFO"].startswith("/api/")
    level = "error" if status >= 500 else "warning" if is_refused else "info"
    logs.write(level, "request", fields | noted)


def say(error: HTTPException) -> Response:
    """An error as JSON on the machines' paths, as a page elsewhere."""
    response = Response(status=error.code, headers=error.get_headers())
    if request.path.startswith(("/api/", "/metrics")) or request.accept_mimetypes.best == "application/json":
        response.data = jsonify(error=error.description or error.name).data
        response.mimetype = "application/json"
    else:
        response.data = render_template("error.html", error=error)
    if error.description != type(error).description:  # our own words, not HTTP's
        note(cause=error.description)
    return response


def unavailable(error: SQLAlchemyError | MemoryError) -> Response:
    """The database cannot answer now, or there is no memory; the client may try again."""
    what = "memory" if isinstance(error, MemoryError) else "the database"
    logs.log.error("%s is not available: %s", what, reason(error))
    return say(ServiceUnavailable(f"{what} is not available now", retry_after=5))


def event_stream(events: Iterator[bytes]) -> Response:
    """Server-sent events as they come, in no wrapper and no proxy's buffer: there are ten thousand."""
    return Response(events, headers=EVENT_STREAM, direct_passthrough=True)


def commenting(environ: dict[str, Any]) -> Callable[[], None]:
    """Sends a comment to the client of a stream, in one piece or not at all. Raises OSError."""
    if (client := environ.get("gunicorn.socket")) is None:  # another server, as in tests of the statements
        return lambda: None
    return partial(_send, client.fileno(), CHUNK if environ["SERVER_PROTOCOL"] == "HTTP/1.1" else COMMENT)


def _send(file: int, comment: bytes) -> None:
    if os.write(file, comment) < len(comment):
        raise BrokenPipeError


def healthz() -> tuple[str, int]:
    """200 while a callback could be stored, 503 and the reason while none could; answered within a second."""
    problem = parts().writer.problem()
    return (f"{problem}\n", 503) if problem else ("ok\n", 200)
