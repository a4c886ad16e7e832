"""The log: one line for each request and for each event that matters, with nothing secret, by nobody else."""

import itertools
import json
import re
import secrets
import socket
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests

from tests.support.github import TOKEN, GitHub
from tests.support.operator import Operator, signed_in
from tests.support.server import CALLBACKS, KEY, OPERATOR_TOKEN, Serve, Server, wait_until

pytestmark = pytest.mark.one_database

FORGED = '\r\n{"event": "forged"}\n\u2028\x1b[2K"'


def lines(server: Server) -> list[dict[str, Any]]:
    """All lines, those of gunicorn itself among them: each is JSON."""
    return [json.loads(line) for line in server.log.read_text().split("\n") if line]


def about(server: Server, event: str, **fields: object) -> list[dict[str, Any]]:
    """The lines of an event, with these fields."""
    return [
        line
        for line in lines(server)
        if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
    ]


@pytest.mark.parametrize("path", ["", "/events"])
def test_a_request_has_one_line_with_its_id(office: Server, job_id: str, path: str) -> None:
    office.report(job_id, "running")
    answer = requests.get(office.link(job_id) + path, timeout=30)
    line = wait_until(lambda: about(office, "request", request=answer.headers["X-Request-Id"]))
    assert len(line) == 1
    assert (line[0]["method"], line[0]["route"], line[0]["status"]) == ("GET", f"/p/<token>{path}", 200)
    assert line[0]["job"] == job_id
    assert line[0]["ms"] >= 0
    assert line[0]["address"] == "127.0.0.1"


def test_a_healthy_healthz_leaves_no_line_and_gunicorn_writes_as_we_do(office: Server) -> None:
    assert requests.get(f"{office.url}/healthz", timeout=30).ok
    answer = requests.get(f"{office.url}/nothing", timeout=30)
    wait_until(lambda: about(office, "request", request=answer.headers["X-Request-Id"]))
    assert about(office, "request", route="/healthz") == []
    assert any(line["event"].startswith("Listening at") for line in lines(office))


def test_the_request_id_does_not_tell_how_many_requests_there_were(office: Server) -> None:
    ids = [requests.get(f"{office.url}/healthz", timeout=30).headers["X-Request-Id"] for _ in range(3)]
    steps = [int(after, 16) - int(before, 16) for before, after in itertools.pairwise(ids)]
    assert all(abs(step) > 1000 for step in steps)


def test_no_share_token_is_in_any_line_however_malformed_the_request(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning")
    path = urlsplit(office.link(job_id)).path
    for request in (
        f"GET {path} HTTP/9.9\r\n\r\n",
        f"GET {path}\r\n\r\n",
        f"G@T {path} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET {path} HTTP/1.1\r\nHost: x\r\nBad Header: {path}\r\n\r\n",
        f"GET {path}?{'x' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET {path}/{path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {path}\r\n\r\n",
        f"GET {path}/../{path}/events HTTP/1.1\r\nHost: x\r\nReferer: {path}\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", office.port), timeout=30) as connection:
            connection.sendall(request.encode())
            assert re.match(rb"HTTP/1.1 [45]\d\d ", connection.recv(100))
    log = office.log.read_text()
    assert "Invalid request" in log
    for part in path.rpartition("/")[2].split("."):
        assert part == job_id or part not in log


def test_a_refused_callback_has_its_cause(office: Server, job_id: str) -> None:
    refused = [
        (b"{}", "another key than the right one", "the signature is missing or wrong"),
        (b'{"job_id": "a b", "status": "running"}', KEY, "job_id"),
        (b'{"job_id": "x", "status": "running", "sent_at": 1}', KEY, "sent_at"),
    ]
    for body, key, cause in refused:
        answer = office.post(body, key)
        [line] = wait_until(partial(about, office, "request", request=answer.headers["X-Request-Id"]))
        assert line["status"] == answer.status_code
        assert cause in line["cause"]


def test_what_the_operator_does_has_a_line(office: Server, at_github: GitHub, job_id: str) -> None:
    operator = Operator(office)
    operator.sign_in("not the operator token")
    operator.sign_in()
    operator.submit("/", agent_id=f"agent-{job_id}", job_id=job_id, dispatch="on")
    office.report(job_id, "failed")
    operator.submit(f"/jobs/{job_id}/retry", f"/jobs/{job_id}")
    operator.submit(f"/jobs/{job_id}/revoke", f"/jobs/{job_id}")
    at_github.refuse(401, "Bad credentials")
    office.api("/api/jobs", json={"agent_id": f"agent-{job_id}-2", "job_id": f"{job_id}-2"})
    operator.submit("/sign-out")
    wait_until(lambda: about(office, "sign-out"))
    assert about(office, "sign-in refused", address="127.0.0.1")[0]["cause"] == "the token is wrong"
    assert about(office, "sign-in", address="127.0.0.1")
    assert len(about(office, "start", job=job_id)) == 1
    assert len(about(office, "retry", job=job_id, attempt=2)) == 1
    assert len(about(office, "link revoked", job=job_id)) == 1
    [refused] = about(office, "dispatch refused", job=f"{job_id}-2")
    assert "DISPATCH_TOKEN" in refused["cause"]
    assert all(line["request"] for line in about(office, "start", job=job_id))


def test_no_input_forges_a_line(office: Server, job_id: str) -> None:
    office.report(job_id, "failed", error=FORGED, failed_step=FORGED)
    office.post(json.dumps({"job_id": FORGED, "status": FORGED}).encode())
    office.api("/api/jobs", json={"agent_id": FORGED})
    office.api("/api/jobs", params={"before": FORGED, "agent_id": FORGED})
    office.api(f"/api/jobs/{quote(FORGED)}")
    operator = signed_in(office)
    operator.sign_in(FORGED)
    operator.submit("/", agent_id=FORGED, region=FORGED)
    operator.get(f"{office.url}/jobs/{quote(FORGED)}", timeout=30)
    operator.get(office.url, params={"q": FORGED, "status": FORGED, "before": FORGED}, timeout=30)
    quoted = FORGED.encode("unicode_escape").decode()
    headers = {
        "X-Forwarded-For": quoted,
        "X-Request-Id": quoted,
        "User-Agent": quoted,
        "X-GitHub-Event": quoted,
    }
    requests.post(office.url + CALLBACKS, data=FORGED.encode(), headers=headers, timeout=30)
    last = requests.request("FORGE", f"{office.url}/{quote(FORGED)}", timeout=30)
    wait_until(lambda: about(office, "request", request=last.headers["X-Request-Id"]))
    assert about(office, "forged") == []
    assert all(line["time"] and line["level"] in ("info", "warning", "error") for line in lines(office))
    assert office.log.read_text().isprintable() or not re.search(r"[^\x20-\x7e\n]", office.log.read_text())


def test_no_secret_is_ever_in_the_log(office: Server, at_github: GitHub, job_id: str) -> None:
    """After a session of everything, whatever became of it."""
    typed = f"typed-{secrets.token_hex(8)}"
    link = office.flask("sign-in").stdout.strip()
    operator = Operator(office)
    operator.submit("/sign-in", link.removeprefix(office.url))
    cookies = [str(operator.cookie.value)]
    csrf = re.findall(r'name="csrf" value="([^"]+)"', operator.see())
    operator.submit("/", agent_id=f"agent-{job_id}", job_id=job_id, dispatch="on")
    share = office.link(job_id)
    for path in ("", "/steps", "/nothing", "/steps?after=x"):
        requests.get(share + path, timeout=30)
    with requests.get(f"{share}/events", stream=True, timeout=30):
        office.report(job_id, "failed")
    at_github.refuse(401, "Bad credentials")
    operator.submit(f"/jobs/{job_id}/retry", f"/jobs/{job_id}")
    operator.submit(f"/jobs/{job_id}/revoke", f"/jobs/{job_id}")
    requests.get(share, timeout=30)
    requests.get(f"{office.url}/api/jobs", headers={"Authorization": f"Bearer {typed}"}, timeout=30)
    Operator(office).sign_in(typed)
    office.post(b"{}", key=typed)
    last = office.api(f"/api/jobs?token={OPERATOR_TOKEN}")
    wait_until(lambda: about(office, "request", request=last.headers["X-Request-Id"]))
    log = office.log.read_text()
    keys = [link.rsplit("=", 1)[1], share.rsplit("/", 1)[1], share.rsplit(".", 1)[1]]
    environment = [office.environ[name] for name in ("SECRET_KEY", "GITHUB_WEBHOOK_SECRET")]
    for secret in (OPERATOR_TOKEN, KEY, TOKEN, typed, *environment, *cookies, *csrf, *keys):
        assert secret not in log


def test_a_callbacks_line_names_job_report_and_whether_it_was_a_repeat(office: Server, job_id: str) -> None:
    for milestone in ("vm_created", "vm_created", "heartbeat"):
        office.report(job_id, milestone)
    told = wait_until(lambda: len(found := about(office, "request", job=job_id)) == 3 and found)
    assert [(line["report"], line["duplicate"]) for line in told] == [
        ("vm_created", False),
        ("vm_created", True),
        ("heartbeat", False),
    ]


def test_each_change_of_state_has_a_line_over_all_processes(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="2", WEB_CONCURRENCY="2")
    server.report(f"{job_id}-done", "running")
    server.report(f"{job_id}-failed", "failed")
    server.report(f"{job_id}-cancelled", "failed", failed_step="cancelled")
    server.report(job_id, "vm_created")
    wait_until(lambda: about(server, "lost", job=job_id))
    server.report(job_id, "heartbeat")
    wait_until(lambda: about(server, "recovered", job=job_id))
    events = ("quiet", "lost", "recovered")
    assert [len(about(server, event, job=job_id, attempt=1)) for event in events[:2]] == [1, 1]
    for event in ("done", "failed", "cancelled"):
        assert [line["job"] for line in about(server, event)] == [f"{job_id}-{event}"]


def test_what_the_operator_does_tells_from_where(office: Server, job_id: str) -> None:
    office.create(job_id, dispatch=False)
    for verb in ("close", "revoke"):
        assert office.api(f"/api/jobs/{job_id}/{verb}", method="POST").status_code == 200
    assert office.api(f"/api/jobs/{job_id}", method="DELETE").status_code == 204
    for event in ("start", "closed", "link revoked", "deleted"):
        assert len(wait_until(partial(about, office, event, job=job_id, address="127.0.0.1"))) == 1
