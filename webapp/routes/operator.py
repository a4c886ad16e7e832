"""The operator's door for people: sign in, start a job, see all of them, see one."""

import hmac
import re
import secrets
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from time import monotonic, time
from typing import Any

from flask import Blueprint, Flask, Request, abort, g, redirect, render_template, request, session, url_for
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from flask.typing import ResponseReturnValue
from sqlalchemy import ColumnElement, Select, func, or_, select, update
from werkzeug import Response
from werkzeug.exceptions import BadRequest

from webapp import logs
from webapp.config import Settings
from webapp.github import start
from webapp.github.client import Refused
from webapp.page.view import find, view_of
from webapp.parts import Parts, parts
from webapp.routes import api
from webapp.routes.middleware import commenter, event_stream, say
from webapp.rules import progress
from webapp.rules.report import JOB_ID
from webapp.storage.tables import attempts, attempts_of, callbacks, current_attempts, db, jobs
from webapp.storage.writer import Transaction
from webapp.streams.hub import ANY

LARGEST_FORM = 65_536  # bytes
SHOWN_JOBS, SHOWN_CALLBACKS, MOST_COUNTED = 50, 200, 999
MOST_TRIES, MINUTE, MOST_ADDRESSES = 10, 60.0, 10_000
UNFINISHED = ("live", "quiet", "lost")  # conditions
OPEN = ("operate.sign_in", "operate.sign_in_form")
SAME_SITE = re.compile(r"/(?![/\\])[!-\[\]-~]*")  # no host, nothing that a browser would read as one

bp = Blueprint("operate", __name__)


class Sessions(SecureCookieSessionInterface):
    """Flask's own; but who sends no cookie, as workflows and watchers, costs no signature."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        """The session of a request's cookie; an empty one without it."""
        if self.get_cookie_name(app) not in request.cookies:
            return self.session_class()
        return super().open_session(app, request)


_refusals: OrderedDict[str, deque[float]] = OrderedDict()  # of late, by address; of this process alone


@bp.before_request
def prove() -> ResponseReturnValue | None:
    """Who is not signed in is asked to; a form has to be one of this very session."""
    request.max_content_length = LARGEST_FORM
    if request.endpoint in OPEN:
        return None
    if not hmac.compare_digest(session.get("operator", ""), parts().signatures.fingerprint):
        asked = request.full_path.rstrip("?") if request.method == "GET" else _page_of_form()
        sign_in = url_for("operate.sign_in_form", next=None if asked == "/" else asked)
        if "HX-Request" in request.headers:  # a redirect would be followed unseen
            return "", 401, {"HX-Redirect": sign_in}
        return redirect(sign_in, 303)
    if request.method == "POST" and not _is_own_form():
        abort(400, "this form is not one of your session; load the page again")
    return None


def _page_of_form() -> str:
    return url_for("operate.job", **request.view_args) if request.view_args else "/"


def _is_own_form() -> bool:
    ours = session.get("csrf", "")
    return bool(ours) and hmac.compare_digest(request.form.get("csrf", "").encode(), ours.encode())


@bp.get("/sign-in")
def sign_in_form(problem: str = "") -> str:
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
    if wait := _seconds_to_wait(address):
        return sign_in_form(f"Too many tries: wait {wait} s"), 429, {"Retry-After": str(wait)}
    form, signatures = request.form, parts().signatures
    given, right = form.get("token", "").strip(), parts().settings.operator_token
    is_right = hmac.compare_digest(given.encode(), right.encode()) or signatures.is_key(form.get("key", ""))
    if not is_right or not _is_own_form():
        _refusals.setdefault(address, deque(maxlen=MOST_TRIES)).append(monotonic())
        _refusals.move_to_end(address)
        if len(_refusals) > MOST_ADDRESSES:
            _refusals.popitem(last=False)
        g.cause = "not a form of this session" if is_right else "the token is wrong"
        logs.event("sign-in refused", address=address, cause=g.cause)
        return sign_in_form("Try again" if is_right else "The token is wrong"), 400 if is_right else 403
    session.clear()
    session.permanent = True  # as long as the app's configuration says
    session.update(operator=signatures.fingerprint, csrf=secrets.token_urlsafe(16))
    logs.event("sign-in", address=address)
    asked = form.get("next", "")
    return redirect(asked if SAME_SITE.fullmatch(asked) else "/", 303)


def _seconds_to_wait(address: str) -> int:
    times = _refusals.get(address, deque())
    return max(0, ceil(times[0] + MINUTE - monotonic())) if len(times) == MOST_TRIES else 0


@bp.post("/sign-out")
def sign_out() -> Response:
    """Forget the session."""
    session.clear()
    logs.event("sign-out")
    return redirect(url_for("operate.sign_in_form"), 303)


def sign_in_url(parts: Parts) -> str:
    """A link that signs in who follows it within the hour, as long as the operator token stays the same."""
    return f"{parts.settings.public_url}/sign-in?key={parts.signatures.key()}"


@bp.get("/")
def listing(problems: Mapping[str, str] | None = None) -> str:
    """The jobs, newest first, and the form that starts one; `problems` are told beside their fields."""
    settings = parts().settings
    asked = {name: request.args.get(name, "") for name in ("status", "condition", "q", "before")}
    problems, filters = dict(problems or {}), []
    if asked["q"] and not JOB_ID.fullmatch(asked["q"]):
        problems["q"], asked["q"] = (
            "An id begins with a letter or digit and has at most 64 of A-Z a-z 0-9 . _ -",
            "",
        )
    if asked["q"]:
        filters.append(_begins(asked["q"]))
    if asked["status"] in progress.STATUSES:
        filters.append(jobs.c.status == asked["status"])
    if asked["condition"] in progress.CONDITIONS:
        filters.append(_is(asked["condition"], settings))
    if asked["condition"] in UNFINISHED:
        filters.append(jobs.c.status.in_(start.UNFINISHED))  # which has an index in the list's order
    rows = db.session.execute(api.newest(SHOWN_JOBS + 1, asked["before"], *filters)).all()
    return render_template(
        "jobs.html",
        views=[view_of(row, settings) for row in rows[:SHOWN_JOBS]],
        before=api.mark(rows[SHOWN_JOBS - 1]) if len(rows) > SHOWN_JOBS else None,
        counts=_counts(settings),
        asked=asked,
        problems=problems,
        settings=settings,
        csrf=session["csrf"],
        statuses=progress.STATUSES,
        conditions=progress.CONDITIONS,
    )


def _begins(prefix: str) -> ColumnElement[bool]:
    """The job or its agent has an id that begins so."""
    return or_(*((id >= prefix) & (id < prefix + "\uffff") for id in (jobs.c.job_id, jobs.c.agent_id)))


def _is(condition: str, settings: Settings) -> ColumnElement[bool]:
    """`progress.condition` in SQL; the unfinished attempts have an index by their last sign of life."""
    if condition == "over":
        return attempts.c.end.is_not(None)
    heard_at, now = attempts.c.heard_at, time()
    quiet, lost = now - settings.quiet_after, now - settings.lost_after
    since = {
        "live": or_(heard_at.is_(None), heard_at >= quiet),
        "quiet": (heard_at < quiet) & (heard_at >= lost),
        "lost": heard_at < lost,
    }
    return attempts.c.end.is_(None) & since[condition]


def _counts(settings: Settings) -> dict[str, str]:
    """How many jobs are in each condition and state that matter, up to MOST_COUNTED."""
    filters = {name: _is(name, settings) for name in UNFINISHED}
    filters |= {name: jobs.c.status == name for name in ("failed", "running")}
    counted = {name: db.session.scalar(_count(which)) or 0 for name, which in filters.items()}
    return {name: str(n) if n <= MOST_COUNTED else f"{MOST_COUNTED}+" for name, n in counted.items()}


def _count(which: ColumnElement[bool]) -> Select[int]:
    some = current_attempts().with_only_columns(attempts.c.job_id).where(which).limit(MOST_COUNTED + 1)
    return select(func.count()).select_from(some.subquery())


@bp.get("/events")
def events() -> Response:
    """`event: jobs` at once and whenever any job has changed."""
    db.session.remove()  # a stream lasts; its connection must not
    return event_stream(parts().live.events(ANY, commenter()))


@bp.post("/")
def create() -> ResponseReturnValue:
    """Start a job from the form; what GitHub refused is told by the job itself."""
    fields: dict[str, Any] = {name: request.form.get(name, "").strip() for name in start.FIELDS[:3]}
    try:
        asked = start.read(fields | {"dispatch": "dispatch" in request.form})
        g.job_id = asked["job_id"]
        start.start(parts(), asked)
    except start.BadField as error:
        g.cause = str(error)
        field, _, said = g.cause.partition(": ")
        return listing({field: said}), 400
    except start.Conflict as conflict:
        g.cause = str(conflict)
        return listing({"start": g.cause}), 409
    except Refused as refused:
        g.cause = str(refused)
    return redirect(url_for("operate.job", job_id=asked["job_id"]), 303)


@bp.get("/jobs/<id:job_id>")
def job(job_id: str, problem: str = "") -> str:
    """One job: its attempts, its callbacks in order, its addresses, its link."""
    connection = db.session.connection()
    view = find(connection, job_id, parts().settings) or abort(404)
    known = [attempt for attempt in attempts_of(connection, job_id) if attempt.number > 0]
    columns = (callbacks.c[name] for name in ("number", "milestone", "arrived_at", "sent_at"))
    newest = select(*columns).where(callbacks.c.job_id == job_id)  # by id alone would read those of all jobs
    newest = newest.order_by(callbacks.c.arrived_at.desc(), callbacks.c.id.desc()).limit(SHOWN_CALLBACKS + 1)
    received = connection.execute(newest).all()
    return render_template(
        "job.html",
        view=view,
        attempts=[replace(view, attempt=attempt) for attempt in reversed(known)],
        callbacks=received[:SHOWN_CALLBACKS][::-1],
        more=len(received) > SHOWN_CALLBACKS,
        shared=parts().progress_url(job_id, view.link),
        token=parts().links.token(job_id, view.link),
        may_retry=view.agent_id and (view.status == "failed" or view.condition == "lost"),
        problem=problem,
        csrf=session["csrf"],
    )


@bp.errorhandler(start.BadField)
def bad_mark(error: start.BadField) -> Response:
    """No page has this mark."""
    return say(BadRequest(str(error)))


@bp.post("/jobs/<id:job_id>/retry")
def retry(job_id: str) -> ResponseReturnValue:
    """Open a new attempt of a failed, cancelled or lost job."""
    try:
        start.retry(parts(), job_id)
    except LookupError:
        abort(404)
    except start.Conflict as conflict:
        g.cause = str(conflict)
        return job(job_id, g.cause), 409
    except Refused as refused:
        g.cause = str(refused)
    return redirect(url_for("operate.job", job_id=job_id), 303)


@bp.post("/jobs/<id:job_id>/revoke")
def revoke(job_id: str) -> Response:
    """Stop sharing the job's link, and end its streams; it has another link from now on."""
    parts().writer.run(lambda transaction: _revoke(transaction, job_id))
    logs.event("link revoked", job=job_id)
    return redirect(url_for("operate.job", job_id=job_id), 303)


def _revoke(transaction: Transaction, job_id: str) -> None:
    current = transaction.current(job_id) or abort(404)
    transaction.connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(link=jobs.c.link + 1))
    transaction.touch(current)
