"""`GET /metrics`: Prometheus's text. What is counted is read from the database, the same in every process.

What only a process knows carries its process id as `worker`; behind several a scrape meets one of them.
"""

import os
from collections.abc import Iterator
from time import time

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from webapp import refusals
from webapp.parts import parts
from webapp.routes import guard
from webapp.storage.jobs import jobs_by_state, stored_callbacks
from webapp.storage.notifications import waiting_notifications
from webapp.storage.tables import db

bp = Blueprint("metrics", __name__)
bp.before_request(guard.require_token)


class Scrape(Collector):
    """One scrape."""

    def collect(self) -> Iterator[Metric]:
        """All that is told."""
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


@bp.get("/metrics")
def metrics() -> Response:
    """For a client that bears the operator token."""
    return Response(generate_latest(Scrape()), content_type=CONTENT_TYPE_PLAIN_0_0_4)
