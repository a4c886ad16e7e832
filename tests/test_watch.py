"""The watcher's door over HTTP: JSON, fragment and stream."""

import re
from contextlib import closing

import pytest
import requests

from tests.support.events import Events
from tests.support.server import Serve, Server, new_job_id


def token_of(link: str) -> str:
    return link.rsplit("/", 1)[1]


@pytest.mark.one_database
def test_a_wrong_token_is_a_404_like_any_other(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    nowhere = requests.get(f"{server.url}/p/nothing", timeout=30)
    other = "B" if link[-1] != "B" else "C"
    for wrong in (link[:-1] + other, link + "=", link[:-1], link.replace(job_id, f"{job_id}x")):
        for path in ("", "/steps", "/events"):
            answer = requests.get(wrong + path, timeout=30)
            assert (answer.status_code, answer.text) == (404, nowhere.text)


def test_the_fragment_is_sent_unless_its_version_is_still_current(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    first = requests.get(f"{link}/steps", timeout=30)
    version = re.search(r'data-version="([^"]+)"', first.text)
    assert version
    assert version[1] == server.page(job_id)["version"]
    unchanged = requests.get(f"{link}/steps", params={"after": version[1]}, timeout=30)
    assert (unchanged.status_code, unchanged.content) == (204, b"")
    server.report(job_id, "vm_created")
    assert requests.get(f"{link}/steps", params={"after": version[1]}, timeout=30).status_code == 200


def test_the_stream_sends_each_change_and_ends_with_the_job(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    stream = server.events(job_id, timeout=10)  # unwoken, it would compare what it shows after 20 s
    first = stream.next()
    assert first["event"] == "steps"
    assert 'data-step="creating" data-state="active"' in first["data"]
    server.report(job_id, "vm_created")
    second = stream.next()
    assert 'data-step="installing" data-state="active"' in second["data"]
    assert second["id"] != first["id"]
    server.report(job_id, "running")
    last, done = stream.next(), stream.next()
    assert 'data-status="running"' in last["data"]
    assert done["event"] == "done"
    assert list(stream) == []


@pytest.mark.one_database
def test_no_page_keeps_or_leaks_the_token(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    for path in ("", "/steps", "/events"):
        with requests.get(link + path, stream=True, timeout=30) as answer:
            headers = answer.headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert not re.search(r"\d", headers["Server"])
        assert "Set-Cookie" not in headers
    assert token_of(link) not in server.log.read_text()


@pytest.mark.one_database
def test_what_was_reported_is_text_and_never_markup(server: Server, job_id: str) -> None:
    hostile = "<script>alert(1)</script>"
    server.report(job_id, "failed", error=hostile, subject=hostile)
    link = server.link(job_id)
    for path in ("", "/steps", "/events"):
        shown = requests.get(link + path, timeout=30).text
        assert hostile not in shown
        assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 0


@pytest.mark.one_database
def test_the_version_is_another_for_whatever_else_is_shown(server: Server, job_id: str) -> None:
    server.report(job_id, "vm_created")
    versions = [server.page(job_id)["version"]]
    for note in ("5 of 8", "6 of 8"):
        server.report(job_id, "heartbeat", note=note)
        versions.append(server.page(job_id)["version"])
    server.report(job_id, "heartbeat")
    assert server.page(job_id)["version"] == versions[-1], "a sign of life alone is the same version"
    assert len(set(versions)) == 3


def test_the_first_sign_of_life_takes_back_that_there_was_none(server: Server, job_id: str) -> None:
    server.create(job_id, dispatch=False)
    never_heard = server.page(job_id)["version"]
    with closing(server.events(job_id)) as events:
        assert 'id="unheard"' in events.next()["data"]
        server.report(job_id, "heartbeat")
        shown = events.next()
        assert shown["event"] == "steps" and 'id="unheard"' not in shown["data"]
    asked = requests.get(f"{server.link(job_id)}/steps", params={"after": never_heard}, timeout=30)
    assert asked.status_code == 200 and shown["id"] == server.page(job_id)["version"] != never_heard
    server.report(job_id, "heartbeat")
    assert server.page(job_id)["version"] == shown["id"], "a sign of life alone is the same version"


def test_the_version_tells_of_contact_and_bounds_only_where_they_are_shown(
    server: Server, serve: Serve
) -> None:
    """A page that was open over a restart comes back with the version that it shows."""
    live, failed, unheard = new_job_id(), new_job_id(), new_job_id()
    server.report(live, "provisioning")
    server.report(failed, "failed")
    server.create(unheard, dispatch=False)
    jobs = {live: "live", failed: "failed", unheard: "unheard"}
    before = {job_id: server.page(job_id)["version"] for job_id in jobs}
    for changed, shown in (
        ({}, set()),
        ({"OPERATOR_CONTACT": "ops@example.com"}, {"failed", "unheard"}),
        ({"QUIET_AFTER": "149"}, {"unheard"}),
        ({"LOST_AFTER": "901"}, set()),
    ):
        other = serve(DATABASE_URL=server.database_url, **changed)
        after = {job_id: other.page(job_id)["version"] for job_id in jobs}
        assert {kind for job_id, kind in jobs.items() if after[job_id] != before[job_id]} == shown, changed
        other.stop()


def test_a_stream_that_comes_back_is_not_sent_again_what_it_has(server: Server, job_id: str) -> None:
    def kind(events: Events) -> str:
        return next(each["event"] for each in events if "event" in each)

    server.report(job_id, "provisioning")
    with closing(server.events(job_id)) as events:
        version = events.next()["id"]
    with closing(server.events(job_id, seen=version)) as events, closing(server.events(job_id)) as fresh:
        assert (kind(events), fresh.next()["id"]) == ("alive", version)
        with closing(server.events(job_id, seen=version)) as another:
            assert kind(another) == "alive"
        server.report(job_id, "vm_created")
        assert events.next()["id"] == fresh.next()["id"] != version
    with closing(server.events(job_id, seen=version)) as events:
        assert kind(events) == "steps"
    server.report(job_id, "failed")
    version = server.page(job_id)["version"]
    with closing(server.events(job_id, seen=version)) as events:
        assert [events.next()["event"] for _ in range(2)] == ["steps", "done"]
