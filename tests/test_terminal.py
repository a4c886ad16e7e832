"""The terminal's door: the operator's verbs without a browser."""

import re

import pytest
import requests

from tests.support.server import Server


def rehearse(server: Server, *options: str) -> str:
    """Play a run without a pause and return its job's id."""
    said = server.flask("rehearse", "--pace", "0", *options).stdout
    found = re.fullmatch(rf"Progress page: ({re.escape(server.url)}/p/(.+)\.[^.]+)\n", said)
    assert found, said
    assert requests.get(found[1], timeout=30).ok
    return found[2]


def test_link_prints_the_progress_url(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    assert server.flask("link", job_id).stdout == server.link(job_id) + "\n"


def test_an_unknown_job_has_no_link(server: Server, job_id: str) -> None:
    done = server.flask("link", job_id, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert job_id in done.stderr and "Traceback" not in done.stderr


def test_jobs_lists_the_newest_first(server: Server, job_id: str) -> None:
    server.report(f"{job_id}-a", "failed")
    agent = {"agent_id": f"{job_id}-agent", "job_id": f"{job_id}-b", "dispatch": False}
    assert server.api("/api/jobs", json=agent).status_code == 201
    newest, older = server.flask("jobs", "--limit", "2").stdout.splitlines()
    assert newest.split()[1:] == ["queued", "live", f"{job_id}-b", f"{job_id}-agent"]
    assert older.split()[1:] == ["failed", "over", f"{job_id}-a", "-"]


@pytest.mark.one_database
@pytest.mark.slow
def test_a_rehearsal_is_a_whole_run_through_the_shipped_sender(server: Server) -> None:
    job = server.job(rehearse(server))
    assert job["status"] == "running" and all(step["started_at"] for step in job["steps"])
    assert job["server_id"] and job["server_ip"] and job["tailscale_ip"]


@pytest.mark.one_database
@pytest.mark.parametrize(("place", "step"), [("provision", "creating"), ("configure", "configuring")])
@pytest.mark.slow
def test_a_rehearsal_fails_where_it_is_asked_to(server: Server, job_id: str, place: str, step: str) -> None:
    assert rehearse(server, "--fail-at", place, "--job-id", job_id) == job_id
    page = server.page(job_id)
    assert (page["status"], page["failed_step"]) == ("failed", place)
    assert [each["id"] for each in page["steps"] if each["state"] == "error"] == [step]


@pytest.mark.one_database
@pytest.mark.slow
def test_a_rehearsal_gives_its_tokens_to_no_proxy(server: Server) -> None:
    environ = server.environ
    server.environ = environ | {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"}
    try:
        assert rehearse(server)
    finally:
        server.environ = environ


def test_a_job_rehearsed_again_has_a_second_attempt(server: Server, job_id: str) -> None:
    rehearse(server, "--job-id", job_id, "--fail-at", "provision")
    rehearse(server, "--job-id", job_id)
    page = server.page(job_id)
    assert (page["attempt"], page["status"]) == (2, "running")


@pytest.mark.one_database
def test_a_rehearsal_without_a_server_says_so(server: Server) -> None:
    server.stop()
    done = server.flask("rehearse", "--pace", "0", check=False)
    server.start()
    assert done.returncode == 1
    assert server.url in done.stderr and "Traceback" not in done.stderr


def test_prune_deletes_what_was_not_heard_of_since(server: Server, job_id: str) -> None:
    server.report(job_id, "failed")
    assert server.flask("prune", "--older-than", "1").stdout == "0 jobs pruned\n"
    assert server.job(job_id)
    link = server.link(job_id)
    assert int(server.flask("prune", "--older-than", "0").stdout.split()[0]) > 0
    assert server.api(f"/api/jobs/{job_id}").status_code == 404
    assert requests.get(link, timeout=30).status_code == 404
    assert not server.report(job_id, "failed"), "its callbacks are gone too"


@pytest.mark.one_database
def test_sign_in_prints_a_link_that_signs_the_operator_in(server: Server) -> None:
    link = server.flask("sign-in").stdout.split()[-1]
    assert link.startswith(server.url)
    assert requests.get(link, timeout=30).ok
