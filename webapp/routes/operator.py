"""The operator's door for people: start a job, see all of them, see one."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flask import Blueprint, abort, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug import Response
from werkzeug.exceptions import Conflict

from webapp import refusals
from webapp.config import CALLBACK_PATH
from webapp.github import start
from webapp.github.client import Refused
from webapp.page.view import View
from webapp.parts import parts
from webapp.routes import guard
from webapp.routes.middleware import commenting, event_stream, note
from webapp.rules.attempt import CONDITIONS, STATUSES
from webapp.rules.pipeline import BUILT_IN
from webapp.rules.report import ID_RULE, JOB_ID, START, BadField, read_start
from webapp.storage import jobs
from webapp.storage.notifications import notifications_of
from webapp.storage.tables import MILESTONES, db

SHOWN_JOBS, SHOWN_MILESTONES, SHOWN_HEARTBEATS = 50, 200, 50

bp = Blueprint("operator", __name__)
bp.before_request(guard.require_session)


@bp.get("/")
def listing(problems: Mapping[str, str] | None = None) -> str:
    """The jobs, newest first, and the form that starts one; `problems` are told beside their fields."""
    ours, connection = parts(), db.session.connection()
    choices = {"status": STATUSES, "condition": CONDITIONS, "pipeline": sorted(ours.settings.pipelines)}
    asked = {name: request.args.get(name, "") for name in (*choices, "q", "before")}
    problems, clock = dict(problems or {}), ours.views.clock(connection)
    if asked["q"] and not JOB_ID.fullmatch(asked["q"]):
        problems["q"], asked["q"] = f"An id: {ID_RULE}", ""
    for name in ("status", "condition"):
        asked[name] = asked[name] if asked[name] in choices[name] else ""
    chosen: dict[str, Any] = {name: asked[name] for name in choices}
    wanted = jobs.Wanted(clock, begins=asked["q"], **chosen)
    rows, before = jobs.newest_jobs(connection, SHOWN_JOBS, asked["before"], wanted)
    return render_template(
        "jobs.html",
        views=[ours.views.of(row, connection) for row in rows],
        before=before,
        counts=jobs.counts(connection, clock),
        most=jobs.MOST_COUNTED,
        asked=asked,
        problems=problems,
        settings=ours.settings,
        callback_url=ours.settings.public_url + CALLBACK_PATH,
        built_in=BUILT_IN,
        choices=choices,
        refusals=refusals.lately(),
    )


@bp.post("/")
def create() -> ResponseReturnValue:
    """Start a job from the form; what GitHub refused is told by the job itself."""
    ours = parts()
    fields: dict[str, Any] = {name: request.form.get(name, "").strip() for name in START}
    try:
        asked = read_start(fields | {"dispatch": "dispatch" in request.form}, ours.settings.pipelines)
        note(job=asked.job_id)
        with suppress(Refused):
            start.start(ours.writer, asked)
    except BadField as error:
        note(cause=str(error))
        field, _, problem = str(error).partition(": ")
        return listing({field: problem}), 400
    except Conflict as conflict:
        note(cause=conflict.description)
        return listing({"start": str(conflict.description)}), 409
    return redirect(url_for("operator.job", job_id=asked.job_id), 303)


@bp.get("/jobs/<id:job_id>")
def job(job_id: str, problem: str | None = None) -> str:
    """One job: its attempts, its callbacks in order, its addresses, its link."""
    ours, connection, view = parts(), db.session.connection(), _view(job_id)
    known = [attempt for attempt in jobs.attempts_of(connection, job_id) if attempt.number > 0]
    milestones, _ = jobs.callbacks_of(connection, job_id, SHOWN_MILESTONES, None, MILESTONES)
    heartbeats, more = jobs.callbacks_of(connection, job_id, SHOWN_HEARTBEATS, None, ~MILESTONES)
    pipeline = ours.settings.pipelines.get(view.attempt.pipeline, view.pipeline)
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
        shared=ours.links.page(job_id, view.link),
        may_retry=is_runnable and (view.status == "failed" or view.condition == "lost"),
        may_close=start.may_close(view.attempt, view.condition),
        problem=problem,
    )


@bp.post("/jobs/<id:job_id>/<any(retry, close, delete, revoke):verb>")
def act(job_id: str, verb: str) -> ResponseReturnValue:
    """Do to a job what its page has a button for; what GitHub refused is told by the job itself."""
    try:
        with suppress(Refused):
            start.act(parts().writer, verb, job_id)
    except Conflict as conflict:
        note(cause=conflict.description)
        return job(job_id, conflict.description), 409
    if verb == "delete":
        return redirect(url_for("operator.listing"), 303)
    return redirect(url_for("operator.job", job_id=job_id), 303)


@bp.get("/events")
@bp.get("/jobs/<id:job_id>/events")
def events(job_id: str | None = None) -> Response:
    """A job's stream as watchers have it, or `event: jobs` at any job's change; until the session ends."""
    view = _view(job_id) if job_id else None
    return event_stream(parts().hub.events(view, commenting(request.environ), guard.lasting_session()))


def _view(job_id: str) -> View:
    return parts().views.find(db.session.connection(), job_id) or abort(404)
