"""The operator's door for people: start a job, see all of them, see one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flask import Blueprint, abort, g, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug import Response
from werkzeug.exceptions import BadRequest

from webapp import logs
from webapp.github import start
from webapp.github.client import Refused
from webapp.parts import parts
from webapp.routes import guard
from webapp.routes.middleware import event_stream, say
from webapp.rules import attempt, silence
from webapp.rules.pipeline import BUILT_IN
from webapp.rules.report import ID_RULE, JOB_ID, START, BadField, read_start
from webapp.storage.jobs import (
    BadMark,
    Wanted,
    attempts_of,
    callbacks_of,
    count,
    newest_jobs,
)
from webapp.storage.notifications import notifications_of
from webapp.storage.tables import MILESTONES, db

SHOWN_JOBS, SHOWN_MILESTONES, SHOWN_HEARTBEATS = 50, 200, 50
MOST_COUNTED = 999
UNFINISHED = ("live", "waiting", "quiet", "lost")  # conditions

bp = Blueprint("operator", __name__)
bp.before_request(guard.require_session)


@bp.get("/")
def listing(problems: Mapping[str, str] | None = None) -> str:
    """The jobs, newest first, and the form that starts one; `problems` are told beside their fields."""
    ours, connection = parts(), db.session.connection()
    asked = {name: request.args.get(name, "") for name in ("status", "condition", "pipeline", "q", "before")}
    problems, known = dict(problems or {}), Wanted(ours.views.clock(connection))
    if asked["q"] and not JOB_ID.fullmatch(asked["q"]):
        problems["q"], asked["q"] = f"An id: {ID_RULE}", ""
    wanted = replace(
        known,
        begins=asked["q"],
        pipeline=asked["pipeline"],
        status=asked["status"] if asked["status"] in attempt.STATUSES else None,
        condition=asked["condition"] if asked["condition"] in silence.CONDITIONS else None,
    )
    rows, before = newest_jobs(connection, SHOWN_JOBS, asked["before"], wanted)
    counted = {name: replace(known, condition=name) for name in UNFINISHED}
    counted |= {name: replace(known, status=name) for name in ("failed", "running")}
    most = MOST_COUNTED + 1
    counts = {name: count(connection, *each.filters(connection), most=most) for name, each in counted.items()}
    return render_template(
        "jobs.html",
        views=[ours.views.of(row, connection) for row in rows],
        before=before,
        counts={name: str(n) if n <= MOST_COUNTED else f"{MOST_COUNTED}+" for name, n in counts.items()},
        asked=asked,
        problems=problems,
        settings=ours.settings,
        pipelines=sorted(ours.pipelines),
        built_in=BUILT_IN,
        csrf=guard.csrf(),
        statuses=attempt.STATUSES,
        conditions=silence.CONDITIONS,
        refusals=ours.refusals.lately(),
    )


@bp.get("/events")
def events() -> Response:
    """`event: jobs` at once and whenever any job has changed, until the session ends."""
    return event_stream(parts().hub.events(None, guard.lasting_session()))


@bp.get("/jobs/<id:job_id>/events")
def job_events(job_id: str) -> Response:
    """As a watcher's stream of the job, until the session ends."""
    view = parts().views.find(db.session.connection(), job_id) or abort(404)
    return event_stream(parts().hub.events(view, guard.lasting_session()))


@bp.post("/")
def create() -> ResponseReturnValue:
    """Start a job from the form; what GitHub refused is told by the job itself."""
    ours = parts()
    fields: dict[str, Any] = {name: request.form.get(name, "").strip() for name in START}
    try:
        asked = read_start(fields | {"dispatch": "dispatch" in request.form}, ours.pipelines)
        g.job_id = asked.job_id
        start.start(ours.writer, ours.settings, asked)
    except BadField as error:
        g.cause = str(error)
        field, _, said = g.cause.partition(": ")
        return listing({field: said}), 400
    except start.Conflict as conflict:
        g.cause = str(conflict)
        return listing({"start": g.cause}), 409
    except Refused as refused:
        g.cause = str(refused)
    return redirect(url_for("operator.job", job_id=asked.job_id), 303)


@bp.get("/jobs/<id:job_id>")
def job(job_id: str, problem: str = "") -> str:
    """One job: its attempts, its callbacks in order, its addresses, its link."""
    ours, connection = parts(), db.session.connection()
    view = ours.views.find(connection, job_id) or abort(404)
    known = [attempt for attempt in attempts_of(connection, job_id) if attempt.number > 0]
    milestones, _ = callbacks_of(connection, job_id, SHOWN_MILESTONES, None, MILESTONES)
    heartbeats, more = callbacks_of(connection, job_id, SHOWN_HEARTBEATS, None, ~MILESTONES)
    pipeline = ours.pipelines.get(view.attempt.pipeline, view.pipeline)
    is_runnable = ours.settings.can_dispatch and (view.agent_id or "agent_id" not in pipeline.inputs)
    return render_template(
        "job.html",
        view=view,
        attempts=[replace(view, attempt=attempt) for attempt in reversed(known)],
        milestones=milestones,
        heartbeats=heartbeats,
        more=more,
        told=notifications_of(connection, job_id),
        watching=ours.hub.watchers(job_id),
        hears_since=ours.hub.siblings.hears_since,
        shared=ours.progress_url(job_id, view.link),
        may_retry=is_runnable and (view.status == "failed" or view.condition == "lost"),
        may_close=start.may_close(view.attempt, view.condition),
        problem=problem,
        csrf=guard.csrf(),
    )


@bp.errorhandler(BadMark)
def bad_mark(error: BadMark) -> Response:
    """No page has this mark."""
    return say(BadRequest("before: not the mark of a page"))


@bp.post("/jobs/<id:job_id>/<any(retry, close, delete, revoke):verb>")
def act(job_id: str, verb: str) -> ResponseReturnValue:
    """Do to a job what its page has a button for."""
    ours = parts()
    try:
        if verb == "revoke":
            ours.writer.run(lambda transaction: transaction.revoke(job_id)) or abort(404)
            logs.event("link revoked", job=job_id)
        else:
            {"retry": start.retry, "close": start.close, "delete": start.delete}[verb](
                ours.writer, ours.settings, job_id
            )
    except LookupError:
        abort(404)
    except start.Conflict as conflict:
        g.cause = str(conflict)
        return job(job_id, g.cause), 409
    except Refused as refused:
        g.cause = str(refused)
    if verb == "delete":
        return redirect(url_for("operator.listing"), 303)
    return redirect(url_for("operator.job", job_id=job_id), 303)
