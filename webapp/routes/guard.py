"""Who may pass: the operator's session and forms, the bearer token of the API, and how often it is tried.

The cookie carries a random secret; the database knows its hash. A request without a cookie, as those
of workflows and watchers are, costs no signature and no query.
"""

import hmac
from collections import OrderedDict, deque
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address, ip_network
from math import ceil
from time import monotonic
from urllib.parse import urlsplit

from flask import abort, redirect, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import SQLAlchemyError
from werkzeug import Response
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import TooManyRequests

from webapp.parts import parts
from webapp.signing import hash_of
from webapp.storage import sessions
from webapp.storage.tables import db

MOST_TRIES, MINUTE, MOST_ADDRESSES = 10, 60.0, 10_000

_wrong: OrderedDict[str, deque[float]] = OrderedDict()  # the newest times, by address; of this process alone


def cookie() -> tuple[str, str, bool]:
    """Name, path and whether it is for https alone: browsers take `__Host-` from no other host or path.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/Set-Cookie#cookie_prefixes
    """
    url = urlsplit(parts().settings.public_url)
    prefix = "" if url.scheme == "http" else "__Secure-" if url.path else "__Host-"
    return f"{prefix}milepost", url.path or "/", url.scheme == "https"


def secret() -> str:
    """What the cookie carries, "" without one."""
    return request.cookies.get(cookie()[0], "")


def set_cookie(response: Response, secret: str, lasts: int | None = None) -> None:
    """Give a client its secret, out of reach of scripts and of other sites' forms."""
    name, path, secure = cookie()
    response.set_cookie(name, secret, lasts, path=path, secure=secure, httponly=True, samesite="Lax")


def csrf(of: str | None = None) -> str:
    """What the forms of this client carry: only a page of ours, read with its cookie, shows it."""
    return hash_of(f"csrf {secret() if of is None else of}")


def is_own_form() -> bool:
    """Whether a form carries the token of this very client."""
    given = request.form.get("csrf", "")
    return bool(secret()) and hmac.compare_digest(given.encode(), csrf().encode())


def require_session() -> ResponseReturnValue | None:
    """Before a page: redirect to the sign-in; a form has to be one of this very session."""
    ours = secret()
    fingerprint = parts().signatures.fingerprint
    if not ours or not sessions.is_open(db.session.connection(), hash_of(ours), fingerprint):
        is_get, home = request.method == "GET", url_for("operator.listing")
        asked = request.script_root + request.full_path.rstrip("?") if is_get else _page_of_form()
        sign_in = url_for("sign_in.form", next=None if asked == home else asked)
        if "HX-Request" in request.headers:  # a redirect would be followed unseen
            return "", 401, {"HX-Redirect": sign_in}
        return redirect(sign_in, 303)
    if request.method == "POST" and not is_own_form():
        abort(400, "this form is not one of your session; load the page again")
    return None


def _page_of_form() -> str:
    job_id = (request.view_args or {}).get("job_id")
    return url_for("operator.job", job_id=job_id) if job_id else url_for("operator.listing")


def lasting_session() -> Callable[[], bool]:
    """Tells, later and outside of this request, whether its session goes on; for its streams."""
    engine, hash, fingerprint = db.engine, hash_of(secret()), parts().signatures.fingerprint

    def is_open() -> bool:
        try:
            with engine.connect() as connection:
                return sessions.is_open(connection, hash, fingerprint)
        except SQLAlchemyError:  # nothing can be shown now; once it can, this is asked again
            return True

    return is_open


def require_token() -> None:
    """Before an API call: nothing is read before the token is seen to be right."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and is_token(token.strip().encode("latin-1")):
        return
    if token:
        count_wrong()
    abort(401, "the operator token is missing or wrong", www_authenticate=WWWAuthenticate("bearer"))


def is_token(given: bytes) -> bool:
    """Whether this is the operator token: looked at even where an address has to wait, see `count_wrong`."""
    return hmac.compare_digest(given, parts().settings.operator_token.encode())


def count_wrong() -> None:
    """A wrong token was given; raises TooManyRequests after ten within a minute.

    The right token is never counted and always enters, because many may share a proxy's address. What
    protects it is its length.
    """
    address, now = network_of(request.remote_addr or ""), monotonic()
    times = _wrong.setdefault(address, deque(maxlen=MOST_TRIES))
    _wrong.move_to_end(address)
    if len(_wrong) > MOST_ADDRESSES:
        _wrong.popitem(last=False)
    if len(times) == MOST_TRIES and (wait := times[0] + MINUTE - now) > 0:
        said = f"too many wrong tokens from your address: wait {ceil(wait)} s"
        raise TooManyRequests(said, retry_after=ceil(wait))
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
