"""The progress page as it is sent: what it weighs, how it is framed, and that its HTML is sound."""

import gzip
import re
import time
from collections import Counter
from contextlib import closing

import html5lib
import pytest
import requests
from werkzeug.test import Client

from tests.support.gallery import STATES, create_app
from tests.support.server import Serve, Server, new_job_id, wait_until

pytestmark = pytest.mark.one_database

RUN = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
STEP_TAKES = 10  # seconds


@pytest.fixture(scope="module")
def gallery() -> Client:
    return create_app().test_client()


@pytest.mark.parametrize("state", STATES)
def test_the_html_of_every_state_is_valid_and_says_nothing_inline(gallery: Client, state: str) -> None:
    page = gallery.get(f"/p/{state}").text
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    ids = Counter(element.get("id") for element in document.iter() if element.get("id"))
    assert max(ids.values()) == 1
    for element in document.iter():
        assert "style" not in element.attrib and not any(name.startswith("on") for name in element.attrib)
        for target in (element.get("aria-labelledby") or "").split():
            assert target in ids
    states = re.findall(r'<li data-step="(\w+)" data-state="(\w+)"', page)
    assert 2 <= len(states) <= 12
    assert len(re.findall('aria-current="step"', page)) <= 1


@pytest.mark.parametrize("state", [state for state in STATES if not state.startswith("largest")])
def test_the_fragment_of_every_state_weighs_at_most_2_kb(gallery: Client, state: str) -> None:
    page = gallery.get(f"/p/{state}").text
    fragment = page[page.index('<section id="steps"') : page.index("</section>")]
    assert len(gzip.compress(fragment.encode(), 6)) <= 2048


def test_the_first_view_is_at_most_30_kb_and_none_of_it_from_elsewhere(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    page = requests.get(server.link(job_id), timeout=30)
    paths = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
    assert len(paths) == 4
    answers = [page, *(requests.get(server.url + path, timeout=30) for path in paths)]
    sizes = {answer.request.path_url: int(answer.headers["Content-Length"]) for answer in answers}
    assert sum(sizes.values()) <= 30_000
    own = [size for path, size in sizes.items() if path.endswith(".js") and "htmx" not in path]
    assert len(own) == 2 and sum(own) <= 6 * 1024
    assert all(answer.headers["Content-Encoding"] == "gzip" for answer in answers)
    assert all("max-age=31536000" in answer.headers["Cache-Control"] for answer in answers[1:])
    assert "://" not in re.sub(r"xmlns='[^']+'", "", page.text)


def fragment(server: Server, job_id: str) -> str:
    return requests.get(f"{server.link(job_id)}/steps", timeout=30).text


def bar(server: Server, job_id: str) -> float:
    """How far the progress bar has come, of 100."""
    value = re.search(r'<progress [^>]*value="([\d.]+)"', fragment(server, job_id))
    assert value
    return float(value[1])


def run(server: Server) -> str:
    """A whole run in which each step takes as long; its job id."""
    job_id, began = new_job_id(), time.time()
    for number, milestone in enumerate(RUN):
        server.report(job_id, milestone, sent_at=began + number * STEP_TAKES)
    return job_id


def expected(page: str) -> list[str]:
    """The times between which a job is usually done, as the page says them."""
    line = re.search(r'<p id="expected">.*?</p>', page)
    return re.findall(r'datetime="([^"]+)"', line[0]) if line else []


@pytest.mark.slow
def test_what_is_usual_is_learnt_from_five_jobs_and_moves_no_bar_back(serve: Serve) -> None:
    server = serve(CALLBACK_MAX_SKEW="0", QUIET_AFTER="2", LOST_AFTER="4")
    for _ in range(5):
        assert "sually" not in fragment(server, run(server))
    done = re.sub("<[^>]+>", "", fragment(server, run(server)))
    assert re.search("after (39|40) s, usually 40 s", done)
    job_id, positions = new_job_id(), []
    for milestone in RUN[:2]:
        server.report(job_id, milestone)
        positions.append(bar(server, job_id))
    page = fragment(server, job_id)
    assert "usually 10 s" in page
    said, (soonest, latest) = server.page(job_id)["expected"], expected(page)
    assert soonest <= said["from"] <= said["to"] <= latest and soonest.endswith(":00.000Z")
    server.report(job_id, "heartbeat", note="2 of 3 built")
    assert expected(fragment(server, job_id)) == [soonest, latest]  # fixed until the step ends
    for condition in ("quiet", "lost"):
        positions.append(bar(server, job_id))
        wait_until(lambda expected=condition: server.page(job_id)["condition"] == expected)
        positions.append(bar(server, job_id))
        page = fragment(server, job_id)
        assert "no update: </span>2 of 3 built" in page and not expected(page)
    server.report(job_id, "ansible_started")
    positions.append(bar(server, job_id))
    server.report(job_id, "failed", failed_step="configure", sent_at=time.time() - 60)
    positions.append(bar(server, job_id))
    assert positions == sorted(positions) and positions[1] < positions[-3] < positions[-2]
    assert "sually" not in fragment(server, job_id)  # of a job that failed

    again = new_job_id()
    server.report(again, "provisioning", workflow_run_id=1)
    with closing(server.events(again)) as events:
        for number in range(1, 5):
            frame = events.next()["data"]
            assert f'data-attempt="{number}"' in frame and "usually 10 s" in frame
            server.report(again, "provisioning", workflow_run_id=number + 1)


LEFT = {
    True: "The server still exists.",
    False: "No server is left.",
    None: "We don&#39;t know whether a server",
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_failure_left_behind_is_said_as_it_was_reported(gallery: Client, left: bool | None) -> None:
    state = {True: "failed-configuring", False: "failed-creating", None: "failed-installing"}[left]
    page = gallery.get(f"/p/{state}").text
    assert [said for said in LEFT.values() if said in page] == [LEFT[left]]


@pytest.mark.parametrize(
    "state", ["queued", "refused", "lost-queued", *(s for s in STATES if s.startswith(("waiting", "site")))]
)
def test_no_word_of_a_server_before_step_two_or_of_another_pipeline(gallery: Client, state: str) -> None:
    page = re.sub(r'<details id="covers">.*?</details>', "", gallery.get(f"/p/{state}").text, flags=re.S)
    text = re.sub(r"<[^>]+>|Creating Server", "", page[page.index("<h2") :])
    assert "server" not in text.lower() or state == "waiting-runner"
    if state.startswith("site"):
        assert "agent" not in text.lower()


def test_only_of_a_cancelled_run_it_is_said_that_nothing_is_broken(gallery: Client) -> None:
    ended = ("cancelled", "timed-out", "closed", "failed-configuring", "done")
    said = [state for state in ended if "Nothing is known to be broken" in gallery.get(f"/p/{state}").text]
    assert said == ["cancelled"]
    assert "may still go on" not in gallery.get("/p/timed-out").text


def test_a_step_without_a_milestone_of_its_own_reads_passed(gallery: Client) -> None:
    page = gallery.get("/p/lost-milestones").text
    states = re.findall(r"<li data-step=.*?<span>([^<]*)</span>", page, flags=re.S)
    assert states == ["done", "passed", "passed", "in progress", "not started"]


def test_a_failure_has_its_reason_and_contact_before_the_steps(gallery: Client) -> None:
    page = gallery.get("/p/failed-long-error").text
    summary, steps = page[: page.index('<progress id="bar"')], page[page.index('<ol class="steps">') :]
    assert "route to host 10.0.0.15" in summary and "route to host 10.0.0.1&" not in summary
    assert "platform@example.com" in summary
    assert "Show full error (1,329 characters)" in steps
    assert page.count("<b>no</b>") == 0


def test_a_chat_shows_the_state_and_never_the_error(gallery: Client) -> None:
    head = gallery.get("/p/failed-configuring").text.partition("</head>")[0]
    assert '<meta property="og:title" content="Failed · agent-7">' in head
    assert '<meta property="og:description" content="The agent could not be configured">' in head
    assert "Docker" not in head


@pytest.mark.parametrize("state", [state for state in STATES if state.startswith("largest")])
def test_a_page_weighs_at_most_60_kb_whatever_was_reported(gallery: Client, state: str) -> None:
    assert 30_000 < len(gallery.get(f"/p/{state}").data) <= 60_000


def test_only_the_newest_ten_attempts_are_linked(gallery: Client) -> None:
    page = gallery.get("/p/many-attempts").text
    assert re.findall(r'href="\?attempt=(\d+)"', page) == [str(n) for n in range(1491, 1501)]


def test_a_dead_link_says_what_to_do(server: Server) -> None:
    page = requests.get(f"{server.url}/p/nothing", timeout=30).text
    assert "This link does not work" in page and "ask the person who sent it" in page


def test_errors_of_the_workflow_are_shown_whole_but_tamed(server: Server, job_id: str) -> None:
    server.report(job_id, "ansible_started")
    error = "<script>alert(1)</script> & " + "x" * 400
    server.report(job_id, "failed", failed_step="configure", error=error)
    page = requests.get(server.link(job_id), timeout=30).text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " + "x" * 400 in page


def test_earlier_attempts_stay_readable(server: Server, job_id: str) -> None:
    server.report(job_id, "vm_created", workflow_run_id=1)
    server.report(job_id, "failed", failed_step="configure", error="no route", workflow_run_id=1)
    server.report(job_id, "provisioning", workflow_run_id=2)
    link = server.link(job_id)
    earlier = requests.get(link, params={"attempt": "1"}, timeout=30).text
    assert 'data-attempt="1"' in earlier and "no route" in earlier and 'href="?"' in earlier
    assert "<script" not in earlier  # nothing moves there any more
    assert 'data-attempt="2"' in requests.get(link, params={"attempt": "2"}, timeout=30).text
    for number in ("0", "-1", "3", "9" * 30, "x", ""):
        assert requests.get(link, params={"attempt": number}, timeout=30).status_code == 404


def test_the_badge_tells_the_state(server: Server, job_id: str) -> None:
    server.report(job_id, "ansible_started")
    url = server.job(job_id)["badge_url"]
    badge = requests.get(url, timeout=30)
    assert badge.headers["Content-Type"].startswith("image/svg+xml")
    assert badge.headers["Cache-Control"] == "no-store"
    assert f'<title id="t">{job_id}: Step 4 of 5</title>' in badge.text
    server.report(job_id, "running")
    assert "Done" in requests.get(url, timeout=30).text
    assert requests.get(url.replace("/badge.svg", "x/badge.svg"), timeout=30).status_code == 404


def test_only_the_allowed_origins_may_frame_the_page_and_only_the_page(serve: Serve, job_id: str) -> None:
    server = serve(EMBED_ORIGINS="https://wiki.example, https://intranet.example")
    server.report(job_id, "provisioning")
    framed = requests.get(server.link(job_id), timeout=30).headers["Content-Security-Policy"]
    assert framed.endswith("frame-ancestors https://wiki.example https://intranet.example")
    for path in ("/sign-in", "/nowhere"):
        policy = requests.get(server.url + path, timeout=30).headers["Content-Security-Policy"]
        assert policy.endswith("frame-ancestors 'none'")


def test_without_script_the_page_says_so_and_reloads_itself_until_the_end(gallery: Client) -> None:
    page = gallery.get("/p/creating").text
    assert page.count('http-equiv="refresh"') == 2  # for no script at all, and for one that did not start
    assert 'id="unstarted"' in page and "<noscript><p" in page
    page = gallery.get("/p/done").text
    assert "refresh" not in page and "unstarted" not in page
