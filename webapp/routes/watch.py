"""The watcher's door: page, JSON, fragment and stream; the token is all that it takes."""

from collections.abc import Callable

from flask import Blueprint, Flask, Response, abort, jsonify, render_template, request
from sqlalchemy import Engine

from webapp.config import Settings
from webapp.page.view import View, find, find_attempt, view_of
from webapp.parts import parts
from webapp.routes.middleware import commenter, event_stream
from webapp.storage.tables import db, newest_version
from webapp.storage.writer import Change
from webapp.streams.hub import ANY, Frame

bp = Blueprint("watch", __name__, url_prefix="/p/<token>")


def shared(token: str) -> View:
    """What the token's job looks like now; a wrong or revoked token is a 404 like any other."""
    job_id, link = parts().links.read(token) or abort(404)
    view = find(db.session.connection(), job_id, parts().settings)
    return view if view and view.link == link else abort(404)


@bp.get("")
def page(token: str) -> Response | str:
    """The page, of `?attempt=N` where that is asked for; the same as JSON for who prefers that."""
    view = shared(token)
    if "attempt" in request.args:
        view = _attempt(view, request.args.get("attempt", 0, type=int)) or abort(404)
    kinds = request.accept_mimetypes
    if kinds["application/json"] > kinds["text/html"]:
        return jsonify(view.as_json())
    return render_template("page.html", view=view, token=token)


def _attempt(view: View, number: int) -> View | None:
    """One that was opened, so one of a number that the database can hold."""
    return find_attempt(db.session.connection(), view, number) if 1 <= number <= view.newest else None


@bp.get("/badge.svg")
def badge(token: str) -> Response:
    """The state as a picture for a README or a wiki."""
    return Response(render_template("badge.svg", view=shared(token)), mimetype="image/svg+xml")


@bp.get("/steps")
def steps(token: str) -> Response | tuple[str, int]:
    """The fragment, or 204 while the version that the page shows is still current."""
    view = shared(token)
    if request.args.get("after") == view.version:
        return "", 204
    return Response(render_template("_steps.html", view=view))


@bp.get("/events")
def events(token: str) -> Response:
    """The fragment at once and at every change, until the job is over."""
    view = shared(token)
    db.session.remove()  # a stream lasts; its connection must not
    return event_stream(parts().live.events(view.job_id, commenter(), view.link))


def as_events(view: View, fragment: str) -> bytes:
    """One state as the event `steps`, and `done` after the last.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    data = fragment.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\ndata: ")
    done = f"event: done\nid: {view.version}\ndata: over\n\n" if view.attempt.end else ""
    return f"event: steps\nid: {view.version}\ndata: {data}\nretry: 1000\n\n{done}".encode()


def frame_maker(app: Flask, engine: Engine, settings: Settings) -> Callable[[str, Change], Frame]:
    """What `Live` makes a job's frames with, outside of any request."""
    template = app.jinja_env.get_template("_steps.html")

    def make(job_id: str, change: Change) -> Frame:
        if change.job:
            view: View | None = view_of(change.job, settings, change.attempt)
        else:
            with engine.connect() as connection:
                if job_id == ANY:
                    number = newest_version(connection)
                    body = f"event: jobs\nid: {number}\ndata: changed\n\n".encode()
                    return Frame(number, str(number), 0, None, False, body)
                view = find(connection, job_id, settings)
        if view is None:  # pruned: no link is its link
            return Frame(0, "", -1, None, True, None)
        body = as_events(view, template.render(view=view))
        return Frame(
            view.attempt.version, view.version, view.link, view.changes_at, bool(view.attempt.end), body
        )

    return make
