"""The operator's door as a person uses it: signing in, the list, one job."""

import re
from html import unescape
from pathlib import Path
from time import time
from typing import Literal

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.support.github import GitHub
from tests.support.operator import Operator, signed_in
from tests.support.server import OPERATOR_TOKEN, Serve, Server, wait_until

SITE = """
[[steps]]
id = "queued"
label = "Queued"
[[steps]]
id = "building"
label = "Building"
"""
FORMS = ("/", "/sign-out", "/jobs/{}/retry", "/jobs/{}/revoke")


def jobs_in(page: str) -> list[str]:
    return re.findall(r'data-job="([^"]+)"', page)


# Forms


@pytest.mark.one_database
@pytest.mark.parametrize("path", FORMS)
def test_a_forged_form_does_nothing(
    operator: Operator, office: Server, at_github: GitHub, job_id: str, path: str
) -> None:
    office.report(job_id, "failed")
    link = office.link(job_id)
    other = signed_in(office)
    theirs = re.findall(r'name="csrf" value="([^"]+)"', other.see())[0]
    forged: list[dict[str, str]] = [{}, {"csrf": ""}, {"csrf": theirs}, {"csrf": "\udc80é"}]
    for fields in forged:
        form = {"agent_id": f"agent-{job_id}", "job_id": f"{job_id}-2", "dispatch": "on", **fields}
        data = {name: value.encode(errors="surrogateescape") for name, value in form.items()}
        answer = operator.post(office.url + path.format(job_id), data=data, timeout=30, allow_redirects=False)
        assert answer.status_code == 400
    assert operator.ask().status_code == 200
    assert office.link(job_id) == link
    assert office.api(f"/api/jobs/{job_id}-2").status_code == 404
    assert at_github.dispatched(f"{job_id}-2") == 0
    assert (
        Operator(office).post(f"{office.url}/sign-in", data={"token": OPERATOR_TOKEN}, timeout=30).status_code
        == 400
    )


# The list


@pytest.mark.one_database
def test_an_empty_list_says_how_to_start(serve: Serve) -> None:
    server = serve()
    page = signed_in(server).see()
    assert "No jobs yet" in page
    assert f"{server.url}/api/webhooks/github" in page
    assert "set DISPATCH_TOKEN and DISPATCH_REPOSITORY" in page


def test_the_list_is_newest_first_and_paged_by_key(operator: Operator, office: Server, job_id: str) -> None:
    ids = [f"{job_id}-{n:02}" for n in range(52)]
    for id in ids:
        office.report(id, "provisioning")
    first = operator.see(f"/?q={job_id}")
    assert jobs_in(first) == ids[:1:-1]
    office.report(f"{job_id}-new", "provisioning")  # moves no page
    older = re.search(r'rel="next" href="([^"]+)"', first)
    assert older
    last = operator.see(unescape(older[1]))
    assert jobs_in(last) == [ids[1], ids[0]]
    assert 'rel="next"' not in last
    assert operator.ask("/?before=nonsense").status_code == 400


def test_jobs_are_found_by_status_by_condition_and_by_the_start_of_an_id(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="2")
    for n, milestone in enumerate(("vm_created", "running", "failed")):
        server.report(f"{job_id}-{n}", milestone)
    job = {"agent_id": f"agent-{job_id}", "job_id": "x" + job_id, "dispatch": False}
    assert server.api("/api/jobs", json=job).status_code == 201
    operator = signed_in(server)

    def found(query: str) -> list[str]:
        return jobs_in(operator.see(f"/?{query}"))

    wait_until(lambda: found("condition=quiet") == [f"{job_id}-0"])
    wait_until(lambda: found("condition=lost") == [f"{job_id}-0"])
    assert found("condition=quiet") == []
    assert found("condition=live") == found("status=queued") == [f"x{job_id}"]
    assert found("condition=over") == [f"{job_id}-2", f"{job_id}-1"]
    assert found("status=running") == found("status=running&condition=over") == [f"{job_id}-1"]
    assert found("status=failed&condition=live") == []
    assert found(f"q=agent-{job_id}") == found(f"q=x{job_id}") == [f"x{job_id}"]
    assert found(f"q={job_id[:-1]}") == [f"{job_id}-{n}" for n in (2, 1, 0)]
    page = operator.see()
    counts = dict(re.findall(r'data-count="(\w+)"><a[^>]*>(\S+)', page))
    assert counts == {"live": "1", "waiting": "0", "quiet": "0", "lost": "1", "failed": "1", "running": "1"}
    server.report(f"{job_id}-run", "running", workflow_run_id=40_000_000_001)
    assert found("q=40000000001") == found("q=040000000001") == [f"{job_id}-run"]
    assert found("q=4000000000") == []


@pytest.mark.one_database
def test_a_search_for_what_no_id_can_be_says_so(operator: Operator) -> None:
    for search in ("%25", "%00", "a b", "x" * 65, "<script>"):
        page = operator.see(f"/?q={search}")
        assert "q-problem" in page
        assert "<script>" not in page


@pytest.mark.slow
def test_the_list_hears_of_every_change_at_once(serve: Serve, job_id: str) -> None:
    """Whichever of two processes took the callback and whichever holds the stream."""
    server = serve(WEB_CONCURRENCY="2")
    streams = [signed_in(server).listen() for _ in range(4)]
    seen = [stream.next() for stream in streams]
    for n in range(5):
        server.report(f"{job_id}-{n}", "provisioning")
        now = [stream.next() for stream in streams]
        assert {event["event"] for event in now} == {"jobs"}
        assert all(after["id"] != before["id"] for before, after in zip(seen, now, strict=True))
        seen = now
    for stream in streams:
        stream.close()


# Starting


def test_a_job_is_started_from_the_form(operator: Operator, at_github: GitHub, job_id: str) -> None:
    fields = {"agent_id": f" agent-{job_id} ", "region": "eu", "job_id": job_id, "dispatch": "on"}
    answer = operator.submit("/", **fields)
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/jobs/{job_id}")
    assert operator.submit("/", **fields).headers["Location"] == f"/jobs/{job_id}"
    assert at_github.dispatched(job_id) == 1
    page = operator.see(f"/jobs/{job_id}")
    assert f"agent-{job_id}" in page
    assert str(at_github.runs[-1]["html_url"]) in page or str(at_github.runs[-1]["id"]) in page


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("field", "value"),
    [("agent_id", ""), ("agent_id", "a b"), ("region", "x" * 65), ("job_id", "../x"), ("job_id", '"><b>')],
)
def test_a_bad_field_is_told_beside_it_and_what_was_typed_is_kept(
    operator: Operator, job_id: str, field: str, value: str
) -> None:
    answer = operator.submit("/", **{"agent_id": f"agent-{job_id}", "region": "eu-kept", field: value})
    assert answer.status_code == 400
    assert f'id="{field}-problem"' in answer.text
    assert answer.text.count("-problem" + '" role="alert"') == 1
    assert field == "region" or 'value="eu-kept"' in answer.text
    assert unescape(re.findall(rf'name="{field}" value="([^"]*)"', answer.text)[0]) == value
    assert '"><b>' not in answer.text


def test_a_job_that_is_in_the_way_and_a_missing_setting_are_told_in_words(
    operator: Operator, serve: Serve, job_id: str
) -> None:
    agent = f"agent-{job_id}"
    operator.submit("/", agent_id=agent, job_id=job_id)
    answer = operator.submit("/", agent_id=agent)
    assert answer.status_code == 409
    assert f"the job {job_id} of the agent {agent} is not over yet" in answer.text
    answer = signed_in(serve()).submit("/", agent_id=agent, dispatch="on")
    assert answer.status_code == 409
    assert "set DISPATCH_TOKEN and DISPATCH_REPOSITORY" in answer.text


@pytest.mark.one_database
def test_what_github_refuses_is_told_by_the_job(operator: Operator, at_github: GitHub, job_id: str) -> None:
    at_github.refuse(401, "Bad credentials")
    answer = operator.submit("/", agent_id=f"agent-{job_id}", job_id=job_id, dispatch="on")
    page = operator.see(answer.headers["Location"])
    assert 'data-status="failed"' in page
    assert "GitHub does not know DISPATCH_TOKEN" in page


# One job


def test_a_job_shows_its_milestones_then_heartbeats_attempts_and_addresses(
    operator: Operator, office: Server, job_id: str
) -> None:
    def say(milestone: str, run: int, **fields: object) -> None:
        office.report(job_id, milestone, workflow_run_id=run, **fields)

    say("provisioning", 1, sent_at=round(time()) - 100)
    say("failed", 1, failed_step="provision", error="no <b>capacity</b>")
    say("vm_created", 2)
    say("heartbeat", 2)
    end = {"server_id": 4711, "server_ip": "192.0.2.7", "tailscale_ip": "100.64.0.7"}
    say("running", 2, **end)
    page = operator.see(f"/jobs/{job_id}")
    assert re.findall(r'data-callback="(\w+)"', page) == [
        "running",
        "vm_created",
        "failed",
        "provisioning",
        "heartbeat",
    ]
    assert "1 heartbeat, the last" in page
    assert "&#34;tailscale_ip&#34;: &#34;100.64.0.7&#34;" in page  # the body, as it came
    assert len(re.findall(r"<time", re.findall(r'data-callback="provisioning">.*', page)[0])) == 2
    assert len(re.findall(r"<time", re.findall(r'data-callback="running">.*', page)[0])) == 1
    assert re.findall(r'data-attempt-number="(\d)"', page) == ["2", "1"]
    assert "no &lt;b&gt;capacity&lt;/b&gt;" in page and "<b>capacity" not in page
    assert all(str(value) in page for value in end.values())
    assert office.link(job_id) in page


def test_a_milestone_that_the_pipeline_does_not_have_is_marked(
    operator: Operator, office: Server, job_id: str
) -> None:
    for milestone in ("provisioning", "vm_craeted", "running", "failed"):
        office.report(job_id, milestone)
    page = operator.see(f"/jobs/{job_id}")
    assert re.findall(r'data-callback="(\w+)">.*moves nothing', page) == ["vm_craeted"]


def test_of_very_many_callbacks_the_newest_are_shown(operator: Operator, office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning")
    assert "Only the newest" not in operator.see(f"/jobs/{job_id}")
    for _ in range(51):
        office.report(job_id, "heartbeat")
    page = operator.see(f"/jobs/{job_id}")
    assert re.findall(r'data-callback="(\w+)"', page) == ["provisioning", *["heartbeat"] * 50]
    assert "Only the newest 50" in page


def test_two_ends_that_contradict_each_other_are_told(
    operator: Operator, office: Server, job_id: str
) -> None:
    office.report(job_id, "running")
    assert "contradict" not in operator.see(f"/jobs/{job_id}")
    office.report(job_id, "failed")
    assert "contradict" in operator.see(f"/jobs/{job_id}")
    assert "contradict" not in requests.get(office.link(job_id), timeout=30).text


def buttons(page: str) -> list[str]:
    """What a job's page offers to do."""
    return re.findall(r'<details class="act" id="(\w+)"', page)


def test_a_job_offers_what_can_be_done_to_it_and_does_it(
    operator: Operator, office: Server, serve: Serve, job_id: str
) -> None:
    operator.submit("/", agent_id=f"agent-{job_id}", job_id=job_id)
    path = f"/jobs/{job_id}"
    assert buttons(operator.see(path)) == ["close", "revoke"]  # it never started
    office.report(job_id, "vm_created")
    assert buttons(operator.see(path)) == ["revoke"]
    assert operator.submit(f"{path}/close", path).status_code == 409
    office.report(job_id, "failed")
    assert buttons(operator.see(path)) == ["retry", "delete", "revoke"]
    office.report(f"{job_id}-2", "failed")  # nobody said which agent it is for
    assert buttons(operator.see(f"/jobs/{job_id}-2")) == ["delete", "revoke"]
    poor = serve()
    poor.create(job_id, dispatch=False)
    poor.report(job_id, "failed")
    assert buttons(signed_in(poor).see(path)) == ["delete", "revoke"]
    assert operator.submit(f"{path}/delete", path).headers["Location"] == "/"
    assert operator.ask(path).status_code == 404


def test_a_job_that_never_started_is_closed_and_reads_cancelled(operator: Operator, job_id: str) -> None:
    operator.submit("/", agent_id=f"agent-{job_id}", job_id=job_id)
    assert operator.submit(f"/jobs/{job_id}/close", f"/jobs/{job_id}").status_code == 303
    assert "Cancelled" in operator.see(f"/jobs/{job_id}")
    [row] = re.findall(r"(?s)<tr data-job.*?</tr>", operator.see(f"/?q={job_id}"))
    assert "<b>Cancelled</b>" in row


def test_the_list_says_how_each_job_stands_in_words_and_segments(
    serve: Serve, job_id: str, tmp_path: Path
) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    server = serve(PIPELINES=str(tmp_path))
    server.report(f"{job_id}-1", "ansible_started")
    server.report(f"{job_id}-1", "failed", failed_step="configure", error="no space\nleft", workflow_run_id=7)
    server.report(f"{job_id}-2", "running")
    server.report(f"{job_id}-3", "failed", failed_step="timed_out")
    server.report(f"{job_id}-4", "building", pipeline="site", note="5 of 8")
    page = signed_in(server).see("/")
    rows = [
        (
            re.findall(r"<b>(.*?)</b> <small>(.*?)</small>", row)[0],
            re.findall(r'<i data-state="(\w+)"', row),
            re.findall(r'role="img" aria-label="(.*?)"', row)[0],
        )
        for row in re.findall(r"(?s)<tr data-job.*?</tr>", page)
    ]
    assert rows == [
        (("Under way", "5 of 8"), ["completed", "active"], "1 of 2 steps done; Building: in progress"),
        (
            ("Timed out", "Creating Server"),
            ["completed", "cancelled", "pending", "pending", "pending"],
            "1 of 5 steps done; Creating Server: timed out",
        ),
        (("Succeeded", ""), ["completed"] * 5, "5 of 5 steps done"),
        (
            ("Failed", "no space"),
            ["completed"] * 3 + ["error", "pending"],
            "3 of 5 steps done; Configuring Agent: failed",
        ),
    ]
    assert '<select name="pipeline">' in page
    assert '<select id="pipeline" name="pipeline">' in page


def test_pipelines_are_chosen_from_only_where_there_are_several(operator: Operator) -> None:
    assert 'name="pipeline"' not in operator.see("/")


def test_refused_callbacks_are_shown_with_the_last_cause(serve: Serve) -> None:
    server = serve()
    operator = signed_in(server)
    assert "refused" not in operator.see("/")
    server.post(b"{}", key="another key than the right one")
    server.post(b'{"job_id": "<b>", "status": "running"}')
    page = operator.see("/")
    assert "2 callbacks refused in the last day, the last one with 400: job_id" in page


def test_notifications_that_wait_are_told_by_the_job(serve: Serve, job_id: str) -> None:
    server = serve(NOTIFY_URLS="json://127.0.0.1:9/")
    server.report(job_id, "failed")
    operator = signed_in(server)
    page = wait_until(lambda: "tried again" in (page := operator.see(f"/jobs/{job_id}")) and page)
    assert 'data-notification="failed"' in page
    assert "Connection error" in page


def test_an_unknown_job_is_a_404(operator: Operator) -> None:
    csrf = re.findall(r'name="csrf" value="([^"]+)"', operator.see())[0]
    for id in ("nobody", "%00", "a b", "x" * 65, ".x"):
        answer = operator.ask(f"/jobs/{id}")
        assert answer.status_code == 404
        assert '<a href="/">All jobs</a>' in answer.text
        for verb in ("retry", "revoke"):
            url = f"{operator.server.url}/jobs/{id}/{verb}"
            assert operator.post(url, data={"csrf": csrf}, timeout=30).status_code == 404


def test_a_link_that_is_no_longer_shared_is_dead_and_its_streams_end(
    operator: Operator, office: Server, job_id: str
) -> None:
    office.report(job_id, "provisioning")
    old, stream = office.link(job_id), office.events(job_id)
    stream.next()
    office.report(job_id, "vm_created")  # after this frame nothing of the stream's beginning is due
    assert 'data-step="installing" data-state="active"' in stream.next()["data"]
    assert operator.submit(f"/jobs/{job_id}/revoke", f"/jobs/{job_id}").status_code == 303
    assert next(iter(stream), None) is None
    for path in ("", "/steps", "/events"):
        assert requests.get(old + path, timeout=30).status_code == 404
    new = office.link(job_id)
    assert new != old
    assert new in operator.see(f"/jobs/{job_id}")
    assert office.flask("link", job_id).stdout.strip() == new
    office.report(job_id, "ansible_started")
    assert office.states(job_id)[3] == "active"


@pytest.mark.one_database
def test_no_page_of_the_operator_is_kept_or_leaked(operator: Operator, office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning")
    for path in ("/", f"/jobs/{job_id}", "/sign-in", "/jobs/nobody"):
        headers = operator.ask(path).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "unsafe" not in headers["Content-Security-Policy"]


# In a browser


@pytest.mark.one_database
def test_a_person_starts_a_job_sees_it_move_and_stops_sharing_it(
    browser: Browser, office: Server, at_github: GitHub, job_id: str
) -> None:
    page = browser.new_page()
    troubles: list[str] = []
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(office.flask("sign-in").stdout.strip())
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("Start a job").click()
    page.get_by_label("Agent", exact=True).fill(f"agent-{job_id}")
    page.get_by_label("Job id").fill(job_id)
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#job")).to_have_attribute("data-status", "queued")
    office.report(job_id, "failed", failed_step="provision", workflow_run_id=at_github.runs[-1]["id"])
    expect(page.locator("#job")).to_have_attribute("data-status", "failed")
    page.locator("#retry > summary").click()
    page.locator("#retry button").click()
    expect(page.locator("#job")).to_have_attribute("data-attempt", "2")
    assert at_github.dispatched(job_id) == 2

    link = page.get_by_label("Link to share")
    old = link.input_value()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    office.report(job_id, "heartbeat", workflow_run_id=at_github.runs[-1]["id"], note="halfway")
    expect(page.get_by_text("halfway").first).to_be_attached()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    page.locator("#revoke > summary").click()
    page.locator("#revoke button").click()
    expect(link).not_to_have_value(old)

    page.goto(f"{office.url}/?q={job_id}")
    page.evaluate("window.same = true")
    row = page.locator(f'[data-job="{job_id}"]')
    expect(row).to_have_attribute("data-status", "queued")
    office.report(job_id, "vm_created", workflow_run_id=at_github.runs[-1]["id"])
    expect(row).to_have_attribute("data-status", "provisioning")
    office.report(f"{job_id}-2", "running")
    expect(page.locator("[data-job]").first).to_have_attribute("data-job", f"{job_id}-2")
    assert page.evaluate("window.same")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Operator token")).to_be_visible()
    assert set(troubles) <= {"[object Event]"}  # a stream that its page has left
    page.close()


@pytest.mark.one_database
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (768, "light"), (360, "dark")])
def test_the_pages_can_be_read_and_used_by_everyone(
    browser: Browser, office: Server, job_id: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    job = {"agent_id": f"agent-{job_id}", "job_id": job_id, "region": "eu"}
    office.api("/api/jobs", json=job)
    office.report(job_id, "running")
    office.report(job_id, "failed", error="x" * 300)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)

    def look() -> None:
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.goto(office.url)
    look()
    page.goto(office.flask("sign-in").stdout.strip())
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("Start a job").click()
    page.get_by_label("Agent", exact=True).fill("a b")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_be_visible()
    look()
    page.goto(f"{office.url}/jobs/{job_id}")
    look()
    page.goto(office.url)
    look()
    assert max(page.locator("[data-job]").evaluate_all("all => all.map(each => each.offsetHeight)")) < 130
    page.close()


@pytest.mark.one_database
def test_pages_leave_connections_so_that_a_seventh_and_eighth_load(
    browser: Browser, serve: Serve, job_id: str
) -> None:
    server = serve()
    server.report(job_id, "vm_created")
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.flask("sign-in").stdout.strip())
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("[data-job]")).to_have_count(1)

    def streams() -> float:
        told = re.findall(r"^milepost_streams{.*} (\S+)$", server.api("/metrics").text, re.M)
        return float(told[0])

    wait_until(lambda: streams() == 1)
    hide = "Object.defineProperty(document, 'hidden', {get: () => %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(hide % "true" + tell)
    wait_until(lambda: streams() == 0)
    server.report(job_id, "failed")
    page.evaluate(hide % "false" + tell)
    expect(page.locator("[data-job]")).to_have_attribute("data-status", "failed")
    wait_until(lambda: streams() == 1)
    for _ in range(7):  # beside each other, in windows of their own
        another = context.new_page()
        another.goto(server.url)
        expect(another.locator("[data-job]")).to_have_count(1)
    assert streams() < 6
    context.close()


@pytest.mark.one_database
def test_a_list_that_is_offline_says_since_when_and_comes_back(
    browser: Browser, serve: Serve, job_id: str
) -> None:
    server = serve()
    server.report(job_id, "vm_created")
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.flask("sign-in").stdout.strip())
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("[data-job]")).to_have_count(1)
    page.wait_for_load_state()
    expect(page.locator("#away")).to_be_hidden()
    context.set_offline(True)
    expect(page.locator("#away")).to_be_visible()
    server.report(job_id, "failed")
    context.set_offline(False)
    expect(page.locator("#away")).to_be_hidden()
    expect(page.locator("[data-job]")).to_have_attribute("data-status", "failed")
    context.close()
