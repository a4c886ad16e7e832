"""Starting runs at GitHub: once, bounded, and refused in words that help. Its stand-in is on loopback."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Serve
from tests.github import REPOSITORY, GitHub, a_run, github
from tests.milepost import Server, wait_until


@pytest.fixture(scope="module")
def at_github() -> Iterator[GitHub]:
    with github() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def dispatcher(_serve: Serve, at_github: GitHub) -> Server:
    """A Milepost that may start runs."""
    return _serve(**at_github.settings)


def start(server: Server, job_id: str, **fields: object) -> tuple[int, dict[str, object]]:
    answer = server.api("/api/jobs", json={"agent_id": f"agent-{job_id}", "job_id": job_id, **fields})
    return answer.status_code, answer.json()


def test_a_start_asks_github_for_a_run_with_the_four_inputs(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    status, job = start(dispatcher, job_id, region="eu-central")
    assert status == 201
    assert at_github.inputs[-1] == {
        "job_id": job_id,
        "agent_id": f"agent-{job_id}",
        "region": "eu-central",
        "callback_url": f"{dispatcher.url}/api/webhooks/github",
    }
    assert (job["status"], job["condition"]) == ("queued", "live")
    assert str(at_github.runs[-1]["id"]) in str(job["run_url"])
    assert REPOSITORY in str(job["run_url"])


def test_a_server_that_tells_no_details_is_asked_again_without(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.tells_details = False
    try:
        status, job = start(dispatcher, job_id)
    finally:
        at_github.tells_details = True
    assert (status, job["run_url"]) == (201, None)
    assert at_github.dispatched(job_id) == 1


def test_the_same_job_at_the_same_time_is_dispatched_once(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: start(dispatcher, job_id)[0], range(8)))
    assert sorted(answers) == [200] * 7 + [201]
    assert at_github.dispatched(job_id) == 1


def test_two_jobs_of_an_agent_at_the_same_time_are_one(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = [f"{job_id}-{n}" for n in range(8)]
        answers = list(pool.map(lambda job: start(dispatcher, job, agent_id=job_id)[0], jobs))
    assert sorted(answers) == [201] + [409] * 7
    assert sum(at_github.dispatched(job) for job in jobs) == 1


@pytest.mark.parametrize(
    ("status", "message", "headers", "cause"),
    [
        (401, "Bad credentials", {}, "DISPATCH_TOKEN"),
        (403, "Resource not accessible by personal access token", {}, "actions: write"),
        (404, "Not Found", {}, "no workflow provision-agent.yml"),
        (422, "Workflow does not have 'workflow_dispatch' trigger", {}, "add it there"),
        (422, "No ref found for: main", {}, "DISPATCH_REF"),
        (301, "Moved Permanently", {"Location": "http://127.0.0.1:9/"}, "has moved"),
        (403, "x", {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1790000000"}, "after 14:13:20 UTC"),
        (429, "You have exceeded a secondary rate limit", {"Retry-After": "60"}, "rate limit"),
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
    answered, job = start(dispatcher, job_id)
    assert answered == 502
    assert (job["status"], job["condition"]) == ("failed", "over")
    assert cause in str(job["error"])
    assert dispatcher.states(job_id) == ["error", "pending", "pending", "pending", "pending"]
    assert start(dispatcher, job_id)[0] == 200
    assert at_github.dispatched(job_id) == 0


def test_a_github_that_is_away_is_told_and_the_job_kept(serve: Serve, job_id: str) -> None:
    settings = GitHub(url="http://127.0.0.1:9").settings
    server = serve(**settings)
    status, job = start(server, job_id)
    assert (status, job["status"]) == (502, "failed")
    assert "DISPATCH_API_URL" in str(job["error"])


def test_a_hanging_github_is_given_up_and_its_late_run_is_not_started_twice(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.hang = threading.Event()
    try:
        status, job = start(dispatcher, job_id)
    finally:
        at_github.hang.set()
        at_github.hang = None
    assert (status, job["status"]) == (502, "failed")
    assert "did not answer" in str(job["error"])
    wait_until(lambda: at_github.dispatched(job_id))
    answer = dispatcher.api(f"/api/jobs/{job_id}/retry", method="POST")
    assert answer.status_code == 200
    assert at_github.dispatched(job_id) == 1
    assert str(at_github.runs[-1]["id"]) in answer.json()["run_url"]


def test_without_dispatch_settings_nothing_is_stored(server: Server, job_id: str) -> None:
    status, said = start(server, job_id)
    assert status == 409
    assert "DISPATCH_TOKEN" in str(said["error"])
    assert server.api(f"/api/jobs/{job_id}").status_code == 404


def test_a_failed_job_is_retried_as_a_new_attempt(dispatcher: Server, at_github: GitHub, job_id: str) -> None:
    start(dispatcher, job_id)
    first_run = at_github.runs[-1]["id"]
    retry = f"/api/jobs/{job_id}/retry"
    assert dispatcher.api(retry, method="POST").status_code == 409
    dispatcher.report(job_id, "failed", failed_step="provision", workflow_run_id=first_run)
    assert dispatcher.api(retry, method="POST").json()["attempt"] == 2
    assert dispatcher.api(retry, method="POST").status_code == 409
    assert at_github.dispatched(job_id) == 2
    dispatcher.report(job_id, "ansible_complete", workflow_run_id=first_run)
    assert dispatcher.job(job_id)["status"] == "queued"
    dispatcher.report(job_id, "vm_created", workflow_run_id=at_github.runs[-1]["id"])
    job = dispatcher.job(job_id)
    assert (job["attempt"], job["status"]) == (2, "provisioning")


def test_a_job_that_callbacks_registered_cannot_be_retried(dispatcher: Server, job_id: str) -> None:
    dispatcher.report(job_id, "failed")
    answer = dispatcher.api(f"/api/jobs/{job_id}/retry", method="POST")
    assert answer.status_code == 409
    assert "agent" in answer.json()["error"]
    assert dispatcher.api("/api/jobs/nobody/retry", method="POST").status_code == 404


def test_the_token_goes_nowhere_but_to_github(dispatcher: Server, at_github: GitHub, job_id: str) -> None:
    at_github.refuse(307, "", Location=f"{at_github.url}/elsewhere")
    start(dispatcher, job_id)
    assert not any("elsewhere" in path for _, path in at_github.asked)
    assert at_github.settings["DISPATCH_TOKEN"] not in dispatcher.log.read_text()


def test_a_run_made_before_a_crash_is_found_and_not_made_again(at_github: GitHub) -> None:
    assert a_run("x")["display_title"] == "Provision x"
