"""Starting runs at GitHub: once, bounded, and refused in words that help. Its stand-in is on loopback."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.support.databases import age_dispatch
from tests.support.github import REPOSITORY, GitHub, github
from tests.support.server import Serve, Server, wait_until


def test_a_start_asks_github_for_a_run_with_the_four_inputs(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    answer = dispatcher.create(job_id, region="eu-central")
    assert answer.status_code == 201
    assert at_github.inputs[-1] == {
        "job_id": job_id,
        "agent_id": f"agent-{job_id}",
        "region": "eu-central",
        "callback_url": f"{dispatcher.url}/api/webhooks/github",
    }
    assert (answer.json()["status"], answer.json()["condition"]) == ("queued", "live")
    assert str(at_github.runs[-1]["id"]) in answer.json()["run_url"]
    assert REPOSITORY in answer.json()["run_url"]


@pytest.mark.one_database
def test_a_server_that_tells_no_details_is_asked_again_without(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.tells_details = False
    try:
        answer = dispatcher.create(job_id)
    finally:
        at_github.tells_details = True
    assert (answer.status_code, answer.json()["run_url"]) == (201, None)
    assert at_github.dispatched(job_id) == 1


def test_the_same_job_at_the_same_time_is_dispatched_once(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: dispatcher.create(job_id).status_code, range(8)))
    assert sorted(answers) == [200] * 7 + [201]
    assert at_github.dispatched(job_id) == 1


def test_two_jobs_of_an_agent_at_the_same_time_are_one(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = [f"{job_id}-{n}" for n in range(8)]
        answers = list(pool.map(lambda job: dispatcher.create(job, agent_id=job_id).status_code, jobs))
    assert sorted(answers) == [201] + [409] * 7
    assert sum(at_github.dispatched(job) for job in jobs) == 1


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("status", "message", "headers", "cause"),
    [
        (401, "Bad credentials", {}, "DISPATCH_TOKEN"),
        (403, "Resource not accessible by personal access token", {}, "actions: write"),
        (404, "Not Found", {}, "no provision-agent.yml"),
        (422, "Workflow does not have 'workflow_dispatch' trigger", {}, "add it there"),
        (422, "No ref found for: main", {}, "DISPATCH_REF"),
        (301, "Moved Permanently", {"Location": "http://127.0.0.1:9/"}, "has moved"),
        (403, "x", {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "9" * 10}, "try again after"),
        (429, "You have exceeded a secondary rate limit", {"Retry-After": "60"}, "rate limit"),
        (429, "", {"Retry-After": "9" * 400}, "rate limit"),
        (422, 'Unexpected inputs provided: ["region"]', {}, "`inputs` in the pipeline's file"),
        (422, "Cannot trigger a 'workflow_dispatch' on a disabled workflow", {}, "enable it"),
        (422, "Required input 'size' not provided", {}, "make it optional"),
        (500, "", {}, "500"),
    ],
)
def test_a_refusal_names_the_cause_and_the_cure(
    dispatcher: Server,
    at_github: GitHub,
    job_id: str,
    status: int,
    message: str,
    headers: dict[str, str],
    cause: str,
) -> None:
    at_github.refuse(status, message, **headers)
    answer = dispatcher.create(job_id)
    assert answer.status_code == 502
    assert (answer.json()["status"], answer.json()["condition"]) == ("failed", "over")
    assert cause in answer.json()["error"]
    assert dispatcher.states(job_id) == ["error", "pending", "pending", "pending", "pending"]
    assert dispatcher.create(job_id).status_code == 200
    assert at_github.dispatched(job_id) == 0


@pytest.mark.one_database
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"<html>Sign in to the network</html>", id="a login page"),
        pytest.param(b"[" * 100_000, id="nested without end"),
        pytest.param(b'{"workflow_run_id": 1}' + b" " * 2**23, id="too large"),
        pytest.param(b"{}", id="empty"),
        pytest.param(b'"text"', id="no object"),
    ],
)
def test_an_answer_that_is_not_githubs_is_no_dispatch(
    dispatcher: Server, at_github: GitHub, job_id: str, body: bytes
) -> None:
    at_github.raw = body
    answer = dispatcher.create(job_id)
    at_github.raw = None
    assert (answer.status_code, answer.json()["status"]) == (502, "failed")
    assert "DISPATCH_API_URL" in answer.json()["error"]


@pytest.mark.one_database
def test_a_github_that_is_away_is_told_and_the_job_kept(serve: Serve, job_id: str) -> None:
    settings = GitHub(url="http://127.0.0.1:9").settings
    server = serve(**settings)
    answer = server.create(job_id)
    assert (answer.status_code, answer.json()["status"]) == (502, "failed")
    assert "DISPATCH_API_URL" in answer.json()["error"]


@pytest.mark.slow
@pytest.mark.one_database
def test_a_hanging_github_is_given_up_and_its_late_run_started_once(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.hang = threading.Event()
    try:
        answer = dispatcher.create(job_id)
    finally:
        at_github.hang.set()
        at_github.hang = None
    assert (answer.status_code, answer.json()["status"]) == (502, "failed")
    assert "did not answer" in answer.json()["error"]
    wait_until(lambda: at_github.dispatched(job_id))
    answer = dispatcher.api(f"/api/jobs/{job_id}/retry", method="POST")
    assert answer.status_code == 200
    assert at_github.dispatched(job_id) == 1
    assert str(at_github.runs[-1]["id"]) in answer.json()["run_url"]


@pytest.mark.one_database
def test_pages_do_not_wait_for_a_github_that_does_not_answer(serve: Serve, job_id: str) -> None:
    with github() as at_github, ThreadPoolExecutor(8) as pool:
        server = serve(**at_github.settings)
        server.report(job_id, "provisioning")
        at_github.hang = threading.Event()
        starts = [pool.submit(server.create, f"{job_id}-{n}") for n in range(8)]
        wait_until(lambda: at_github.hanging == 4)
        try:
            assert requests.get(server.link(job_id), timeout=5).ok
        finally:
            at_github.hang.set()
        assert [each.result().status_code for each in starts] == [201] * 8


@pytest.mark.one_database
def test_without_dispatch_settings_nothing_is_stored(server: Server, job_id: str) -> None:
    answer = server.create(job_id)
    assert answer.status_code == 409
    assert "DISPATCH_TOKEN" in answer.json()["error"]
    assert server.api(f"/api/jobs/{job_id}").status_code == 404


@pytest.mark.one_database
def test_the_token_goes_nowhere_but_to_github(dispatcher: Server, at_github: GitHub, job_id: str) -> None:
    at_github.refuse(307, "", Location=f"{at_github.url}/elsewhere")
    dispatcher.create(job_id)
    assert not any("elsewhere" in path for _, path in at_github.asked)
    assert at_github.settings["DISPATCH_TOKEN"] not in dispatcher.log.read_text()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("was_made", [True, False])
def test_a_dispatch_that_the_servers_end_interrupted_is_made_once_in_all(
    serve: Serve, job_id: str, was_made: bool, by: signal.Signals
) -> None:
    with github() as at_github:
        server = serve(**at_github.settings)
        interrupt(server, at_github, job_id, was_made, by)
        assert at_github.dispatched(job_id) == was_made
        assert server.create(job_id).status_code == 200  # it may be under way yet
        assert at_github.dispatched(job_id) == was_made
        age_dispatch(server, job_id)
        answer = server.create(job_id)
        assert (answer.status_code, answer.json()["status"]) == (200, "queued")
        assert at_github.dispatched(job_id) == 1
        assert str(at_github.runs[-1]["id"]) in answer.json()["run_url"]


@pytest.mark.parametrize("was_made", [True, False])
def test_what_became_of_an_interrupted_dispatch_is_found_out_by_itself(
    serve: Serve, job_id: str, was_made: bool
) -> None:
    with github() as at_github:
        server = serve(QUIET_AFTER="1", **at_github.settings)
        interrupt(server, at_github, job_id, was_made)
        age_dispatch(server, job_id)
        if was_made:
            wait_until(lambda: server.job(job_id)["run_url"], within=30)
            assert server.job(job_id)["status"] == "queued"
        else:
            wait_until(lambda: server.job(job_id)["status"] == "failed", within=30)
            assert "interrupted" in server.job(job_id)["error"]


def interrupt(
    server: Server, at_github: GitHub, job_id: str, was_made: bool, by: signal.Signals = signal.SIGKILL
) -> None:
    """End the server while it waits for GitHub's answer to a dispatch, and start it again."""
    at_github.hang = threading.Event()
    if not was_made:
        at_github.refuse(500)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.create, job_id)
        wait_until(lambda: at_github.hanging)
        server.stop(by)
        assert asking.exception(30) or asking.result().status_code == 503
    at_github.hang.set()
    at_github.hang = None
    wait_until(lambda: at_github.asked)
    server.start()
