"""Signing in and out."""

import hmac
import re
import secrets

from flask import Blueprint, g, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue

from webapp import logs
from webapp.parts import Parts, parts
from webapp.routes import guard

SAME_SITE = re.compile(r"/(?![/\\])[!-\[\]-~]*")  # no host, nothing that a browser would read as one

bp = Blueprint("sign_in", __name__)


@bp.get("/sign-in")
def form(problem: str = "") -> str:
    """The form; one with a single button where a link of `flask sign-in` brought its key along."""
    session.setdefault("csrf", secrets.token_urlsafe(16))
    key = request.values.get("key", "")
    if key and not parts().signatures.is_key(key):
        key, problem = (
            "",
            problem or "This link is wrong or older than an hour; flask sign-in prints a new one",
        )
    return render_template(
        "sign_in.html", key=key, problem=problem, next=request.values.get("next", ""), csrf=session["csrf"]
    )


@bp.post("/sign-in")
def sign_in() -> ResponseReturnValue:
    """Sign in for 12 hours, with the operator token or the key of a link."""
    address = (request.remote_addr or "")[:64]
    if wait := guard.seconds_to_wait(address):
        return form(f"Too many tries: wait {wait} s"), 429, {"Retry-After": str(wait)}
    fields, signatures = request.form, parts().signatures
    given, right = fields.get("token", "").strip(), parts().settings.operator_token
    is_right = hmac.compare_digest(given.encode(), right.encode()) or signatures.is_key(fields.get("key", ""))
    if not is_right or not guard.is_own_form():
        guard.count_refusal(address)
        g.cause = "not a form of this session" if is_right else "the token is wrong"
        logs.event("sign-in refused", address=address, cause=g.cause)
        return form("Try again" if is_right else "The token is wrong"), 400 if is_right else 403
    session.clear()
    session.permanent = True  # as long as the app's configuration says
    session.update(operator=signatures.fingerprint, csrf=secrets.token_urlsafe(16))
    logs.event("sign-in", address=address)
    asked = fields.get("next", "")
    return redirect(asked if SAME_SITE.fullmatch(asked) else "/", 303)


@bp.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """Forget the session."""
    if refused := guard.require_session():
        return refused
    session.clear()
    logs.event("sign-out")
    return redirect(url_for("sign_in.form"), 303)


def sign_in_url(parts: Parts) -> str:
    """A link that signs in who follows it within the hour, as long as the operator token stays the same."""
    return f"{parts.settings.public_url}/sign-in?key={parts.signatures.key()}"
