"""The operator's door for machines: jobs as JSON, for a client that bears the operator token."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, abort, g, jsonify, request

from webapp import logs
from webapp.github import start
from webapp.github.client import Refused
from webapp.page.view import View, iso
from webapp.parts import parts
from webapp.routes import guard
from webapp.rules.attempt import STATUSES
from webapp.rules.report import ID, WHOLE, BadField, checked, one_of, parse, read_start
from webapp.rules.silence import CONDITIONS
from webapp.storage.jobs import BadMark, Wanted, callbacks_of, newest_jobs
from webapp.storage.tables import db

LARGEST_PAGE = 200
FILTERS = ("status", "condition", "agent_id", "pipeline", "run_id", "since", "limit", "before")
QUERY = {
    "status": one_of(STATUSES),
    "condition": one_of(CONDITIONS),
    "agent_id": ID,
    "pipeline": ID,
    "run_id": WHOLE,
}
PARAMETERS = {"api.several": FILTERS, "api.callbacks": ("limit", "before")}  # the other calls have none

bp = Blueprint("api", __name__, url_prefix="/api/jobs")
bp.before_request(guard.require_token)


@bp.before_request
def read_query() -> None:
    """Raises BadField for a parameter that is unknown or stands twice."""
    known = PARAMETERS.get(request.endpoint or "", ())
    for name, values in request.args.lists():
        if name not in known or len(values) > 1:
            raise BadField(f"{name[:64]}: {'given twice' if name in known else 'unknown parameter'}")


@bp.post("")
def create() -> Response:
    """Start a job: 201, or 200 where it was started before."""
    ours = parts()
    asked = read_start(parse(request.get_data()), ours.pipelines)
    g.job_id = asked.job_id
    try:
        status = 201 if start.start(ours.writer, ours.settings, asked) else 200
    except Refused:  # the job's own error says why
        status = 502
    return _at(asked.job_id, status)


@bp.post("/<id:job_id>/<any(retry, close, revoke):verb>")
def act(job_id: str, verb: str) -> Response:
    """Open a new attempt, close the job, or give it a new link."""
    ours = parts()
    try:
        if verb == "revoke":
            ours.writer.run(lambda transaction: transaction.revoke(job_id)) or abort(404)
            logs.event("link revoked", job=job_id)
        else:
            {"retry": start.retry, "close": start.close}[verb](ours.writer, ours.settings, job_id)
    except LookupError:
        abort(404)
    except Refused:
        return _at(job_id, 502)
    return _at(job_id, 200)


@bp.delete("/<id:job_id>")
def delete(job_id: str) -> tuple[str, int]:
    """Remove a job that is over."""
    try:
        start.delete(parts().writer, parts().settings, job_id)
    except LookupError:
        abort(404)
    return "", 204


def _at(job_id: str, status: int) -> Response:
    response = one(job_id)
    response.status_code = status
    response.headers["Location"] = f"{parts().settings.public_url}/api/jobs/{job_id}"
    return response


@bp.get("/<id:job_id>")
def one(job_id: str) -> Response:
    """One job."""
    return jsonify(as_json(parts().views.find(db.session.connection(), job_id) or abort(404)))


@bp.get("/<id:job_id>/callbacks")
def callbacks(job_id: str) -> Response:
    """A page of a job's callbacks, newest first, and the mark of the next."""
    asked, connection = request.args, db.session.connection()
    parts().views.find(connection, job_id) or abort(404)
    rows, before = callbacks_of(connection, job_id, _limit(asked), asked.get("before"))
    found = [
        {
            "attempt": row.number if row.number > 0 else None,
            "milestone": row.milestone,
            "arrived_at": iso(row.arrived_at),
            "sent_at": iso(row.sent_at),
            "body": json.loads(row.body),
        }
        for row in rows
    ]
    return jsonify(callbacks=found, before=before)


@bp.get("")
def several() -> Response:
    """A page of jobs, newest first, and the mark of the next."""
    asked, ours, connection = request.args, parts(), db.session.connection()
    since = _moment(asked["since"]) if asked.get("since") else None
    wanted = Wanted(ours.views.clock(connection), since=since, **checked(asked, QUERY))
    rows, before = newest_jobs(connection, _limit(asked), asked.get("before"), wanted)
    return jsonify(jobs=[as_json(ours.views.of(row, connection)) for row in rows], before=before)


def _limit(asked: Mapping[str, str]) -> int:
    limit = asked.get("limit", "50")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        raise BadField(f"limit: not a whole number from 1 to {LARGEST_PAGE}")
    return int(limit)


def _moment(text: str) -> float:
    """Unix seconds of an ISO 8601 time; without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))  # an unescaped + arrives as a space
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadField("since: not an ISO 8601 time, such as 2026-01-31T12:00:00Z") from None


def as_json(view: View) -> dict[str, Any]:
    """The watcher's JSON, and what is the operator's only."""
    attempt, ours = view.attempt, parts()
    return view.as_json() | {
        "error": attempt.error,
        "progress_url": ours.progress_url(view.job_id, view.link),
        "badge_url": ours.badge_url(view.job_id, view.link),
        "server_id": attempt.server_id,
        "server_ip": attempt.server_ip,
        "tailscale_ip": attempt.tailscale_ip,
    }


@bp.errorhandler(BadField)
def bad_field(error: ValueError) -> tuple[Response, int]:
    """Name the field."""
    g.cause = str(error)
    return jsonify(error=g.cause), 400


@bp.errorhandler(BadMark)
def bad_mark(error: BadMark) -> tuple[Response, int]:
    """No page has this mark."""
    return bad_field(BadField("before: not the mark of a page"))


@bp.errorhandler(start.Conflict)
def conflict(error: start.Conflict) -> tuple[Response, int]:
    """Say what stands in the way."""
    g.cause = str(error)
    return jsonify(error=g.cause), 409
