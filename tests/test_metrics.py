"""`GET /metrics`: what an operator's Prometheus reads."""

import json
from collections.abc import Iterator

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Serve, Server, wait_until

Samples = dict[tuple[str, str, str], float]


def scrape(server: Server) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of each sample."""
    answer = server.api("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def jobs(server: Server) -> Samples:
    """How many jobs there are by (pipeline, status, condition)."""
    return {
        (labels["pipeline"], labels["status"], labels["condition"]): value
        for name, labels, value in scrape(server)
        if name == "milepost_jobs"
    }


def value(server: Server, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(value for each, _, value in scrape(server) if each == name)


@pytest.mark.one_database
@pytest.mark.parametrize("authorization", ["", "Bearer wrong"])
def test_metrics_are_for_a_client_that_bears_the_token(server: Server, authorization: str) -> None:
    answer = requests.get(f"{server.url}/metrics", headers={"Authorization": authorization}, timeout=30)
    assert answer.status_code == 401
    assert set(answer.json()) == {"error"}


def test_jobs_and_callbacks_are_counted_the_same_by_every_process(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="3600")
    assert (jobs(server), value(server, "milepost_callbacks")) == ({}, 0)
    server.report(f"{job_id}-1", "failed", workflow_run_id=1)
    server.report(f"{job_id}-1", "running", workflow_run_id=2)
    server.report(f"{job_id}-2", "failed")
    server.report(f"{job_id}-2", "failed")  # a duplicate
    server.create(f"{job_id}-3", dispatch=False)
    server.report(f"{job_id}-4", "heartbeat")
    server.report(f"{job_id}-5", "vm_created")
    quiet = {
        ("provision-agent", "running", "over"): 1,
        ("provision-agent", "failed", "over"): 1,
        ("provision-agent", "queued", "live"): 1,
        ("provision-agent", "queued", "quiet"): 1,
        ("provision-agent", "provisioning", "quiet"): 1,
    }
    wait_until(lambda: jobs(server) == quiet)
    other = serve(DATABASE_URL=server.database_url, QUIET_AFTER="1", LOST_AFTER="3600")
    for each in (server, other):
        assert value(each, "milepost_callbacks") == 5
        assert 1 <= value(each, "milepost_newest_callback_age_seconds") < 60
        assert value(each, "milepost_notifications_waiting") == 0


@pytest.mark.one_database
def test_what_only_a_process_knows_names_its_process(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    assert value(server, "milepost_streams") == 0
    stream = server.events(job_id)
    stream.next()
    server.post(b"{}", key="another key than the right one")
    server.post(json.dumps({"job_id": "a b", "status": "running"}).encode())
    server.post(b"x" * 70_000)
    found = [each for each in scrape(server) if "worker" in each[1]]
    assert {labels["worker"] for _, labels, _ in found} == {str(server.workers()[0])}
    refused = {labels["status"]: value for name, labels, value in found if "refused" in name}
    assert refused == {"401": 1, "400": 1, "413": 1}
    assert value(server, "milepost_streams") == 1
    stream.close()
