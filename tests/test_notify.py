"""The operator is told, once, of what happens to jobs."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, time
from urllib.parse import urlsplit

import pytest
import requests
from sqlalchemy import create_engine, make_url, text

from tests.support.databases import execute
from tests.support.github import GitHub
from tests.support.operator import signed_in
from tests.support.server import Serve, Server, wait_until
from tests.support.webhook import Webhook, webhook

pytestmark = pytest.mark.slow


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as stand_in:
        yield stand_in


def lines(server: Server, event: str) -> list[dict[str, object]]:
    """The log's lines of an event."""
    read = (json.loads(line) for line in server.log.read_text().splitlines())
    return [line for line in read if line["event"] == event]


def settled(server: Server) -> bool:
    return "milepost_notifications_waiting 0.0" in server.api("/metrics").text


def test_a_failure_is_told_with_its_job_agent_step_reason_and_links(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    server = serve(NOTIFY_URLS=hook.url)
    server.create(job_id, dispatch=False)
    server.report(job_id, "failed", failed_step="configure", error="no <b>capacity</b>")
    [message] = wait_until(lambda: hook.told)
    assert message["title"] == f"Failed: agent-{job_id}"
    assert message["type"] == "failure"
    said = message["message"]
    for part in (job_id, f"agent-{job_id}", "Configuring Agent", "no <b>capacity</b>", server.link(job_id)):
        assert part in said
    assert f"{server.url}/jobs/{job_id}" in said
    wait_until(lambda: lines(server, "notified"))
    assert "a-secret-path" not in server.log.read_text()


def test_each_event_is_told_once_over_all_processes_and_restarts(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    server = serve(NOTIFY_URLS=hook.url, NOTIFY_ON="done failed cancelled lost", WEB_CONCURRENCY="2")
    other = serve(NOTIFY_URLS=hook.url, NOTIFY_ON="done failed", DATABASE_URL=server.database_url)
    told = {"done": "running", "failed": "failed", "cancelled": "failed"}
    for _ in range(3):
        for name, status in told.items():
            failed_step = {"failed_step": "cancelled"} if name == "cancelled" else {}
            for each in (server, other):
                each.report(f"{job_id}-{name}", status, workflow_run_id=1, **failed_step)
    wait_until(lambda: len(hook.told) >= 3)
    server.report(f"{job_id}-done", "failed", workflow_run_id=2)
    wait_until(lambda: len(hook.told) == 4 and settled(server))
    server.stop()
    server.start()
    server.report(f"{job_id}-failed", "failed", workflow_run_id=1)
    server.report(f"{job_id}-last", "failed")
    wait_until(lambda: hook.about(f"{job_id}-last") and settled(server))
    assert Counter(each["title"].partition(":")[0] for each in hook.told) == {
        "Done": 1,
        "Failed": 3,
        "Cancelled": 1,
    }


def test_only_what_was_asked_for_and_happens_after_the_start_is_told(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="1")
    server.report(f"{job_id}-before", "failed")
    server.report(f"{job_id}-lost-before", "vm_created")
    wait_until(lambda: lines(server, "lost"))
    server.stop()
    server = serve(NOTIFY_URLS=hook.url, DATABASE_URL=server.database_url, QUIET_AFTER="1", LOST_AFTER="1")
    server.report(f"{job_id}-done", "running")
    server.report(f"{job_id}-lost-before", "heartbeat", sent_at=round(time()))
    server.report(f"{job_id}-after", "failed")
    wait_until(lambda: hook.about(f"{job_id}-after"))
    wait_until(lambda: hook.about(f"{job_id}-lost-before"))
    assert hook.about(f"{job_id}-lost-before") == [f"Lost contact: {job_id}-lost-before"]  # again, after it
    assert not hook.about(f"{job_id}-before")
    assert not hook.about(f"{job_id}-done")


def test_a_lost_job_is_told_once_and_its_recovery_too(serve: Serve, hook: Webhook, job_id: str) -> None:
    server = serve(NOTIFY_URLS=hook.url, QUIET_AFTER="1", LOST_AFTER="2", WEB_CONCURRENCY="2")
    server.report(job_id, "vm_created")
    wait_until(lambda: hook.about(job_id) == [f"Lost contact: {job_id}"])
    server.report(job_id, "heartbeat")
    wait_until(lambda: hook.about(job_id)[1:] == [f"Heard of again: {job_id}"])
    wait_until(lambda: server.job(job_id)["condition"] == "lost")
    wait_until(lambda: len(lines(server, "lost")) == 2)
    server.report(job_id, "failed")
    wait_until(lambda: hook.about(job_id)[2:] == [f"Failed: {job_id}"])
    assert Counter(
        line["event"] for name in ("quiet", "lost", "recovered") for line in lines(server, name)
    ) == {
        "quiet": 2,
        "lost": 2,
        "recovered": 2,
    }


def test_after_the_clock_was_set_back_a_lost_job_is_told_too(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    server = serve(NOTIFY_URLS=hook.url, QUIET_AFTER="1", LOST_AFTER="2")
    server.report(job_id, "vm_created")
    wait_until(lambda: hook.about(job_id))
    execute(server.database_url, "UPDATE marks SET at = at + 3600")  # as if it had been an hour ahead
    server.report(f"{job_id}-2", "vm_created")
    wait_until(lambda: hook.about(f"{job_id}-2"))


def test_more_than_ten_at_once_are_one_message(serve: Serve, hook: Webhook, job_id: str) -> None:
    server = serve(NOTIFY_URLS=hook.url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: server.report(f"{job_id}-{n}", "failed"), range(40)))
    wait_until(lambda: settled(server))
    [message] = hook.told
    assert message["title"] == "40 jobs: 40 failed"
    assert f"{server.url}/jobs/{job_id}-" in message["message"]
    assert "and 10 more" in message["message"]


def test_what_could_not_be_told_is_kept_over_a_crash_and_told_later(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    hook.is_away = True
    server = serve(NOTIFY_URLS=hook.url)
    server.report(job_id, "failed")
    [line] = wait_until(lambda: lines(server, "not notified"))
    assert (line["job"], line["given_up"]) == (job_id, False)
    assert "milepost_notifications_waiting 1.0" in server.api("/metrics").text
    server.stop(signal.SIGKILL)
    hook.is_away = False
    server.start()
    wait_until(lambda: hook.about(job_id))
    wait_until(lambda: settled(server))
    assert len(hook.told) == 1


def test_a_service_that_hangs_is_in_no_callbacks_way(serve: Serve, hook: Webhook, job_id: str) -> None:
    hook.may_answer.clear()
    server = serve(NOTIFY_URLS=hook.url)
    server.report(job_id, "failed")
    for n in range(20):
        began = monotonic()
        server.report(f"{job_id}-{n}", "failed")
        assert monotonic() - began < 2


def test_a_service_that_was_told_is_not_told_again_for_one_that_is_away(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    with webhook() as other:
        other.is_away = True
        server = serve(NOTIFY_URLS=f"{hook.url} {other.url}")
        server.report(job_id, "failed")
        wait_until(lambda: other.refused)
        other.is_away = False
        wait_until(lambda: other.about(job_id))
        wait_until(lambda: settled(server))
        assert (len(hook.told), len(other.told)) == (1, 1)


@pytest.mark.one_database
def test_two_addresses_of_one_account_are_both_told_each_once(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    hook.refuses, host = "first", urlsplit(hook.url).netloc
    server = serve(NOTIFY_URLS=f"ntfy://{host}/first ntfy://{host}/second")
    server.report(job_id, "failed")
    wait_until(lambda: hook.refused and hook.told)
    hook.refuses = ""
    wait_until(lambda: settled(server))
    assert [each["topic"] for each in hook.told] == ["second", "first"]


@pytest.mark.one_database
def test_a_refused_dispatch_is_told_in_githubs_words_to_the_operator_alone(
    serve: Serve, at_github: GitHub, hook: Webhook, job_id: str
) -> None:
    words = "Required input 'size' not provided"
    at_github.refuse(422, words)
    server = serve(NOTIFY_URLS=hook.url, **at_github.settings)
    assert server.create(job_id).status_code == 502
    [message] = wait_until(lambda: hook.told)
    assert f"GitHub's answer: {server.job(job_id)['error']}" in message["message"]
    assert words in message["message"]
    page = requests.get(server.link(job_id), timeout=30).text
    for shown in (page, server.page(job_id)["error"]):
        assert "GitHub did not start the workflow. The operator can see the reason." in shown
        assert "Required input" not in shown


@pytest.mark.one_database
def test_the_terminal_sends_a_test_and_says_whether_it_worked(server: Server, hook: Webhook) -> None:
    environ = dict(server.environ)
    try:
        assert "NOTIFY_URLS is not set" in server.flask("notify-test", check=False).stderr
        server.environ["NOTIFY_URLS"] = hook.url
        assert server.flask("notify-test").returncode == 0
        assert [each["title"] for each in hook.told] == ["Test"]
        hook.is_away = True
        said = server.flask("notify-test", check=False)
        assert said.returncode == 1
        assert "503" in said.stdout
        assert "a-secret-path" not in said.stdout + said.stderr
    finally:
        server.environ = environ


@pytest.mark.one_database
def test_an_address_that_nobody_can_read_stops_the_start_without_a_secret(server: Server) -> None:
    environ = dict(server.environ)
    try:
        server.environ["NOTIFY_URLS"] = "json://127.0.0.1/ slack://a-secret"
        said = server.flask("jobs", check=False)
        assert said.returncode != 0
        assert "NOTIFY_URLS" in said.stderr
        assert "number 2" in said.stderr
        assert "a-secret" not in said.stdout + said.stderr
    finally:
        server.environ = environ


def test_after_an_hour_of_tries_it_is_given_up_logged_and_shown_on_the_job(
    serve: Serve, hook: Webhook, job_id: str
) -> None:
    hook.is_away = True
    server = serve(NOTIFY_URLS=hook.url)
    server.report(job_id, "failed")
    wait_until(lambda: lines(server, "not notified"))
    url = make_url(server.database_url)
    engine = create_engine(
        url if url.get_backend_name() == "sqlite" else url.set(drivername="postgresql+psycopg")
    )
    with engine.begin() as connection:
        connection.execute(text("UPDATE notifications SET tries = 8, due_at = 1"))  # as an hour later
    engine.dispose()
    [line] = wait_until(lambda: [each for each in lines(server, "not notified") if each["given_up"]])
    assert line["job"] == job_id
    assert settled(server)
    hook.is_away = False
    page = signed_in(server).see(f"/jobs/{job_id}")
    assert "<b>given up</b>" in page
    assert "503" in page
    assert hook.told == []
