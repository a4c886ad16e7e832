"""Signing in and out."""

import re
import secrets

from flask import Blueprint, Response, g, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import TooManyRequests

from webapp import logs
from webapp.parts import Parts, parts
from webapp.routes import guard
from webapp.signing import hash_of
from webapp.storage import sessions

SAME_SITE = re.compile(r"/(?![/\\])[!-\[\]-~]*")  # no host, nothing that a browser would read as one
NO_LINK = "This link is wrong, was used, or is older than ten minutes; flask sign-in prints a new one"

bp = Blueprint("sign_in", __name__)


@bp.get("/sign-in")
def form(problem: str = "", is_refused: bool = False) -> Response:
    """The form; one with a single button where a link of `flask sign-in` brought its key along."""
    secret, key = guard.secret() or secrets.token_urlsafe(32), request.values.get("key", "")
    if key and (is_refused or not parts().signatures.read_key(key)):
        key, problem = "", problem or NO_LINK
    response = make_response(
        render_template(
            "sign_in.html",
            key=key,
            problem=problem,
            next=request.values.get("next", ""),
            csrf=guard.csrf(secret),
        )
    )
    if not guard.secret():
        guard.set_cookie(response, secret)
    return response


@bp.post("/sign-in")
def sign_in() -> ResponseReturnValue:
    """Sign in for 12 hours, with the operator token or the key of a link, which works once."""
    fields, ours = request.form, parts()
    nonce = ours.signatures.read_key(fields.get("key", ""))
    if not nonce and not guard.is_token(fields.get("token", "").strip().encode()):
        return _refused(NO_LINK if fields.get("key") else "The token is wrong")
    if not guard.is_own_form():
        g.cause = "not a form of this session"
        return form("Try again"), 400
    secret, before = secrets.token_urlsafe(32), hash_of(guard.secret())
    key_hash = hash_of(nonce) if nonce else None
    fingerprint = ours.signatures.fingerprint
    if not sessions.open_session(ours.writer, hash_of(secret), fingerprint, key_hash, before):
        return _refused(NO_LINK)
    logs.event("sign-in", address=request.remote_addr)
    asked = fields.get("next", "")
    response = redirect(asked if SAME_SITE.fullmatch(asked) else url_for("operator.listing"), 303)
    guard.set_cookie(response, secret, sessions.LASTS)
    return response


def _refused(problem: str) -> ResponseReturnValue:
    """Count it, and show the form again."""
    g.cause, status, headers = problem[:1].lower() + problem[1:], 403, {}
    try:
        guard.count_wrong()
    except TooManyRequests as error:
        problem, status, headers = str(error.description), 429, {"Retry-After": str(error.retry_after)}
    logs.event("sign-in refused", address=request.remote_addr, cause=g.cause)
    return form(problem, is_refused=True), status, headers


@bp.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """End the session, with its cookie and its streams."""
    if refused := guard.require_session():
        return refused
    hash = hash_of(guard.secret())
    parts().writer.run(lambda transaction: sessions.end_session(transaction, hash))
    logs.event("sign-out")
    response = redirect(url_for("sign_in.form"), 303)
    guard.set_cookie(response, "", 0)
    return response


def sign_in_url(parts: Parts) -> str:
    """A link that signs in once, within ten minutes, as long as the operator token stays the same."""
    return f"{parts.settings.public_url}/sign-in?key={parts.signatures.key()}"
