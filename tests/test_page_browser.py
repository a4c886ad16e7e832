"""The progress page in a real browser: it follows, whatever happens to network, tab, clock or server."""

import re
import time
from collections.abc import Iterator

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.screenshots import SCHEMES, served, show
from tests.support.gallery import STATES
from tests.support.server import Serve, Server

pytestmark = pytest.mark.one_database

RUN = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
HEADLINES = (
    "The server is being created, and it moves.",
    "The installation is being prepared, and it moves.",
    "The agent is being installed, and it moves.",
    "The agent is installed; the last word is awaited, and it moves.",
    "Done: the agent is running.",
)
HEAR = """() => { said = []; loads = 1; shift = 0
  new MutationObserver(() => said.push(document.getElementById("said").textContent))
    .observe(document.getElementById("said"), {childList: true})
  new PerformanceObserver(list => { for (const e of list.getEntries()) shift += e.value })
    .observe({type: "layout-shift", buffered: true}) }"""
HIDE = """hidden => {
  Object.defineProperty(document, "hidden", {value: hidden, configurable: true})
  document.dispatchEvent(new Event("visibilitychange")) }"""

HALF_OPEN = """EventSource = class extends EventSource {
  addEventListener(name, hear) { let heard = 0; super.addEventListener(name, e => heard++ || hear(e)) } }"""


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 360, "height": 740})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def watch(page: Page, server: Server, job_id: str) -> None:
    """Open the progress page, and wait until it follows."""
    with page.expect_response(re.compile("/events")):
        page.goto(server.link(job_id))


def expect_rank(page: Page, rank: int) -> None:
    expect(page.locator("#steps")).to_have_attribute(
        "data-status", "running" if rank == 5 else "provisioning", timeout=15_000
    )
    expect(page.locator("#now")).to_have_text(HEADLINES[rank - 1], timeout=15_000)
    expect(page.locator('[data-state="completed"]')).to_have_count(rank)


def fragment(server: Server, job_id: str) -> str:
    return requests.get(f"{server.link(job_id)}/steps", timeout=30).text


def test_a_run_is_followed_step_by_step_spoken_once_and_nothing_jumps(
    server: Server, job_id: str, page: Page
) -> None:
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    page.evaluate(HEAR)
    icons = {page.locator("#icon").get_attribute("href")}
    for rank, milestone in enumerate(RUN[1:], 2):
        version = page.locator("#steps").get_attribute("data-version") or ""
        server.report(job_id, "heartbeat")  # which is shown, and nothing to speak of
        expect(page.locator("#steps")).not_to_have_attribute("data-version", version)
        server.report(job_id, milestone)
        expect_rank(page, rank)
        icons.add(page.locator("#icon").get_attribute("href"))
    expect(page).to_have_title(f"Done · {job_id}")
    expect(page.locator("[aria-current=step]")).to_have_count(0)
    assert page.evaluate("said") == list(HEADLINES[1:])
    assert page.evaluate("loads") == 1
    assert page.evaluate("shift") < 0.01
    assert len(icons) == 5


def test_where_streams_are_blocked_it_polls(server: Server, job_id: str, page: Page) -> None:
    page.route("**/events", lambda route: route.abort())
    server.report(job_id, "provisioning")
    page.goto(server.link(job_id))
    for rank in (2, 5):
        server.report(job_id, RUN[rank - 1])
        expect_rank(page, rank)


def test_without_script_it_reloads_itself(server: Server, job_id: str, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    server.report(job_id, "provisioning")
    page.goto(server.link(job_id))
    expect_rank(page, 1)
    server.report(job_id, "running")
    expect(page.locator("#now")).to_have_text(HEADLINES[-1], timeout=20_000)
    context.close()


def test_offline_it_says_since_when_and_catches_up_at_once(
    server: Server, job_id: str, context: BrowserContext, page: Page
) -> None:
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    expect(page.locator("#since")).to_have_text(re.compile(r"\d:\d\d"))
    expect(page.locator("#said")).to_have_text(re.compile("cannot be reached since .*\\d"))
    server.report(job_id, "ansible_started")
    expect(page.locator("#now")).to_have_text(HEADLINES[0])
    context.set_offline(False)
    expect_rank(page, 3)
    expect(page.locator("#offline")).to_be_hidden()


def test_it_comes_back_after_a_restart_of_the_server(serve: Serve, job_id: str, page: Page) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    server.stop()
    expect(page.locator("#offline")).to_be_visible(timeout=15_000)
    server.start()
    expect(page.locator("#offline")).to_be_hidden(timeout=15_000)
    server.report(job_id, "vm_created")
    expect_rank(page, 2)


def test_a_hidden_tab_gives_its_stream_back_and_catches_up_when_shown(
    server: Server, job_id: str, page: Page
) -> None:
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
        page.evaluate(HIDE, True)
    server.report(job_id, "ansible_started")
    with page.expect_response(re.compile("/events")):
        page.evaluate(HIDE, False)
    expect_rank(page, 3)


def test_after_sleep_it_catches_up_at_once_and_tells_the_time_truly(
    server: Server, job_id: str, page: Page
) -> None:
    page.add_init_script(HALF_OPEN)
    page.clock.install()
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    server.report(job_id, "ansible_started")
    page.clock.fast_forward(30_000)
    expect_rank(page, 3)
    expect(page.locator("[data-since]").first).to_have_text(re.compile(r"^\d s$"))


def test_an_older_state_is_never_shown_over_a_newer_one(server: Server, job_id: str, page: Page) -> None:
    server.report(job_id, "provisioning")
    old = fragment(server, job_id)
    server.report(job_id, "ansible_started")
    lines = "".join(f"data: {line}\n" for line in old.splitlines())
    stale = f"event: steps\nid: 1\n{lines}\n"

    def fulfill(route: Route) -> None:
        stream = route.request.url.endswith("/events")
        kind = "text/event-stream" if stream else "text/html"
        route.fulfill(body=stale if stream else old, content_type=kind)

    page.route(re.compile("/(events|steps)"), fulfill)
    with page.expect_response(re.compile("/steps")), page.expect_response(re.compile("/events")):
        page.goto(server.link(job_id))
        page.evaluate("dispatchEvent(new Event('online'))")
    page.unroute(re.compile("/(events|steps)"))
    page.evaluate(
        "() => { versions = []; new MutationObserver(() => versions.push("
        "document.getElementById('steps').dataset.version)).observe("
        "document.getElementById('live'), {childList: true}) }"
    )
    expect_rank(page, 3)
    server.report(job_id, "running")
    expect_rank(page, 5)
    assert len(page.evaluate("versions")) == 1


def test_eight_tabs_do_not_starve_each_other(server: Server, job_id: str, context: BrowserContext) -> None:
    server.report(job_id, "provisioning")
    tabs = [context.new_page() for _ in range(8)]
    for tab in tabs:
        tab.goto(server.link(job_id))
    server.report(job_id, "vm_created")
    for tab in tabs:
        expect_rank(tab, 2)
    locks = tabs[0].evaluate("navigator.locks.query()")
    assert 1 <= len(locks["held"]) <= 4


def test_who_asked_is_notified_at_the_end(
    server: Server, job_id: str, context: BrowserContext, page: Page
) -> None:
    context.grant_permissions(["notifications"])
    page.add_init_script("""notes = []; Notification = class {
      static permission = "default"
      static requestPermission = async () => "granted"
      constructor(title, {body}) { notes.push([title, body]) } }""")
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    page.get_by_role("button", name="Notify me at the end").click()
    expect(page.locator("#bell")).to_have_attribute("aria-pressed", "true")
    server.report(job_id, "vm_created")
    expect_rank(page, 2)
    assert page.evaluate("notes") == []
    server.report(job_id, "running")
    expect_rank(page, 5)
    assert page.evaluate("notes") == [[f"Done · {job_id}", HEADLINES[-1]]]
    expect(page.locator("#bell")).to_be_hidden()


def test_a_new_attempt_after_the_end_appears_by_itself(server: Server, job_id: str, page: Page) -> None:
    page.clock.install()
    server.report(job_id, "failed", workflow_run_id=1)
    page.goto(server.link(job_id))
    expect(page.locator("#steps")).to_have_attribute("data-condition", "over")
    server.report(job_id, "vm_created", workflow_run_id=2)
    page.clock.run_for(70_000)
    expect(page.locator("#steps")).to_have_attribute("data-attempt", "2")
    server.report(job_id, "ansible_started", workflow_run_id=2)
    expect_rank(page, 3)


@pytest.mark.parametrize("hours", [-7, 7])
def test_a_wrong_clock_does_not_bend_the_times(server: Server, job_id: str, page: Page, hours: int) -> None:
    server.report(job_id, "provisioning")
    page.clock.install(time=time.time() + hours * 3600)
    page.goto(server.link(job_id))
    page.clock.run_for(3000)
    expect(page.locator("[data-since]").first).to_have_text(re.compile(r"^\d{1,2} s$"))


def test_focus_scroll_and_what_was_opened_survive_a_change(serve: Serve, job_id: str, page: Page) -> None:
    server = serve(DISPATCH_REPOSITORY="acme/fleet", QUIET_AFTER="5", LOST_AFTER="5")
    server.report(job_id, "vm_created", workflow_run_id=1)
    page.set_viewport_size({"width": 360, "height": 400})
    watch(page, server, job_id)
    page.locator("#run").focus()
    page.evaluate("scrollTo(0, 240)")
    server.report(job_id, "ansible_started", workflow_run_id=1)
    expect_rank(page, 3)
    expect(page.locator("#run")).to_be_focused()
    assert page.evaluate("scrollY") == 240
    expect(page.locator("#steps")).to_have_attribute("data-condition", "lost", timeout=15_000)
    page.locator("#asked").click()
    expect(page.locator("#ask")).to_have_attribute("open", "")
    page.locator("#asked").focus()
    server.report(job_id, "failed", failed_step="configure", workflow_run_id=1)
    expect(page.locator("#steps")).to_have_attribute("data-status", "failed")
    expect(page.locator("#asked")).to_be_focused()
    expect(page.locator("#ask")).to_have_attribute("open", "")
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("getSelection().toString()").startswith(f"Job: {job_id}")


@pytest.fixture(scope="module")
def gallery() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_accessible_and_fits(gallery: str, page: Page, state: str) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        show(page, gallery, state)
        for details in page.locator("details").all():
            details.locator("summary").click()
        results = Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate(fits)
    page.set_viewport_size({"width": 640, "height": 640})
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    assert page.evaluate(fits)


def test_a_link_that_was_revoked_says_so(gallery: str, page: Page) -> None:
    show(page, gallery, "gone")
    expect(page.locator("#said")).to_have_text(re.compile("no longer works"))
