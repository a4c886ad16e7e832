"""Who may pass: the operator's session, how it is opened, and its forms; the bearer token of the API.

The cookie carries a random secret; the database knows its hash. A request without a cookie, as those
of workflows and watchers are, costs no signature and no query.
"""

import hmac
import re
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address, ip_network
from math import ceil
from time import monotonic
from urllib.parse import urlsplit

from flask import Blueprint, abort, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import SQLAlchemyError
from werkzeug import Response
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import TooManyRequests

from webapp import logs
from webapp.parts import parts
from webapp.routes.middleware import note
from webapp.storage import sessions
from webapp.storage.tables import db

MOST_TRIES, MINUTE, MOST_ADDRESSES = 10, 60.0, 10_000
SAME_SITE = re.compile(r"/(?![/\\])[!-\[\]-~]*")  # no host, nothing that a browser would read as one
NO_LINK = "This link is wrong, was used, or is older than ten minutes; flask sign-in prints a new one"

bp = Blueprint("sign_in", __name__)
_wrong: OrderedDict[str, deque[float]] = OrderedDict()  # the newest times, by address; of this process alone


def require_session() -> ResponseReturnValue | None:
    """Before a page: redirect to the sign-in; a form has to be one of this very session."""
    secret, fingerprint = _secret(), parts().links.fingerprint
    if not secret or not sessions.is_open(db.session.connection(), secret, fingerprint):
        sign_in = url_for("sign_in.form", next=_page_asked_for())
        if "HX-Request" in request.headers:  # a redirect would be followed unseen
            return "", 401, {"HX-Redirect": sign_in}
        return redirect(sign_in, 303)
    if request.method == "POST" and not _is_own_form():
        abort(400, "this form is not one of your session; load the page again")
    return None


def _page_asked_for() -> str | None:
    """Where to go after the sign-in: the page, or the page of the form; None for the list."""
    if request.method == "GET":
        asked = request.script_root + request.full_path.rstrip("?")
        return None if asked == url_for("operator.listing") else asked
    job_id = (request.view_args or {}).get("job_id")
    return url_for("operator.job", job_id=job_id) if job_id else None


def lasting_session() -> Callable[[], bool]:
    """Tells, later and outside of this request, whether its session goes on; for its streams."""
    engine, secret, fingerprint = db.engine, _secret(), parts().links.fingerprint

    def is_open() -> bool:
        try:
            with engine.connect() as connection:
                return sessions.is_open(connection, secret, fingerprint)
        except SQLAlchemyError:  # nothing can be shown now; once it can, this is asked again
            return True

    return is_open


def require_token() -> None:
    """Before an API call: nothing is read before the token is seen to be right."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _is_token(token.strip().encode("latin-1")):
        return
    if token:
        _count_wrong()
    abort(401, "the operator token is missing or wrong", www_authenticate=WWWAuthenticate("bearer"))


def _is_token(given: bytes) -> bool:
    """Whether this is the operator token: looked at even where an address has to wait, see `_count_wrong`."""
    return hmac.compare_digest(given, parts().settings.operator_token.encode())


def _count_wrong() -> None:
    """A wrong token was given; raises TooManyRequests after ten within a minute.

    The right token is never counted and always enters, because many may share a proxy's address. What
    protects it is its length.
    """
    address, now = network_of(request.remote_addr or ""), monotonic()
    times = _wrong.setdefault(address, deque(maxlen=MOST_TRIES))
    _wrong.move_to_end(address)
    if len(_wrong) > MOST_ADDRESSES:
        _wrong.popitem(last=False)
    if len(times) == MOST_TRIES and (wait := ceil(times[0] + MINUTE - now)) > 0:
        raise TooManyRequests(f"too many wrong tokens from your address: wait {wait} s", retry_after=wait)
    times.append(now)


def network_of(address: str) -> str:
    """An IPv4 address itself; of an IPv6 address its /64, which one client has as a whole."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(ip, IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


@bp.get("/sign-in")
def form(problem: str = "", is_refused: bool = False) -> Response:
    """The form; for a link of `flask sign-in`, which carries a key, one button alone."""
    secret, key = _secret() or secrets.token_urlsafe(32), request.values.get("key", "")
    if key and (is_refused or not parts().links.read_key(key)):
        key, problem = "", problem or NO_LINK
    response = make_response(render_template("sign_in.html", key=key, problem=problem, secret=secret))
    if not _secret():
        _set_cookie(response, secret)
    return response


@bp.post("/sign-in")
def sign_in() -> ResponseReturnValue:
    """Sign in for 12 hours, with the operator token or the key of a link, which works once."""
    fields, ours = request.form, parts()
    nonce = ours.links.read_key(fields.get("key", ""))
    if not nonce and not _is_token(fields.get("token", "").strip().encode()):
        return _refused(NO_LINK if fields.get("key") else "The token is wrong")
    if not _is_own_form():
        note(cause="not a form of this session")
        return form("Try again"), 400
    secret = secrets.token_urlsafe(32)
    if not sessions.open_session(ours.writer, secret, ours.links.fingerprint, nonce, replaced=_secret()):
        return _refused(NO_LINK)
    logs.event("sign-in")
    asked = fields.get("next", "")
    response = redirect(asked if SAME_SITE.fullmatch(asked) else url_for("operator.listing"), 303)
    _set_cookie(response, secret, sessions.LASTS)
    return response


def _refused(problem: str) -> ResponseReturnValue:
    """Count it, and show the form again. Raises TooManyRequests."""
    cause = problem[:1].lower() + problem[1:]
    logs.event("sign-in refused", cause=cause)
    _count_wrong()
    note(cause=cause)
    return form(problem, is_refused=True), 403


@bp.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """End the session, with its cookie and its streams."""
    if refused := require_session():
        return refused
    secret = _secret()
    parts().writer.run(lambda transaction: sessions.end_session(transaction, secret))
    logs.event("sign-out")
    response = redirect(url_for("sign_in.form"), 303)
    _set_cookie(response, "", 0)
    return response


@bp.app_template_global()
def csrf(secret: str = "") -> str:
    """What the forms of this client carry: only a page of ours, read with its cookie, shows it."""
    return sessions.hash_of(f"csrf {secret or _secret()}")


def _is_own_form() -> bool:
    """Whether a form carries the token of this very client."""
    given = request.form.get("csrf", "")
    return bool(_secret()) and hmac.compare_digest(given.encode(), csrf().encode())


def _secret() -> str:
    """What the cookie carries, "" without one."""
    return request.cookies.get(_cookie()[0], "")


def _set_cookie(response: Response, secret: str, lasts: int | None = None) -> None:
    """Give a client its secret, out of reach of scripts and of other sites' forms."""
    name, path, secure = _cookie()
    response.set_cookie(name, secret, lasts, path=path, secure=secure, httponly=True, samesite="Lax")


def _cookie() -> tuple[str, str, bool]:
    """Name, path and whether it is for https alone: browsers take `__Host-` from no other host or path.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes
    """
    url = urlsplit(parts().settings.public_url)
    prefix = "" if url.scheme == "http" else "__Secure-" if url.path else "__Host-"
    return f"{prefix}milepost", url.path or "/", url.scheme == "https"
