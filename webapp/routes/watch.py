"""The watcher's door: page, JSON, fragment and stream; the token is all that it takes."""

from contextlib import suppress
from time import perf_counter
from typing import Any

from flask import Blueprint, Flask, Response, abort, current_app, jsonify, render_template, request

from webapp.page.view import View, iso
from webapp.parts import Parts, parts
from webapp.routes.middleware import (
    EVENT_STREAM,
    Wsgi,
    begin_answer,
    commenting,
    event_stream,
    framed_by,
    note,
    protective,
)
from webapp.storage.tables import db

bp = Blueprint("watch", __name__, url_prefix="/p/<token>")


def shared(token: str, number: int | None = None, kind: str = "progress") -> View:
    """What the token's job looks like now; a wrong or revoked token is a 404 like any other."""
    ours = parts()
    job_id, link = ours.links.read(token, kind) or abort(404)
    note(job=job_id)
    if number is None:
        view = ours.reader.find(job_id)
    else:
        with db.engine.connect() as connection:
            view = ours.views.find(connection, job_id, number)
    return view if view and view.link == link else abort(404)


def set_up(app: Flask) -> None:
    """Open streams before Flask, which took a fifth of the time of one."""
    ours: Parts = app.extensions["milepost"]
    app.wsgi_app = _door(app.wsgi_app, ours)  # type: ignore[method-assign, assignment]


def _door(app: Wsgi, ours: Parts) -> Wsgi:
    """WSGI: a stream is opened here; Flask says why one is refused, and all else."""
    headers = [*EVENT_STREAM.items(), *protective(ours.settings, framed_by(ours.settings))]

    def door(environ: dict[str, Any], start_response: Any) -> Any:
        began, path = perf_counter(), environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET" or not path.endswith("/events") or path[:3] != "/p/":
            return app(environ, start_response)
        known = ours.links.read(path[3 : -len("/events")])
        with suppress(Exception):  # Flask meets it again, and says it
            if known and (view := ours.reader.find(known[0])) and view.link == known[1]:
                seen = environ.get("HTTP_LAST_EVENT_ID", "")
                events = ours.hub.events(view, commenting(environ), seen=seen)
                begin_answer(environ, start_response, headers, "/p/<token>/events", began, job=view.job_id)
                return events
        return app(environ, start_response)

    return door


@bp.get("")
def page(token: str) -> Response | str:
    """The page, of `?attempt=N` where that is asked for; as JSON for a client that prefers it."""
    number = request.args.get("attempt", 0, type=int) if "attempt" in request.args else None
    view = shared(token, number)
    if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
        return jsonify(view.as_json())
    return render_template("page.html", view=view, token=token)


@bp.get("/badge.svg")
def badge(token: str) -> Response:
    """The state as a picture for a README or a wiki, by a token that opens nothing else."""
    view = shared(token, kind="badge")
    return Response(render_template("badge.svg", view=view), mimetype="image/svg+xml")


@bp.get("/steps")
def steps(token: str) -> Response:
    """The fragment, or 204 while the version that the page shows is still current."""
    view = shared(token)
    response = Response(status=204)
    if request.args.get("after") != view.version:
        response = Response(current_app.jinja_env.get_template("_steps.html").render(view=view))
    response.headers["Version"] = view.version  # without it an answer is somebody else's, as a login page
    if signal := iso(view.attempt.last_signal_at):
        response.headers["Last-Signal"] = signal
    return response


@bp.get("/events")
def events(token: str) -> Response:
    """The fragment at once, unless the page has it, and at every change, until the job is over."""
    seen = request.headers.get("Last-Event-ID", "")
    return event_stream(parts().hub.events(shared(token), commenting(request.environ), seen=seen))
