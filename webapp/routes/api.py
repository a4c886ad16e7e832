"""The operator's door for machines: jobs as JSON and `GET /metrics`, for whoever bears the operator token.

What `/metrics` counts is read from the database, the same in every process. What only a process knows
carries its process id as `worker`; behind several a scrape meets one of them.
"""

import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from time import time
from typing import Any

from flask import Blueprint, Response, abort, g, jsonify, request
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from webapp import refusals
from webapp.github import start
from webapp.github.client import Refused
from webapp.page.view import View, iso
from webapp.parts import parts
from webapp.routes import guard
from webapp.routes.middleware import note
from webapp.rules.attempt import CONDITIONS, STATUSES
from webapp.rules.report import ID, WHOLE, BadField, Rule, checked, one_of, parse, read_start
from webapp.storage.jobs import Wanted, callbacks_of, jobs_by_state, newest_jobs, stored_callbacks
from webapp.storage.notifications import waiting_notifications
from webapp.storage.tables import db

LARGEST_PAGE = 200
PRIVATE = ("error", "server_id", "server_ip", "tailscale_ip")  # fields of an attempt

bp = Blueprint("api", __name__, url_prefix="/api/jobs")
metrics = Blueprint("metrics", __name__)
for each in (bp, metrics):
    each.before_request(guard.require_token)


def _limit(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,3}", text) and 1 <= int(text) <= LARGEST_PAGE else None


def _moment(text: str) -> float | None:
    """Unix seconds of an ISO 8601 time; without an offset it is UTC."""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))  # an unescaped + arrives as a space
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


PAGE: dict[str, Rule] = {
    "limit": (_limit, f"not a whole number from 1 to {LARGEST_PAGE}"),
    "before": (str, ""),
}
FILTERS: dict[str, Rule] = {
    "status": one_of(STATUSES),
    "condition": one_of(CONDITIONS),
    "agent_id": ID,
    "pipeline": ID,
    "run_id": WHOLE,
    "since": (_moment, "not an ISO 8601 time, such as 2026-01-31T12:00:00Z"),
}
PARAMETERS = {"api.several": PAGE | FILTERS, "api.callbacks": PAGE}  # the other calls have none


@bp.before_request
def read_query() -> None:
    """Raises BadField for a parameter that is unknown, stands twice, or breaks its rule."""
    known = PARAMETERS.get(request.endpoint or "", {})
    for name, values in request.args.lists():
        if name not in known or len(values) > 1:
            raise BadField(f"{name[:64]}: {'given twice' if name in known else 'unknown parameter'}")
    limit = request.args.get("limit", "50") or "0"  # the one that an empty text does not leave out
    g.asked = checked(request.args.to_dict() | {"limit": limit}, known)


@bp.post("")
def create() -> ResponseReturnValue:
    """Start a job: 201, or 200 where it was started before."""
    ours = parts()
    asked = read_start(parse(request.get_data()), ours.settings.pipelines)
    note(job=asked.job_id)
    return _at(asked.job_id, 201 if start.start(ours.writer, asked) else 200)


@bp.post("/<id:job_id>/<any(retry, close, revoke):verb>")
def act(job_id: str, verb: str) -> ResponseReturnValue:
    """Open a new attempt, close the job, or give it a new link."""
    start.act(parts().writer, verb, job_id)
    return _at(job_id, 200)


@bp.delete("/<id:job_id>")
def delete(job_id: str) -> tuple[str, int]:
    """Remove a job that is over."""
    start.act(parts().writer, "delete", job_id)
    return "", 204


@bp.errorhandler(Refused)
def refused(_: Refused) -> ResponseReturnValue:
    """GitHub did not take the dispatch: the job's own error says why."""
    return _at(g.noted["job"], 502)


def _at(job_id: str, status: int) -> ResponseReturnValue:
    return one(job_id), status, {"Location": f"{parts().settings.public_url}/api/jobs/{job_id}"}


@bp.get("/<id:job_id>")
def one(job_id: str) -> Response:
    """One job."""
    return jsonify(_as_json(parts().views.find(db.session.connection(), job_id) or abort(404)))


@bp.get("/<id:job_id>/callbacks")
def callbacks(job_id: str) -> Response:
    """A page of a job's callbacks, newest first, and the mark of the next."""
    connection = db.session.connection()
    parts().views.find(connection, job_id) or abort(404)
    rows, before = callbacks_of(connection, job_id, g.asked["limit"], g.asked.get("before"))
    found = [
        {
            "attempt": row.number if row.number > 0 else None,
            "milestone": row.milestone,
            "arrived_at": iso(row.arrived_at),
            "sent_at": iso(row.sent_at),
            "body": json.loads(row.body),
        }
        for row in rows
    ]
    return jsonify(callbacks=found, before=before)


@bp.get("")
def several() -> Response:
    """A page of jobs, newest first, and the mark of the next."""
    views, connection = parts().views, db.session.connection()
    wanted = Wanted(views.clock(connection), **{name: g.asked.get(name) for name in FILTERS})
    rows, before = newest_jobs(connection, g.asked["limit"], g.asked.get("before"), wanted)
    return jsonify(jobs=[_as_json(views.of(row, connection)) for row in rows], before=before)


def _as_json(view: View) -> dict[str, Any]:
    """The watcher's JSON, and what is the operator's only."""
    links, link = parts().links, (view.job_id, view.link)
    said = view.as_json() | {name: getattr(view.attempt, name) for name in PRIVATE}
    return said | {"progress_url": links.page(*link), "badge_url": links.badge(*link)}


class Scrape(Collector):
    """What one scrape of `/metrics` tells."""

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        ours, connection, worker = parts(), db.session.connection(), str(os.getpid())
        labels = ("pipeline", "status", "condition")
        jobs = GaugeMetricFamily("milepost_jobs", "Jobs, by their current attempt.", labels=labels)
        for *state, number in jobs_by_state(connection, ours.views.clock(connection)):
            jobs.add_metric(state, number)
        yield jobs
        stored, newest = stored_callbacks(connection)
        yield GaugeMetricFamily("milepost_callbacks", "Callbacks that are stored.", value=stored)
        if newest is not None:
            age = max(time() - newest, 0)
            yield GaugeMetricFamily("milepost_newest_callback_age_seconds", "How old it is.", value=age)
        waiting = waiting_notifications(connection)
        yield GaugeMetricFamily("milepost_notifications_waiting", "Not sent, not given up.", value=waiting)
        streams = GaugeMetricFamily("milepost_streams", "Open streams.", labels=("worker",))
        streams.add_metric([worker], ours.hub.watchers())
        yield streams
        text = "Callbacks that were not stored, by the status of the answer."
        refused = CounterMetricFamily("milepost_callbacks_refused", text, labels=("worker", "status"))
        for status, number in refusals.by_status.items():
            refused.add_metric([worker, str(status)], number)
        yield refused


@metrics.get("/metrics")
def scrape() -> Response:
    """In Prometheus's text."""
    return Response(generate_latest(Scrape()), content_type=CONTENT_TYPE_PLAIN_0_0_4)
