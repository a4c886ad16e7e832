"""The operator's door for machines, by its contract."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

import pytest
import requests

from tests.support.github import GitHub
from tests.support.server import KEY, OPERATOR_TOKEN, Serve, Server, sign, wait_until

FIELDS = {
    "job_id",
    "agent_id",
    "region",
    "status",
    "condition",
    "attempt",
    "failed_step",
    "error",
    "version",
    "created_at",
    "last_signal_at",
    "run_url",
    "steps",
    "pipeline",
    "subject",
    "waiting_for",
    "expected",
    "note",
    "result_url",
    "server_left",
}
SITE = """
[[steps]]
id = "queued"
label = "Queued"
[[steps]]
id = "building"
label = "Building"
"""
OPERATORS = {"progress_url", "badge_url", "server_id", "server_ip", "tailscale_ip"}


def ids(page: dict[str, Any]) -> list[str]:
    return [job["job_id"] for job in page["jobs"]]


@pytest.mark.one_database
@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", f"Basic {OPERATOR_TOKEN}", f"Bearer {OPERATOR_TOKEN}x", "Bearer é"],
)
def test_who_does_not_bear_the_token_learns_and_starts_nothing(
    serve: Serve, job_id: str, authorization: str
) -> None:
    server = serve()  # one of its own: ten wrong tokens in a minute are too many
    server.report(job_id, "provisioning")
    headers = {"Authorization": authorization.encode()}
    for method, path in (
        ("GET", "/api/jobs"),
        ("GET", f"/api/jobs/{job_id}"),
        ("GET", "/api/jobs/nobody"),
        ("POST", f"/api/jobs/{job_id}/retry"),
        ("POST", "/api/jobs"),
    ):
        body = {"agent_id": "a", "job_id": f"{job_id}-2", "dispatch": False}
        answer = requests.request(method, server.url + path, headers=headers, json=body, timeout=30)
        assert answer.status_code == 401
        assert set(answer.json()) == {"error"}
    assert server.api(f"/api/jobs/{job_id}-2").status_code == 404


def test_a_job_is_created_at_its_location(server: Server, job_id: str) -> None:
    answer = server.create(job_id, region="eu", dispatch=False)
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"{server.url}/api/jobs/{job_id}"
    assert set(job) == FIELDS | OPERATORS
    assert (job["agent_id"], job["region"], job["status"]) == (f"agent-{job_id}", "eu", "queued")
    assert (job["condition"], job["attempt"], job["last_signal_at"]) == ("live", 1, None)
    assert server.api(answer.headers["Location"].removeprefix(server.url)).json() == job
    assert requests.get(job["progress_url"], timeout=30).status_code == 200


def test_a_job_without_an_id_is_given_one(server: Server, job_id: str) -> None:
    answer = server.api(
        "/api/jobs", json={"agent_id": job_id, "dispatch": False, "region": "", "job_id": None}
    )
    assert answer.status_code == 201
    assert re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", answer.json()["job_id"])
    assert answer.json()["region"] is None


def test_the_same_job_id_again_is_the_same_job(dispatcher: Server, at_github: GitHub, job_id: str) -> None:
    first = dispatcher.create(job_id, dispatch=True)
    again = dispatcher.create(job_id, dispatch=True, region="elsewhere")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]
    assert at_github.dispatched(job_id) == 1
    dispatcher.report(job_id, "failed")
    assert dispatcher.create(job_id, dispatch=True).json()["status"] == "failed"
    assert at_github.dispatched(job_id) == 1


def test_an_agents_unfinished_job_is_in_the_way_until_it_ends_or_is_lost(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="2")
    server.create(job_id, dispatch=False)
    second = {"agent_id": f"agent-{job_id}", "job_id": f"{job_id}-2", "dispatch": False}
    third = second | {"job_id": f"{job_id}-3"}
    answer = server.api("/api/jobs", json=second)
    assert answer.status_code == 409
    assert job_id in answer.json()["error"]
    assert server.api(f"/api/jobs/{job_id}-2").status_code == 404
    server.report(job_id, "failed")
    assert server.api("/api/jobs", json=second).status_code == 201
    server.report(f"{job_id}-2", "vm_created")
    assert server.api("/api/jobs", json=third).status_code == 409
    wait_until(lambda: server.job(f"{job_id}-2")["condition"] == "lost")
    assert server.api("/api/jobs", json=third).status_code == 201


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "agent_id"),
        ({"agent_id": ""}, "agent_id"),
        ({"agent_id": None}, "agent_id"),
        ({"agent_id": 7}, "agent_id"),
        ({"agent_id": "a b"}, "agent_id"),
        ({"agent_id": "a\n"}, "agent_id"),
        ({"agent_id": "$(reboot)"}, "agent_id"),
        ({"agent_id": "-a"}, "agent_id"),
        ({"agent_id": "x" * 65}, "agent_id"),
        ({"agent_id": "a", "region": "eu;"}, "region"),
        ({"agent_id": "a", "region": ["eu"]}, "region"),
        ({"agent_id": "a", "job_id": "../x"}, "job_id"),
        ({"agent_id": "a", "job_id": True}, "job_id"),
        ({"agent_id": "a", "dispatch": "false"}, "dispatch"),
        ({"agent_id": "a", "dispatch": 0}, "dispatch"),
        ({"agent_id": "a", "agent": "b"}, "agent"),
    ],
)
def test_a_bad_field_is_named(server: Server, fields: dict[str, object], named: str) -> None:
    answer = server.api("/api/jobs", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{named}:")


@pytest.mark.one_database
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"agent_id": "a", "agent_id": "b"}', b'{"a": NaN}']
)
def test_a_body_that_is_not_strict_json_is_a_400(server: Server, body: bytes) -> None:
    answer = server.api("/api/jobs", data=body, method="POST")
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}


@pytest.mark.one_database
def test_a_body_over_the_limit_is_a_413(server: Server) -> None:
    body = b'{"agent_id": "' + b"a" * 70_000 + b'"}'
    assert server.api("/api/jobs", data=body).status_code == 413


@pytest.mark.one_database
def test_without_dispatch_settings_nothing_is_stored(server: Server, job_id: str) -> None:
    for fields in ({"dispatch": True}, {"dispatch": None}):
        answer = server.create(job_id, **fields)
        assert answer.status_code == 409
        assert "DISPATCH_TOKEN" in answer.json()["error"]
        assert "DISPATCH_REPOSITORY" in answer.json()["error"]
    assert server.api(f"/api/jobs/{job_id}").status_code == 404


@pytest.mark.one_database
def test_a_job_that_github_refuses_is_kept_with_the_reason(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.refuse(403, "Resource not accessible by personal access token")
    answer = dispatcher.create(job_id, dispatch=True)
    assert answer.status_code == 502
    assert answer.headers["Location"] == f"{dispatcher.url}/api/jobs/{job_id}"
    assert (answer.json()["status"], answer.json()["condition"]) == ("failed", "over")
    assert "actions: write" in answer.json()["error"]
    assert dispatcher.job(job_id) == answer.json()


@pytest.mark.parametrize("job_id", ["nobody", "%00", "a%20b", "%F0%9F%90%AB", "x" * 65, "'", "a%0Ab"])
def test_an_unknown_job_is_a_404_in_json(server: Server, job_id: str) -> None:
    for method, verb in (("GET", ""), ("POST", "/retry")):
        answer = server.api(f"/api/jobs/{job_id}{verb}", method=method)
        assert answer.status_code == 404
        assert set(answer.json()) == {"error"}


@pytest.mark.one_database
def test_an_unknown_method_is_a_405_in_json(server: Server) -> None:
    answer = server.api("/api/jobs", method="DELETE")
    assert answer.status_code == 405
    assert "GET" in answer.headers["Allow"]
    assert set(answer.json()) == {"error"}


def test_a_job_that_callbacks_registered_has_all_that_they_told(server: Server, job_id: str) -> None:
    server.report(job_id, "running", server_id=4711, server_ip="192.0.2.7", tailscale_ip="100.64.0.7")
    job = server.job(job_id)
    assert (job["agent_id"], job["region"]) == (None, None)
    assert (job["server_id"], job["server_ip"]) == ("4711", "192.0.2.7")
    assert job["tailscale_ip"] == "100.64.0.7"
    assert set(server.page(job_id)) == FIELDS


def test_jobs_are_listed_newest_first_a_page_at_a_time(serve: Serve, job_id: str) -> None:
    server = serve()
    assert server.api("/api/jobs").json() == {"jobs": [], "before": None}
    made = [f"{job_id}-{n:02}" for n in range(51)]
    for id in made:
        server.create(id, dispatch=False)
    newest = made[::-1]
    first = server.api("/api/jobs").json()
    assert ids(first) == newest[:50]
    assert set(first["jobs"][0]) == FIELDS | OPERATORS
    last = server.api("/api/jobs", params={"before": first["before"]}).json()
    assert (ids(last), last["before"]) == (newest[50:], None)
    everything = server.api("/api/jobs?limit=200").json()
    assert (ids(everything), everything["before"]) == (newest, None)
    found, mark = [], None
    while True:
        params = {"limit": "17", **({"before": mark} if mark else {})}
        page = server.api("/api/jobs", params=params).json()
        found += ids(page)
        server.create(f"later-{len(found)}", dispatch=False)  # moves no page
        if not (mark := page["before"]):
            break
    assert found == newest
    assert server.api("/api/jobs?limit=51").json()["before"] is not None


def test_jobs_are_filtered_by_status_and_agent(serve: Serve, job_id: str) -> None:
    server = serve()
    for n, milestone in enumerate(("", "vm_created", "running", "failed")):
        server.create(f"{job_id}-{n}", agent_id=f"agent-{n}", dispatch=False)
        if milestone:
            server.report(f"{job_id}-{n}", milestone)
    for n, status in enumerate(("queued", "provisioning", "running", "failed")):
        assert ids(server.api(f"/api/jobs?status={status}").json()) == [f"{job_id}-{n}"]
        assert ids(server.api(f"/api/jobs?agent_id=agent-{n}&status=").json()) == [f"{job_id}-{n}"]
    assert ids(server.api("/api/jobs?agent_id=agent-1&status=failed").json()) == []
    assert ids(server.api("/api/jobs?agent_id=agent").json()) == []


def test_jobs_are_filtered_by_condition_pipeline_run_and_time(
    serve: Serve, job_id: str, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    server = serve(PIPELINES=str(tmp_path), GITHUB_WEBHOOK_SECRET=KEY, QUIET_AFTER="3600", LOST_AFTER="3600")
    waiting, live, over, site = (f"{job_id}-{n}" for n in range(4))
    server.report(waiting, "heartbeat", workflow_run_id=7, repository="a/b")
    run = {"id": 7, "run_attempt": 1, "status": "waiting", "updated_at": None}
    said = {"workflow_run": run, "repository": {"full_name": "a/b"}, "action": "requested"}
    body = json.dumps(said).encode()
    signature = f"sha256={sign(body)}"
    headers = {"X-Hub-Signature-256": signature, "X-GitHub-Event": "workflow_run"}
    assert server.post(body, **headers).status_code == 200
    server.report(live, "vm_created", workflow_run_id="0099999999999999999")
    noted = datetime.now(UTC).isoformat()
    server.report(over, "failed", workflow_run_id=8)
    server.report(over, "provisioning", workflow_run_id=9)
    server.report(over, "failed", workflow_run_id=9)
    server.report(over, "failed", workflow_run_id=6)  # an older run, whose callbacks are no attempt
    server.report(site, "building", pipeline="site")
    for query, found in {
        "condition=waiting": [waiting],
        "condition=live": [site, live],
        "condition=over": [over],
        "condition=lost": [],
        "pipeline=site": [site],
        "pipeline=site&condition=over": [],
        "pipeline=nobody": [],
        "run_id=8": [over],
        "run_id=6": [],
        "run_id=009": [over],
        "run_id=99999999999999999": [live],
        "run_id=10": [],
        "since=2020-01-01": [site, over, live, waiting],
        f"since={noted}": [site, over],
        f"since={noted.replace('+', '%2B')}&status=failed": [over],
        "since=2999-01-01T00:00:00Z": [],
        "status=&condition=&agent_id=&pipeline=&run_id=&since=&before=": [site, over, live, waiting],
    }.items():
        assert ids(server.api(f"/api/jobs?{query}").json()) == found, query


def test_a_jobs_callbacks_are_listed_newest_first_a_page_at_a_time(server: Server, job_id: str) -> None:
    assert server.api(f"/api/jobs/{job_id}/callbacks").status_code == 404
    now = round(time())
    server.report(job_id, "provisioning", workflow_run_id=2, sent_at=now)
    server.report(job_id, "heartbeat", workflow_run_id=2, note="half")
    server.report(job_id, "vm_created", workflow_run_id=1)  # an older run
    server.report(job_id, "failed", workflow_run_id=2, error="no capacity", unknown=["kept"])
    path = f"/api/jobs/{job_id}/callbacks"
    page = server.api(path).json()
    assert page["before"] is None
    told = [(each["milestone"], each["attempt"]) for each in page["callbacks"]]
    assert told == [("failed", 1), ("vm_created", None), (None, 1), ("provisioning", 1)]
    newest, oldest = page["callbacks"][0], page["callbacks"][-1]
    assert set(newest) == {"attempt", "milestone", "arrived_at", "sent_at", "body"}
    assert (newest["sent_at"], newest["body"]["unknown"]) == (None, ["kept"])
    assert datetime.fromisoformat(oldest["sent_at"]).timestamp() == now
    first = server.api(f"{path}?limit=3").json()
    rest = server.api(path, params={"limit": "3", "before": first["before"]}).json()
    assert first["callbacks"] + rest["callbacks"] == page["callbacks"]
    assert rest["before"] is None


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("query", "named"),
    [
        *(f"limit={limit} limit".split() for limit in ("0", "201", "-1", "1.5", "x", "1e1", "%D9%A1", "0x1")),
        ("limit=", "limit"),
        ("status=done", "status"),
        ("condition=dead", "condition"),
        ("run_id=x", "run_id"),
        ("run_id=-1", "run_id"),
        ("run_id=123456789012345678901", "run_id"),
        ("since=yesterday", "since"),
        ("since=1700000000", "since"),
        ("colour=blue", "colour"),
        ("status=failed&status=running", "status"),
        ("status=Running", "status"),
        ("agent_id=%00", "agent_id"),
        ("agent_id=a%20b", "agent_id"),
        *(f"before={mark} before".split() for mark in ("x", "%00", "bm9uc2Vuc2U=", "MS4wIAA=", "MSAy%C3%A9")),
    ],
)
def test_a_bad_parameter_is_named(server: Server, query: str, named: str) -> None:
    answer = server.api(f"/api/jobs?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{named}:")


def test_what_callbacks_told_beside_milestones_is_shown(server: Server, job_id: str) -> None:
    told = {"workflow_run_id": "17", "repository": "octo/site", "subject": "octo/site · v2"}
    server.report(job_id, "provisioning", **told)
    server.report(job_id, "heartbeat", note="5 of 8 built")
    job = server.page(job_id)
    assert (job["subject"], job["note"]) == ("octo/site · v2", "5 of 8 built")
    assert job["run_url"] == "https://github.com/octo/site/actions/runs/17/attempts/1"
    server.report(job_id, "running", result_url="https://site.example/", **told)
    job = server.page(job_id)
    assert (job["note"], job["result_url"]) == (None, "https://site.example/")
    found = server.api("/api/jobs?run_id=17").json()
    assert job_id in ids(found)


def test_a_job_is_closed_a_callback_takes_that_back_and_it_is_deleted(server: Server, job_id: str) -> None:
    path = f"/api/jobs/{job_id}"
    server.create(job_id, dispatch=False)
    assert server.api(path, method="DELETE").status_code == 409
    closed = server.api(f"{path}/close", method="POST")
    assert (closed.status_code, closed.json()["failed_step"], closed.json()["condition"]) == (
        200,
        "cancelled",
        "over",
    )
    assert server.api(f"{path}/close", method="POST").status_code == 409
    server.report(job_id, "heartbeat")
    assert server.job(job_id)["condition"] == "live"
    assert server.api(f"{path}/close", method="POST").status_code == 409
    server.report(job_id, "failed")
    link = server.link(job_id)
    assert server.api(path, method="DELETE").status_code == 204
    assert server.api(path).status_code == 404
    assert requests.get(link, timeout=30).status_code == 404
    assert server.report(job_id, "provisioning") is True
    assert server.api(path).status_code == 404
    assert server.create(job_id, dispatch=False).status_code == 201
    assert server.report(job_id, "provisioning") is False


def test_a_new_link_is_made_and_the_old_one_is_gone_for_good(server: Server, job_id: str) -> None:
    server.report(job_id, "failed")
    old = server.link(job_id)
    new = server.api(f"/api/jobs/{job_id}/revoke", method="POST").json()["progress_url"]
    assert requests.get(old, timeout=30).status_code == 404
    assert requests.get(new, timeout=30).status_code == 200
    assert server.api("/api/jobs/nobody/revoke", method="POST").status_code == 404


@pytest.mark.one_database
@pytest.mark.parametrize("call", ["", "/retry POST", "/close POST", "/callbacks", " DELETE"])
def test_an_unknown_parameter_is_named_by_every_call(server: Server, job_id: str, call: str) -> None:
    server.report(job_id, "failed")
    path, _, method = call.partition(" ")
    answer = server.api(f"/api/jobs/{job_id}{path}?colour=blue", method=method or "GET")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("colour:")
    assert server.job(job_id)["status"] == "failed"
