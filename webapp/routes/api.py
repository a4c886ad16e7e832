"""The operator's door for machines: jobs as JSON, for who bears the operator token."""

import hmac
import re
from base64 import b64decode, urlsafe_b64encode
from typing import Any

from flask import Blueprint, Response, abort, g, jsonify, request
from sqlalchemy import ColumnElement, Row, Select, tuple_
from werkzeug.datastructures import WWWAuthenticate

from webapp.github import start
from webapp.github.client import Refused
from webapp.page.view import View, find, view_of
from webapp.parts import parts
from webapp.rules.progress import STATUSES
from webapp.rules.report import BadReport, parse
from webapp.storage.tables import current_attempts, db, jobs

LARGEST_BODY = 65_536
LARGEST_PAGE = 200

bp = Blueprint("api", __name__, url_prefix="/api/jobs")


@bp.before_request
def prove() -> None:
    """Nothing is read before the token is seen to be right."""
    request.max_content_length = LARGEST_BODY
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    right = parts().settings.operator_token.encode()
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), right):
        abort(401, "the operator token is missing or wrong", www_authenticate=WWWAuthenticate("bearer"))


@bp.post("")
def create() -> Response:
    """Start a job: 201, or 200 where it was started before."""
    asked = start.read(parse(request.get_data()))
    try:
        status = 201 if start.start(parts(), asked) else 200
    except Refused:  # the job's own error says why
        status = 502
    return _at(asked["job_id"], status)


@bp.post("/<id:job_id>/retry")
def retry(job_id: str) -> Response:
    """Open a new attempt of a failed, cancelled or lost job."""
    try:
        start.retry(parts(), job_id)
    except LookupError:
        abort(404)
    except Refused:
        return _at(job_id, 502)
    return _at(job_id, 200)


def _at(job_id: str, status: int) -> Response:
    response = one(job_id)
    response.status_code = status
    response.headers["Location"] = f"{parts().settings.public_url}/api/jobs/{job_id}"
    return response


@bp.get("/<id:job_id>")
def one(job_id: str) -> Response:
    """One job."""
    return jsonify(as_json(find(db.session.connection(), job_id, parts().settings) or abort(404)))


@bp.get("")
def several() -> Response:
    """A page of jobs, newest first, and the mark of the next."""
    limit = request.args.get("limit", "50")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        raise start.BadField(f"limit: not a whole number from 1 to {LARGEST_PAGE}")
    status, agent_id = request.args.get("status"), start.name_of(request.args, "agent_id")
    if status and status not in STATUSES:
        raise start.BadField(f"status: not one of {', '.join(STATUSES)}")
    given = {jobs.c.status: status, jobs.c.agent_id: agent_id}
    filters = (column == value for column, value in given.items() if value)
    rows = db.session.execute(newest(int(limit) + 1, request.args.get("before"), *filters)).all()
    views = [as_json(view_of(row, parts().settings)) for row in rows[: int(limit)]]
    return jsonify(jobs=views, before=mark(rows[int(limit) - 1]) if len(rows) > int(limit) else None)


def newest(limit: int, before: str | None, *filters: ColumnElement[bool]) -> Select[Any]:
    """Select jobs, newest first, after the page that ended at the mark `before`. Raises BadField."""
    found = current_attempts().where(*filters)
    if before:
        found = found.where(tuple_(jobs.c.created_at, jobs.c.job_id) < tuple_(*_marked(before)))
    return found.order_by(jobs.c.created_at.desc(), jobs.c.job_id.desc()).limit(limit)


def mark(row: Row[Any]) -> str:
    """The opaque mark of the page after this row."""
    return urlsafe_b64encode(f"{row.created_at!r} {row.job_id}".encode()).decode()


def _marked(before: str) -> tuple[float, str]:
    try:
        created_at, job_id = b64decode(before, b"-_", validate=True).decode().split(" ")
        return float(created_at), start.name_of({"before": job_id}, "before") or ""
    except ValueError:
        raise start.BadField("before: not the mark of a page") from None


def as_json(view: View) -> dict[str, Any]:
    """The watcher's JSON, and what is the operator's only."""
    attempt = view.attempt
    return view.as_json() | {
        "progress_url": parts().progress_url(view.job_id, view.link),
        "server_id": attempt.server_id,
        "server_ip": attempt.server_ip,
        "tailscale_ip": attempt.tailscale_ip,
    }


@bp.errorhandler(BadReport)
@bp.errorhandler(start.BadField)
def bad_field(error: ValueError) -> tuple[Response, int]:
    """Name the field."""
    g.cause = str(error)
    return jsonify(error=g.cause), 400


@bp.errorhandler(start.Conflict)
def conflict(error: start.Conflict) -> tuple[Response, int]:
    """Say what stands in the way."""
    g.cause = str(error)
    return jsonify(error=g.cause), 409
