"""Who may pass: the operator's session and forms, the bearer token of the API."""

import hmac
from collections import OrderedDict, deque
from math import ceil
from time import monotonic

from flask import Flask, Request, abort, redirect, request, session, url_for
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import WWWAuthenticate

from webapp.parts import parts

MOST_TRIES, MINUTE, MOST_ADDRESSES = 10, 60.0, 10_000


class Sessions(SecureCookieSessionInterface):
    """Flask's own; but a client without a cookie, as workflows and watchers, costs no signature."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        """The session of a request's cookie; an empty one without it."""
        if self.get_cookie_name(app) not in request.cookies:
            return self.session_class()
        return super().open_session(app, request)


_refusals: OrderedDict[str, deque[float]] = OrderedDict()  # of late, by address; of this process alone


def require_session() -> ResponseReturnValue | None:
    """Before a page: redirect to the sign-in; a form has to be one of this very session."""
    if not hmac.compare_digest(session.get("operator", ""), parts().signatures.fingerprint):
        asked = request.full_path.rstrip("?") if request.method == "GET" else _page_of_form()
        sign_in = url_for("sign_in.form", next=None if asked == "/" else asked)
        if "HX-Request" in request.headers:  # a redirect would be followed unseen
            return "", 401, {"HX-Redirect": sign_in}
        return redirect(sign_in, 303)
    if request.method == "POST" and not is_own_form():
        abort(400, "this form is not one of your session; load the page again")
    return None


def _page_of_form() -> str:
    return url_for("operator.job", **request.view_args) if request.view_args else "/"


def is_own_form() -> bool:
    """Whether a form carries the token of this session."""
    ours = session.get("csrf", "")
    return bool(ours) and hmac.compare_digest(request.form.get("csrf", "").encode(), ours.encode())


def require_token() -> None:
    """Before an API call: nothing is read before the token is seen to be right."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    right = parts().settings.operator_token.encode()
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), right):
        abort(401, "the operator token is missing or wrong", www_authenticate=WWWAuthenticate("bearer"))


def seconds_to_wait(address: str) -> int:
    """How long an address has to wait before it may try a token again."""
    times = _refusals.get(address, deque())
    return max(0, ceil(times[0] + MINUTE - monotonic())) if len(times) == MOST_TRIES else 0


def count_refusal(address: str) -> None:
    """A wrong token came from this address."""
    _refusals.setdefault(address, deque(maxlen=MOST_TRIES)).append(monotonic())
    _refusals.move_to_end(address)
    if len(_refusals) > MOST_ADDRESSES:
        _refusals.popitem(last=False)
