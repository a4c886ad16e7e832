"""Trying a job again: a new attempt of the same job, once, and the old ones stay readable."""

import re
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import pytest

from tests.support.github import GitHub
from tests.support.operator import signed_in
from tests.support.server import Serve, Server, wait_until


def run_of(at_github: GitHub) -> int:
    return int(at_github.runs[-1]["id"])


@pytest.mark.parametrize("failed_step", ["provision", "cancelled", "timed_out"])
def test_a_failed_or_cancelled_job_is_tried_again_as_a_new_attempt(
    dispatcher: Server, at_github: GitHub, job_id: str, failed_step: str
) -> None:
    dispatcher.create(job_id, region="eu")
    first = run_of(at_github)
    dispatcher.report(job_id, "failed", failed_step=failed_step, workflow_run_id=first)
    answer = dispatcher.retry(job_id)
    job = answer.json()
    assert (answer.status_code, job["attempt"], job["status"]) == (200, 2, "queued")
    assert (job["agent_id"], job["region"], job["error"]) == (f"agent-{job_id}", "eu", None)
    assert at_github.dispatched(job_id) == 2
    assert at_github.inputs[-1] == at_github.inputs[-2]
    dispatcher.report(job_id, "ansible_complete", workflow_run_id=first)
    assert dispatcher.job(job_id)["status"] == "queued"
    dispatcher.report(job_id, "vm_created", workflow_run_id=run_of(at_github))
    job = dispatcher.job(job_id)
    assert (job["attempt"], job["status"]) == (2, "provisioning")


def test_a_lost_job_is_tried_again_and_its_old_run_is_heard_no_more(
    serve: Serve, at_github: GitHub, job_id: str
) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="2", **at_github.settings)
    server.create(job_id)
    first = run_of(at_github)
    at_github.runs.clear()  # a run that GitHub knows is not silent
    server.report(job_id, "vm_created", workflow_run_id=first)
    assert server.retry(job_id).status_code == 409
    wait_until(lambda: server.job(job_id)["condition"] == "lost")
    assert server.retry(job_id).json()["attempt"] == 2
    server.report(job_id, "running", workflow_run_id=first)
    assert server.job(job_id)["status"] == "queued"


def test_only_what_failed_or_is_lost_can_be_tried_again(dispatcher: Server, job_id: str) -> None:
    dispatcher.create(job_id)
    assert "queued" in dispatcher.retry(job_id).json()["error"]
    dispatcher.report(job_id, "provisioning")
    assert dispatcher.retry(job_id).status_code == 409
    dispatcher.report(job_id, "running")
    answer = dispatcher.retry(job_id)
    assert answer.status_code == 409
    assert "running" in answer.json()["error"]
    assert dispatcher.job(job_id)["attempt"] == 1
    assert "Retry" not in signed_in(dispatcher).see(f"/jobs/{job_id}")
    assert dispatcher.retry("nobody").status_code == 404


def test_two_who_try_again_at_the_same_time_make_one_attempt(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    dispatcher.create(job_id)
    dispatcher.report(job_id, "failed")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: dispatcher.retry(job_id).status_code, range(8)))
    assert sorted(answers) == [200] + [409] * 7
    assert at_github.dispatched(job_id) == 2
    assert dispatcher.job(job_id)["attempt"] == 2


def test_an_agent_that_another_job_is_for_is_not_provisioned_twice(dispatcher: Server, job_id: str) -> None:
    agent = f"agent-{job_id}"
    dispatcher.create(job_id)
    dispatcher.report(job_id, "failed")
    dispatcher.create(f"{job_id}-2", agent_id=agent)
    answer = dispatcher.retry(job_id)
    assert answer.status_code == 409
    assert f"{job_id}-2" in answer.json()["error"]


@pytest.mark.one_database
def test_what_github_refuses_is_kept_and_can_be_tried_again(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    dispatcher.create(job_id)
    dispatcher.report(job_id, "failed")
    at_github.refuse(401, "Bad credentials")
    answer = dispatcher.retry(job_id)
    assert (answer.status_code, answer.json()["attempt"], answer.json()["status"]) == (502, 2, "failed")
    assert "DISPATCH_TOKEN" in answer.json()["error"]
    assert dispatcher.states(job_id)[0] == "error"
    assert dispatcher.retry(job_id).json()["attempt"] == 3


def test_a_job_that_callbacks_registered_cannot_be_tried_again(dispatcher: Server, job_id: str) -> None:
    dispatcher.report(job_id, "failed")
    answer = dispatcher.retry(job_id)
    assert answer.status_code == 409
    assert "agent" in answer.json()["error"]
    assert "Retry" not in signed_in(dispatcher).see(f"/jobs/{job_id}")


@pytest.mark.one_database
def test_without_dispatch_settings_nothing_is_tried(server: Server, job_id: str) -> None:
    server.create(job_id, dispatch=False)
    server.report(job_id, "failed")
    answer = server.retry(job_id)
    assert answer.status_code == 409
    assert "DISPATCH_TOKEN" in answer.json()["error"]
    assert server.job(job_id)["attempt"] == 1


def test_the_old_attempts_stay_readable_with_their_own_times_and_errors(
    dispatcher: Server, at_github: GitHub, job_id: str
) -> None:
    operator = signed_in(dispatcher)
    dispatcher.create(job_id)
    first = run_of(at_github)
    dispatcher.report(job_id, "vm_created", workflow_run_id=first)
    dispatcher.report(job_id, "failed", error="the first error", workflow_run_id=first)
    assert operator.submit(f"/jobs/{job_id}/retry", f"/jobs/{job_id}").status_code == 303
    dispatcher.report(job_id, "failed", error="the second error", workflow_run_id=run_of(at_github))
    page = unescape(operator.see(f"/jobs/{job_id}"))
    newer, older = re.findall(r"<section data-attempt-number.*?</section>", page, re.DOTALL)
    assert "the second error" in page.partition("<section data-attempt-number")[0]
    assert "the second error" not in older and "the first error" in older
    assert str(run_of(at_github)) in newer and str(first) in older
    assert older.count("<time") > newer.count("<time")


@pytest.mark.one_database
def test_the_button_tells_what_stands_in_the_way(dispatcher: Server, job_id: str) -> None:
    operator = signed_in(dispatcher)
    dispatcher.create(job_id)
    answer = operator.submit(f"/jobs/{job_id}/retry", f"/jobs/{job_id}")
    assert answer.status_code == 409
    assert "only a failed or lost one can be retried" in answer.text
