"""The machine's door: prove, then parse, then store; answered only once it is on disk."""

import json
from time import time

from flask import Blueprint, Response, abort, g, jsonify, request

from webapp import refusals
from webapp.config import CALLBACK_PATH, LARGEST_DELIVERY
from webapp.github import runs
from webapp.parts import parts
from webapp.routes.middleware import note
from webapp.rules.report import parse, read, sent_at
from webapp.signing import is_signed

bp = Blueprint("callbacks", __name__)


@bp.post(CALLBACK_PATH, provide_automatic_options=False)
def receive() -> Response:
    """Take one callback in; nothing is stored by anything but a 200."""
    if (event := request.environ.get("HTTP_X_GITHUB_EVENT")) is not None:
        return _delivery(event)
    arrived_at, ours = time(), parts()
    settings = ours.settings
    body = _proved("X-Signature", settings.callback_keys)
    fields = parse(body)
    sent, skew = sent_at(fields), settings.callback_max_skew
    if sent is None and settings.require_sent_at:
        abort(401, "sent_at: required here")
    if sent is not None and skew and abs(arrived_at - sent) > skew:
        abort(401, f"sent_at: more than {skew:g} seconds from the time of arrival")
    report = read(fields, body, arrived_at)
    note(job=report.job_id, report=report.milestone or "heartbeat")
    duplicate, link = ours.writer.receive(report)
    note(duplicate=duplicate)
    page = ours.links.page(report.job_id, link)
    said = {"received": True, "duplicate": duplicate, "progress_url": page}
    return Response(json.dumps(said), mimetype="application/json")  # jsonify() took 3 % of a callback


def _delivery(event: str) -> Response:
    """GitHub's own word of its runs, under a key of its own, as JSON or as GitHub's form."""
    ours = parts()
    if not ours.settings.webhook_keys:  # unread
        abort(401, "GITHUB_WEBHOOK_SECRET is not set here")
    body = _proved("X-Hub-Signature-256", ours.settings.webhook_keys)
    if request.mimetype == "application/x-www-form-urlencoded":
        request.max_form_memory_size = LARGEST_DELIVERY
        body = request.form.get("payload", "").encode()
    note(report=f"GitHub's {event}")
    job_ids = runs.deliver(ours.writer, event, parse(body))
    note(jobs=", ".join(job_ids))
    return jsonify(received=True, jobs=job_ids)


def _proved(header: str, keys: tuple[bytes, ...]) -> bytes:
    """The raw body, which `webapp.worker` has read within its bounds, once its signature holds."""
    body = request.get_data()
    if not is_signed(body, request.headers.get(header, ""), keys):
        abort(401, "the signature is missing or wrong")
    if request.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
        abort(400, "Content-Encoding: only identity is taken")
    return body


@bp.after_request
def count(response: Response) -> Response:
    """The operator is shown how many were refused, and why."""
    if response.status_code != 200:
        refusals.add(response.status_code, g.noted.get("cause") or response.status)
    return response
