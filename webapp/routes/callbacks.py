"""The machine's door: prove, then parse, then store; answered only once it is on disk."""

import json
from time import time
from urllib.parse import parse_qs

from flask import Blueprint, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from webapp.config import CALLBACK_PATH
from webapp.github import runs
from webapp.parts import parts
from webapp.routes.middleware import note
from webapp.rules.report import BadField, parse, read, sent_at
from webapp.signing import is_signed

bp = Blueprint("callbacks", __name__)


class Refused(Exception):
    """An answer other than 200: its status and what to say."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@bp.post(CALLBACK_PATH, provide_automatic_options=False)
def receive() -> Response:
    """Take one callback in; nothing is stored by anything but a 200."""
    environ, ours = request.environ, parts()
    if "HTTP_X_GITHUB_EVENT" in environ:
        return _delivery(environ["HTTP_X_GITHUB_EVENT"])
    settings = ours.settings
    arrived_at = time()
    body = _body()
    if not is_signed(body, environ.get("HTTP_X_SIGNATURE", ""), settings.callback_keys):
        raise Refused(401, "the signature is missing or wrong")
    _check_encoding()
    fields = parse(body)
    sent, skew = sent_at(fields), settings.callback_max_skew
    if sent is None and settings.require_sent_at:
        raise Refused(401, "sent_at: required here")
    if sent is not None and skew and abs(arrived_at - sent) > skew:
        raise Refused(401, f"sent_at: more than {skew:g} seconds from the time of arrival")
    report = read(fields, body, arrived_at)
    note(job=report.job_id, report=report.milestone or "heartbeat")
    duplicate, link = ours.writer.receive(report)
    note(duplicate=duplicate)
    progress_url = ours.progress_url(report.job_id, link)
    said = {"received": True, "duplicate": duplicate, "progress_url": progress_url}
    return Response(json.dumps(said), mimetype="application/json")


def _delivery(event: str) -> Response:
    """GitHub's own word of its runs, under a key of its own, as JSON or as GitHub's form."""
    ours = parts()
    if not ours.settings.webhook_keys:  # unread
        raise Refused(401, "GITHUB_WEBHOOK_SECRET is not set here")
    body = _body()
    signature = request.headers.get("X-Hub-Signature-256", "")
    if not is_signed(body, signature, ours.settings.webhook_keys):
        raise Refused(401, "the signature is missing or wrong")
    _check_encoding()
    if request.mimetype == "application/x-www-form-urlencoded":
        body = _payload(body)
    note(report=f"GitHub's {event}")
    job_ids = runs.deliver(ours.writer, ours.settings, ours.pipelines, event, parse(body))
    note(jobs=", ".join(job_ids))
    return jsonify(received=True, jobs=job_ids)


def _check_encoding() -> None:
    if request.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
        raise Refused(400, "Content-Encoding: only identity is taken")


def _payload(form: bytes) -> bytes:
    """The JSON of the one field `payload`."""
    try:
        fields = parse_qs(form.decode("ascii"), strict_parsing=True, max_num_fields=10)
        (payload,) = fields["payload"]
    except (ValueError, KeyError):
        raise Refused(400, "payload: not GitHub's form, which has this one field") from None
    return payload.encode(errors="surrogatepass")


def _body() -> bytes:
    """The raw body, which `webapp.worker` has read within its bounds; refused where it could not."""
    try:
        return bytes(request.environ["wsgi.input"].read())
    except HTTPException as error:
        raise Refused(error.code or 400, error.description or "") from error


@bp.after_request
def count(response: Response) -> Response:
    """The operator is shown how many were refused, and why."""
    if response.status_code != 200:
        parts().refusals.add(response.status_code, g.get("cause") or response.status)
    return response


@bp.errorhandler(Refused)
def refused(error: Refused) -> Response:
    """Say why, in JSON."""
    return _say(error.status, str(error))


@bp.errorhandler(BadField)
def bad_field(error: BadField) -> Response:
    """Name the field."""
    return _say(400, str(error))


def _say(status: int, reason: str) -> Response:
    g.cause = reason
    response = jsonify(error=reason)
    response.status_code = status
    return response
