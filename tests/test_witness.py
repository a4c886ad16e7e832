"""GitHub itself as a witness: deliveries in the shape that it documents, and what it is asked on silence.

https://docs.github.com/en/webhooks/webhook-events-and-payloads
"""

import json
import time
import uuid
from collections.abc import Iterator
from html import unescape
from typing import Any
from urllib.parse import urlencode

import pytest
import requests

from tests.support.github import REPOSITORY, GitHub, a_run, github, workflow_job, workflow_run
from tests.support.operator import signed_in
from tests.support.server import CALLBACKS, KEY, Serve, Server, sign, wait_until

WEBHOOK_KEY = "the webhook key of the tests"
QUIET = "1"


@pytest.fixture(scope="module")
def office(_serve: Serve) -> Server:
    """A Milepost that GitHub delivers to."""
    nobody = {"DISPATCH_API_URL": "http://127.0.0.1:9", "DISPATCH_TOKEN": "none"}
    return _serve(GITHUB_WEBHOOK_SECRET=WEBHOOK_KEY, DISPATCH_REPOSITORY=REPOSITORY, **nobody)


@pytest.fixture
def at_github() -> Iterator[GitHub]:
    with github() as stand_in:
        yield stand_in


def deliver(
    server: Server, event: str, payload: dict[str, Any], key: str = WEBHOOK_KEY, **headers: str
) -> requests.Response:
    """As GitHub does it."""
    body = json.dumps(payload).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "GitHub-Hookshot/044aadd",
        "X-GitHub-Event": event,
        "X-GitHub-Delivery": str(uuid.uuid4()),
        "X-Hub-Signature-256": f"sha256={sign(body, key)}",
        **headers,
    }
    return requests.post(server.url + CALLBACKS, data=body, headers=headers, timeout=30)


def told(server: Server, event: str, payload: dict[str, Any]) -> list[str]:
    """Which jobs a delivery was about."""
    answer = deliver(server, event, payload)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["jobs"])


def seen_by_operator(server: Server, job_id: str) -> str:
    return unescape(signed_in(server).see(f"/jobs/{job_id}"))


@pytest.mark.one_database
def test_a_delivery_is_taken_under_its_own_key_alone(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning", workflow_run_id=1)
    payload = workflow_run(a_run(job_id, "completed", "failure", id=1))
    assert deliver(office, "workflow_run", payload, key=KEY).status_code == 401
    unsigned = {"X-Hub-Signature-256": ""}
    assert deliver(office, "workflow_run", payload, **unsigned).status_code == 401
    assert office.job(job_id)["status"] == "provisioning"


@pytest.mark.one_database
def test_without_a_webhook_key_no_delivery_is_taken(server: Server) -> None:
    assert deliver(server, "ping", {"zen": "Keep it logically awesome."}, key="").status_code == 401


@pytest.mark.one_database
def test_ping_and_other_events_are_answered_and_ignored(office: Server, job_id: str) -> None:
    assert told(office, "ping", {"zen": "Keep it logically awesome.", "hook_id": 1, "hook": {}}) == []
    assert told(office, "push", {"ref": "refs/heads/main", "commits": []}) == []
    assert told(office, "workflow_run", workflow_run(a_run(job_id))) == []
    assert office.api(f"/api/jobs/{job_id}").status_code == 404


@pytest.mark.one_database
@pytest.mark.parametrize(
    "payload",
    [{}, {"workflow_run": None}, {"workflow_run": {"id": "x"}, "repository": {"full_name": REPOSITORY}}],
)
def test_a_payload_of_another_shape_is_a_400_that_names_the_event(
    office: Server, payload: dict[str, Any]
) -> None:
    answer = deliver(office, "workflow_run", payload)
    assert answer.status_code == 400
    assert "workflow_run" in answer.json()["error"]


def test_a_run_whose_callbacks_were_lost_is_followed_by_its_name(office: Server, job_id: str) -> None:
    start(office, job_id)
    run = a_run(job_id)
    assert told(office, "workflow_run", workflow_run(run)) == [job_id]
    job = office.job(job_id)
    assert (job["status"], job["condition"]) == ("queued", "waiting")
    assert str(run["id"]) in job["run_url"]
    assert told(office, "workflow_run", workflow_run(run | {"status": "in_progress"})) == [job_id]
    assert office.job(job_id)["status"] == "queued"
    ended = run | {"status": "completed", "conclusion": "success"}
    assert told(office, "workflow_run", workflow_run(ended)) == [job_id]
    assert office.states(job_id) == ["completed"] * 5


def start(server: Server, job_id: str) -> None:
    job = {"agent_id": f"agent-{job_id}", "job_id": job_id, "dispatch": False}
    assert server.api("/api/jobs", json=job).status_code == 201


def test_only_the_name_of_a_run_of_our_own_workflow_is_believed(office: Server, job_id: str) -> None:
    start(office, job_id)
    other_workflow = a_run(job_id, "completed", "failure", path=".github/workflows/ci.yml@main")
    assert told(office, "workflow_run", workflow_run(other_workflow)) == []
    by_a_push = a_run(job_id, "completed", "failure", event="push")
    assert told(office, "workflow_run", workflow_run(by_a_push)) == []
    payload = workflow_run(a_run(job_id, "completed", "failure"))
    payload["repository"]["full_name"] = "mallory/fork"
    assert told(office, "workflow_run", payload) == []
    assert office.job(job_id)["status"] == "queued"


def test_a_run_that_was_cancelled_before_it_started_ends_its_job(office: Server, job_id: str) -> None:
    start(office, job_id)
    assert told(office, "workflow_run", workflow_run(a_run(job_id, "completed", "cancelled"))) == [job_id]
    job = office.job(job_id)
    assert (job["status"], job["condition"], job["failed_step"]) == ("failed", "over", "cancelled")
    assert office.states(job_id)[1] == "cancelled"
    assert "was cancelled" in job["error"]


@pytest.mark.parametrize(
    ("conclusion", "state"),
    [("failure", "error"), ("timed_out", "cancelled"), ("startup_failure", "error"), ("stale", "cancelled")],
)
def test_a_run_whose_runner_died_ends_its_job_where_it_was(
    office: Server, job_id: str, conclusion: str, state: str
) -> None:
    office.report(job_id, "ansible_started", workflow_run_id=41)
    run = a_run(job_id, "completed", conclusion, id=41)
    run["display_title"] = "no id in it"
    assert job_id in told(office, "workflow_run", workflow_run(run))
    assert office.states(job_id) == ["completed", "completed", "completed", state, "pending"]


def test_no_job_of_a_run_ends_it_whatever_became_of_the_job(office: Server, job_id: str) -> None:
    office.report(job_id, "vm_created", workflow_run_id=51)
    run = a_run(job_id, id=51)
    for status, conclusion in (("in_progress", None), ("completed", "success"), ("completed", "failure")):
        told(office, "workflow_job", workflow_job(run, status, conclusion))
        assert office.job(job_id)["status"] == "provisioning"


@pytest.mark.parametrize(
    ("status", "reason"),
    [("waiting", "approval"), ("pending", "run"), ("queued", "runner"), ("requested", "runner")],
)
def test_a_run_that_waits_is_shown_as_waiting_and_not_as_silent(
    office: Server, job_id: str, status: str, reason: str
) -> None:
    office.report(job_id, "provisioning", workflow_run_id=52)
    run = a_run(job_id, status, id=52, updated_at=None)
    assert job_id in told(office, "workflow_run", workflow_run(run))
    job = office.job(job_id)
    assert (job["condition"], job["waiting_for"], job["status"]) == ("waiting", reason, "provisioning")
    told(office, "workflow_run", workflow_run(run | {"status": "in_progress"}))
    job = office.job(job_id)
    assert (job["condition"], job["waiting_for"]) == ("live", None)


def test_an_approval_between_two_jobs_is_a_wait_until_a_callback(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning", workflow_run_id=53)
    told(office, "workflow_job", workflow_job(a_run(job_id, id=53), "waiting"))
    assert office.job(job_id)["waiting_for"] == "approval"
    office.report(job_id, "vm_created", workflow_run_id=53)
    assert office.job(job_id)["condition"] == "live"


def test_a_late_word_is_no_wait(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning", workflow_run_id=54)
    told(
        office,
        "workflow_run",
        workflow_run(a_run(job_id, "queued", id=54, updated_at="2026-01-01T00:00:00Z")),
    )
    assert office.job(job_id)["condition"] == "live"


@pytest.mark.one_database
@pytest.mark.parametrize("conclusion", ["action_required", None])
def test_what_is_no_completion_ends_nothing(office: Server, job_id: str, conclusion: str | None) -> None:
    office.report(job_id, "provisioning", workflow_run_id=55)
    told(office, "workflow_run", workflow_run(a_run(job_id, "completed", conclusion, id=55)))
    assert office.job(job_id)["status"] == "provisioning"
    assert "None" not in seen_by_operator(office, job_id)
    told(office, "workflow_run", workflow_run(a_run(job_id, "completed", "success", id=55)))
    assert office.job(job_id)["status"] == "running"


@pytest.mark.one_database
def test_a_delivery_is_neither_compressed_nor_any_other_callback(office: Server, job_id: str) -> None:
    assert deliver(office, "ping", {}, **{"Content-Encoding": "gzip"}).status_code == 400
    body = json.dumps({"job_id": job_id, "status": "provisioning", "x": "x" * 70_000}).encode()
    assert office.post(body, **{"X-GitHub-Event": ""}).status_code == 401


def test_githubs_form_is_taken_and_so_is_ping_in_it(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning", workflow_run_id=56)
    for event, payload in (
        ("ping", {"zen": "Anything added dilutes everything else."}),
        ("workflow_run", workflow_run(a_run(job_id, "completed", "cancelled", id=56))),
    ):
        body = urlencode({"payload": json.dumps(payload)}).encode()
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "X-GitHub-Event": event,
            "X-Hub-Signature-256": f"sha256={sign(body, WEBHOOK_KEY)}",
        }
        assert (
            requests.post(office.url + CALLBACKS, data=body, headers=headers, timeout=30).status_code == 200
        )
    assert office.job(job_id)["failed_step"] == "cancelled"
    body = b"payload="
    headers["X-Hub-Signature-256"] = f"sha256={sign(body, WEBHOOK_KEY)}"
    assert requests.post(office.url + CALLBACKS, data=body, headers=headers, timeout=30).status_code == 400


@pytest.mark.one_database
@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "tomorrow", "", None])
def test_a_time_that_cannot_be_counts_as_the_arrival(office: Server, job_id: str, time: str | None) -> None:
    office.report(job_id, "provisioning", workflow_run_id=57)
    run = a_run(job_id, "completed", "failure", id=57, updated_at=time, run_started_at=time)
    run["html_url"] = "javascript:alert(1)"
    told(office, "workflow_run", workflow_run(run))
    job = office.job(job_id)
    assert job["status"] == "failed"
    assert job["steps"][1]["finished_at"][:4] == job["created_at"][:4]
    assert "javascript" not in seen_by_operator(office, job_id)
    assert office.api("/api/jobs").ok


def test_a_run_of_another_repository_ends_nothing_of_ours(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning", workflow_run_id=58)
    payload = workflow_run(a_run(job_id, "completed", "failure", id=58))
    payload["repository"]["full_name"] = "mallory/agents"
    assert told(office, "workflow_run", payload) == []
    assert office.job(job_id)["status"] == "provisioning"


def test_an_older_run_that_is_started_again_is_the_newest_attempt(office: Server, job_id: str) -> None:
    now = time.time()
    office.report(job_id, "failed", workflow_run_id=100, sent_at=now - 200)
    office.report(job_id, "failed", workflow_run_id=101, sent_at=now - 100)
    office.report(job_id, "provisioning", workflow_run_id=100, run_attempt=2, sent_at=now)
    job = office.job(job_id)
    assert (job["attempt"], job["status"]) == (3, "provisioning")
    office.report(job_id, "provisioning", workflow_run_id=99, sent_at=now)
    assert office.job(job_id)["attempt"] == 3
    listed = office.api(f"/api/jobs/{job_id}/callbacks").json()["callbacks"]
    assert [each["attempt"] for each in listed] == [None, 3, 2, 1]


def test_a_witness_never_turns_progress_back(office: Server, job_id: str) -> None:
    office.report(job_id, "ansible_complete", workflow_run_id=61)
    run = a_run(job_id, id=61)
    for status in ("queued", "in_progress"):
        told(office, "workflow_run", workflow_run(run | {"status": status}))
        assert office.states(job_id)[4] == "active"
    office.report(job_id, "running", workflow_run_id=61)
    version = office.page(job_id)["version"]
    for status, conclusion in (("completed", "failure"), ("in_progress", None), ("queued", None)):
        told(office, "workflow_run", workflow_run(run | {"status": status, "conclusion": conclusion}))
        assert office.states(job_id) == ["completed"] * 5
    assert office.page(job_id)["version"] == version


def test_where_callbacks_and_github_differ_the_operator_sees_both(office: Server, job_id: str) -> None:
    office.report(job_id, "running", workflow_run_id=71)
    run = a_run(job_id, "completed", "success", id=71)
    told(office, "workflow_run", workflow_run(run))
    assert "disagree" not in seen_by_operator(office, job_id)
    told(office, "workflow_run", workflow_run(run | {"conclusion": "failure"}))
    page = seen_by_operator(office, job_id)
    assert "shown is “Succeeded”, while GitHub says “completed: failure”" in page
    assert "disagree" not in requests.get(office.link(job_id), timeout=30).text


def test_a_delivery_of_an_older_run_changes_nothing_shown(office: Server, job_id: str) -> None:
    office.report(job_id, "vm_created", workflow_run_id=81)
    office.report(job_id, "provisioning", workflow_run_id=82)
    told(office, "workflow_run", workflow_run(a_run(job_id, "completed", "failure", id=81)))
    job = office.job(job_id)
    assert (job["status"], job["attempt"]) == ("provisioning", 2)


def test_a_rerun_is_a_new_attempt(office: Server, job_id: str) -> None:
    office.report(job_id, "failed", workflow_run_id=91)
    run = a_run(job_id, "in_progress", id=91, run_attempt=2)
    told(office, "workflow_run", workflow_run(run))
    job = office.job(job_id)
    assert (job["attempt"], job["status"]) == (2, "queued")


def test_on_silence_github_is_asked_once_by_one_of_all_processes(
    serve: Serve, at_github: GitHub, job_id: str
) -> None:
    server = serve(QUIET_AFTER=QUIET, WEB_CONCURRENCY="2", **at_github.settings)
    jobs = [f"{job_id}-{n}" for n in range(6)]
    for n, id in enumerate(jobs):
        at_github.runs.append(a_run(id, "completed", "failure", id=100 + n))
        server.report(id, "vm_created", workflow_run_id=100 + n)
    server.report(f"{job_id}-over", "running", workflow_run_id=200)
    wait_until(lambda: all(server.job(id)["status"] == "failed" for id in jobs), within=30)
    later = f"{job_id}-later"
    at_github.runs.append(a_run(later, "completed", "success", id=300))
    server.report(later, "vm_created", workflow_run_id=300)
    wait_until(lambda: server.job(later)["status"] == "running", within=30)
    asked = [path.rsplit("/", 1)[1] for _, path in at_github.asked]
    assert sorted(asked) == [*(str(100 + n) for n in range(6)), "300"]


def test_a_silent_job_that_named_no_run_is_found_by_its_name(
    serve: Serve, at_github: GitHub, job_id: str
) -> None:
    server = serve(QUIET_AFTER=QUIET, **at_github.settings)
    server.report(job_id, "ansible_started")
    at_github.runs.append(a_run(job_id, "completed", "cancelled"))
    wait_until(lambda: server.job(job_id)["status"] == "failed", within=30)
    assert server.job(job_id)["failed_step"] == "cancelled"
    assert server.states(job_id)[3] == "cancelled"


@pytest.mark.one_database
def test_a_github_that_refuses_to_tell_changes_nothing_and_is_asked_again(
    serve: Serve, at_github: GitHub, job_id: str
) -> None:
    server = serve(QUIET_AFTER=QUIET, **at_github.settings)
    at_github.refuse(500)
    at_github.runs.append(a_run(job_id, "completed", "failure", id=400))
    server.report(job_id, "vm_created", workflow_run_id=400)
    wait_until(lambda: at_github.asked, within=30)
    assert server.job(job_id)["status"] == "provisioning"
    wait_until(lambda: server.job(job_id)["status"] == "failed", within=30)
    assert "GitHub answers 500" in server.log.read_text()


def test_a_run_that_github_no_longer_has_does_not_stop_asking_of_others(
    serve: Serve, at_github: GitHub, job_id: str
) -> None:
    server = serve(QUIET_AFTER=QUIET, **at_github.settings)
    for n in range(4):
        server.report(f"{job_id}-{n}", "vm_created", workflow_run_id=500 + n)
    at_github.runs.append(a_run(f"{job_id}-1", "completed", "failure", id=501))
    at_github.runs.append(a_run(f"{job_id}-2", "completed", "failure", id=502) | {"run_attempt": None})
    at_github.runs.append(a_run(f"{job_id}-3", "completed", "failure", id=503))
    for n in (1, 3):
        wait_until(lambda n=n: server.job(f"{job_id}-{n}")["status"] == "failed", within=30)
    for n in (0, 2):
        assert server.job(f"{job_id}-{n}")["status"] == "provisioning"
        wait_until(
            lambda path=f"/{500 + n}": sum(p.endswith(path) for _, p in at_github.asked) > 1, within=30
        )
