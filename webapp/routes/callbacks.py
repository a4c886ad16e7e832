"""The machine's door: prove, then parse, then store; answered only once it is on disk."""

import json
from time import perf_counter, time
from typing import Any

from flask import Blueprint, Flask, Response, abort, g, jsonify, request
from werkzeug.wsgi import get_input_stream

from webapp import refusals
from webapp.config import CALLBACK_PATH, LARGEST_DELIVERY
from webapp.github import runs
from webapp.parts import Parts, parts
from webapp.routes.middleware import Wsgi, begin_answer, note, protective
from webapp.rules.report import parse, read, sent_at
from webapp.signing import is_signed

bp = Blueprint("callbacks", __name__)


def set_up(app: Flask) -> None:
    """Take callbacks in before Flask, which took a third of the time of one."""
    ours: Parts = app.extensions["milepost"]
    app.wsgi_app = _door(app.wsgi_app, ours)  # type: ignore[method-assign, assignment]


def _door(app: Wsgi, ours: Parts) -> Wsgi:
    """WSGI: a callback that is stored is answered here; Flask says why one is refused, and all else."""
    headers = [
        *protective(ours.settings),
        ("Cache-Control", "no-store"),
        ("Content-Type", "application/json"),
    ]

    def door(environ: dict[str, Any], start_response: Any) -> Any:
        is_callback = environ["PATH_INFO"] == CALLBACK_PATH and environ["REQUEST_METHOD"] == "POST"
        if not is_callback or "HTTP_X_GITHUB_EVENT" in environ:
            return app(environ, start_response)
        began, noted = perf_counter(), dict[str, Any]()
        try:
            said = json.dumps(_receive(environ, ours, noted)).encode()
        except Exception as refusal:
            environ["milepost.refusal"] = refusal, began, noted
            return app(environ, start_response)
        own = [*headers, ("Content-Length", str(len(said)))]
        begin_answer(environ, start_response, own, CALLBACK_PATH, began, **noted)
        return (said,)

    return door


def _receive(environ: dict[str, Any], ours: Parts, noted: dict[str, Any]) -> dict[str, Any]:
    """Take one callback in; what it is answered."""
    arrived_at, settings = time(), ours.settings
    body = get_input_stream(environ).read()
    _prove(body, environ, "HTTP_X_SIGNATURE", settings.callback_keys)
    fields = parse(body)
    sent, skew = sent_at(fields), settings.callback_max_skew
    if sent is None and settings.require_sent_at:
        abort(401, "sent_at: required here")
    if sent is not None and skew and abs(arrived_at - sent) > skew:
        abort(401, f"sent_at: more than {skew:g} seconds from the time of arrival")
    report = read(fields, body, arrived_at)
    noted |= {"job": report.job_id, "report": report.milestone or "heartbeat"}
    noted["duplicate"], link = ours.writer.receive(report)
    page = ours.links.page(report.job_id, link)
    return {"received": True, "duplicate": noted["duplicate"], "progress_url": page}


@bp.post(CALLBACK_PATH, provide_automatic_options=False)
def receive() -> Response:
    """Say why a callback was refused; or take GitHub's own word."""
    if refused := request.environ.pop("milepost.refusal", None):
        refusal, g.began, g.noted = refused
        raise refusal
    if (event := request.environ.get("HTTP_X_GITHUB_EVENT")) is None:
        abort(404)  # this route takes //api/… for itself, the door does not
    return _delivery(event)


def _delivery(event: str) -> Response:
    """GitHub's own word of its runs, under a key of its own, as JSON or as GitHub's form."""
    ours = parts()
    if not ours.settings.webhook_keys:  # unread
        abort(401, "GITHUB_WEBHOOK_SECRET is not set here")
    body = request.get_data()
    _prove(body, request.environ, "HTTP_X_HUB_SIGNATURE_256", ours.settings.webhook_keys)
    if request.mimetype == "application/x-www-form-urlencoded":
        request.max_form_memory_size = LARGEST_DELIVERY
        body = request.form.get("payload", "").encode()
    note(report=f"GitHub's {event}")
    job_ids = runs.deliver(ours.writer, event, parse(body))
    note(jobs=", ".join(job_ids))
    return jsonify(received=True, jobs=job_ids)


def _prove(body: bytes, environ: dict[str, Any], header: str, keys: tuple[bytes, ...]) -> None:
    """Refuse a raw body, which `webapp.worker` has read within its bounds, unless its signature holds."""
    if not is_signed(body, environ.get(header, ""), keys):
        abort(401, "the signature is missing or wrong")
    if environ.get("HTTP_CONTENT_ENCODING", "").lower() not in ("", "identity"):
        abort(400, "Content-Encoding: only identity is taken")


@bp.after_request
def count(response: Response) -> Response:
    """The operator is shown how many were refused, and why."""
    if response.status_code != 200:
        refusals.add(response.status_code, g.noted.get("cause") or response.status)
    return response
