"""The progress page in a real browser: it follows, whatever happens to network, tab, clock or server."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.screenshots import served, show
from tests.support.browser import launch_options
from tests.support.databases import execute
from tests.support.gallery import STATES
from tests.support.server import Serve, Server, wait_until
from tests.support.stand_in import StandIn, listening
from webapp.page.words import duration

pytestmark = pytest.mark.one_database

WHAT_IS_WRONG = {"resultTypes": ["violations"]}  # and not what is right, at twice the cost
RUN = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
HEADLINES = (
    "Creating the server",
    "Installing the dependencies",
    "Configuring the agent",
    "Finishing the set-up",
    "The agent was set up",
)
HEAR = """() => { said = []; loads = 1; shift = 0
  new MutationObserver(() => said.push(document.getElementById("said").textContent))
    .observe(document.getElementById("said"), {childList: true})
  new PerformanceObserver(list => { for (const e of list.getEntries()) shift += e.value })
    .observe({type: "layout-shift", buffered: true}) }"""
# Where things stand: layout-shift is blind to replaced nodes.
PLACES = """() => Object.fromEntries(["h1", "#now", "#bar", ".steps li:nth-child(1) b",
  ".steps li:nth-child(5) b", "#bell", "#cover", "#happened"].map(name =>
    [name, document.querySelector(name).getBoundingClientRect().top]))"""
LINES = """() => [...document.querySelectorAll(
  "#now, #expected, .steps b, .steps li > span, .happened b")].map(e => {
  const range = document.createRange()
  range.selectNodeContents(e)
  const lines = new Set([...range.getClientRects()].filter(r => r.width > 1).map(r => Math.round(r.top)))
  return [e.textContent.trim(), lines.size, e.textContent.trim().split(/\\s+/).length] })"""
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


@pytest.fixture(scope="module")
def apart(browser: Browser) -> Iterator[Browser]:
    """A browser to which `milepost.test` is this machine, but no trusted one."""
    rules = "--host-resolver-rules=MAP milepost.test 127.0.0.1"
    options = launch_options()
    other = browser.browser_type.launch(**options | {"args": [*options["args"], rules]})
    yield other
    other.close()


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
    places, icons = page.evaluate(PLACES), {page.locator("#icon").get_attribute("href")}
    for rank, milestone in enumerate(RUN[1:], 2):
        server.report(job_id, milestone)
        expect_rank(page, rank)
        icons.add(page.locator("#icon").get_attribute("href"))
        if milestone != "running":
            now = page.evaluate(PLACES)
            assert all(abs(now[name] - place) <= 4 for name, place in places.items()), (
                milestone,
                now,
                places,
            )
            expect(page).to_have_title(f"Step {rank + 1} of 5 · {job_id}")
    expect(page).to_have_title(f"Done · {job_id}")
    expect(page.locator("[aria-current=step]")).to_have_count(0)
    assert page.evaluate("said") == [f"{headline}." for headline in HEADLINES[1:]]
    assert page.evaluate("loads") == 1
    assert len(icons) == 5


def test_a_heartbeat_changes_one_time_and_a_swap_keeps_what_is_selected(
    server: Server, job_id: str, page: Page
) -> None:
    server.report(job_id, "ansible_started", workflow_run_id=1)
    page.add_init_script("swaps = 0; document.addEventListener('htmx:sseMessage', () => swaps++)")
    watch(page, server, job_id)
    page.wait_for_function("swaps == 1")  # with which the stream begins
    page.evaluate("getSelection().selectAllChildren(document.getElementById('about'))")
    before = page.locator("#signal").get_attribute("datetime") or ""
    server.report(job_id, "heartbeat")
    expect(page.locator("#signal")).not_to_have_attribute("datetime", before)
    assert page.evaluate("swaps") == 1
    server.report(job_id, "heartbeat", note="3 of 40 tasks done")  # that is shown, so it is swapped
    expect(page.locator(".steps [aria-current] > span")).to_have_text("in progress: 3 of 40 tasks done")
    assert page.evaluate("swaps") == 2
    assert page.evaluate("getSelection().toString()").startswith("The workflow installs Docker")


def test_a_page_that_hears_its_stream_asks_once_whether_that_tells_all(
    server: Server, job_id: str, page: Page
) -> None:
    server.report(job_id, "provisioning")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/steps?" in request.url else None)
    page.add_init_script("swaps = 0; document.addEventListener('htmx:sseMessage', () => swaps++)")
    page.clock.install()
    with page.expect_response(re.compile("/events")):
        page.goto(server.link(job_id))
        page.clock.run_for(1000)
    wait_until(lambda: page.evaluate("swaps") == 1)
    page.clock.run_for(60_000)
    assert len(asked) == 1


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
    expect(page.locator("#signal")).to_be_visible()
    places = page.evaluate(PLACES)
    context.set_offline(True)
    expect(page.locator("#offline")).to_be_visible()
    expect(page.locator("#offline [data-known]")).to_have_text(re.compile(r"\d:\d\d"))
    expect(page.locator("#said")).to_have_text(re.compile("No connection since .*\\d"))
    expect(page.locator("#offline")).to_contain_text(f"Last known state: {HEADLINES[0]}")
    expect(page).to_have_title(f"No connection · {job_id}")
    expect(page.locator("#update")).to_have_text(re.compile(r"Last update at .*\d:\d\d"))
    assert page.evaluate(PLACES) == pytest.approx(places, abs=4)
    server.report(job_id, "ansible_started")
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


def test_a_stream_that_comes_back_with_an_old_sign_of_life_is_kept(
    serve: Serve, job_id: str, page: Page
) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    page.add_init_script("swaps = 0; document.addEventListener('htmx:sseMessage', () => swaps++)")
    page.clock.install()
    watch(page, server, job_id)
    wait_until(lambda: page.evaluate("swaps") == 1)
    execute(server.database_url, "UPDATE attempts SET last_signal_at = last_signal_at - 60")
    os.kill(server.pid, signal.SIGSTOP)  # so that the next worker is late
    with page.expect_event("requestfailed"):
        os.kill(server.workers()[0], signal.SIGKILL)  # the port stays open, so the page is never offline
    page.clock.fast_forward(4_000)  # longer than an open stream may take for its first event
    with page.expect_response(re.compile("/events")):
        os.kill(server.pid, signal.SIGCONT)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/steps?" in request.url else None)
    server.report(job_id, "vm_created")
    wait_until(lambda: page.evaluate("swaps") > 1)
    assert not asked


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


def test_a_hidden_tab_asks_within_20_seconds(server: Server, job_id: str, page: Page) -> None:
    page.clock.install()
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    page.evaluate(HIDE, True)
    with page.expect_request(re.compile(r"/steps\?")):
        for _ in range(3):
            page.clock.fast_forward(7_000)  # less than what is taken for a sleep


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
    expect(page.locator("[data-since]").first).to_have_text(re.compile(r"^for \d s$"))


def test_an_answer_that_a_stream_has_overtaken_is_not_shown(server: Server, job_id: str, page: Page) -> None:
    server.report(job_id, "provisioning")
    old = requests.get(f"{server.link(job_id)}/steps", timeout=30)
    server.report(job_id, "ansible_started")
    watch(page, server, job_id)
    before = page.locator("#signal").get_attribute("datetime") or ""
    server.report(job_id, "heartbeat")
    expect(page.locator("#signal")).not_to_have_attribute("datetime", before)  # by the stream
    page.evaluate("""() => { ranks = new Set(); new MutationObserver(() =>
      ranks.add(document.querySelectorAll("[data-state=completed]").length))
      .observe(document.getElementById("live"), {subtree: true, attributes: true, childList: true}) }""")
    headers = {name: old.headers[name] for name in ("Version", "Date", "Content-Type")}
    page.route("**/steps?*", lambda route: route.fulfill(body=old.text, headers=headers), times=1)
    with page.expect_response(re.compile("/steps")):
        page.evaluate("dispatchEvent(new Event('offline'))")  # it asks at once
    server.report(job_id, "running")
    expect_rank(page, 5)
    assert 1 not in page.evaluate("[...ranks]")


def test_a_restored_older_state_is_shown(server: Server, job_id: str, page: Page) -> None:
    server.report(job_id, "provisioning")
    old = requests.get(f"{server.link(job_id)}/steps", timeout=30).text
    server.report(job_id, "ansible_started")
    watch(page, server, job_id)
    expect_rank(page, 3)
    lines = "".join(f"data: {line}\n" for line in old.splitlines())
    restored = f"event: steps\nid: restored\n{lines}\n"
    page.route("**/events", lambda route: route.fulfill(body=restored, content_type="text/event-stream"))
    page.evaluate("dispatchEvent(new Event('online'))")
    expect_rank(page, 1)


@contextmanager
def holding_back(upstream: int, block: int = 4096) -> Iterator[int]:
    """A proxy that keeps the last bytes of what it passes on until a block of them is full; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with suppress(BrokenPipeError, ConnectionResetError), client:
                pass_on(client)

        def pass_on(client: socket.socket) -> None:
            server = socket.create_connection(("127.0.0.1", upstream))
            request = client.recv(65536)
            server.sendall(request.replace(b"keep-alive", b"close"))
            pending, is_stream = b"", b"/events" in request
            while part := server.recv(65536):
                pending += part
                head = pending.find(b"\r\n\r\n") + 4 if pending.startswith(b"HTTP") else 0
                whole = head + (len(pending) - head) // block * block if is_stream else len(pending)
                client.sendall(pending[:whole])
                pending = pending[whole:]
            client.sendall(pending)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_behind_a_proxy_that_holds_streams_back_no_state_is_late(
    server: Server, job_id: str, page: Page
) -> None:
    server.report(job_id, "provisioning")
    with holding_back(server.port) as port:
        page.goto(server.link(job_id).replace(f":{server.port}", f":{port}"))
        for rank in (2, 3, 5):
            server.report(job_id, RUN[rank - 1])
            expect(page.locator("#now")).to_have_text(HEADLINES[rank - 1], timeout=10_000)


@pytest.mark.parametrize("host", ["127.0.0.1", "milepost.test"])  # the second is no secure context
def test_eight_tabs_do_not_starve_each_other(server: Server, job_id: str, apart: Browser, host: str) -> None:
    server.report(job_id, "provisioning")
    context = apart.new_context()
    tabs, streams = [context.new_page() for _ in range(8)], []
    for tab in tabs:
        tab.on("response", lambda answer: streams.append(answer) if "/events" in answer.url else None)
        tab.goto(server.link(job_id).replace("127.0.0.1", host))
    assert tabs[0].evaluate("isSecureContext") == (host == "127.0.0.1")
    server.report(job_id, "vm_created")
    for tab in tabs:
        expect_rank(tab, 2)
    assert 1 <= len(streams) <= 5
    context.close()


def test_who_asked_is_notified_at_the_end(
    server: Server, job_id: str, context: BrowserContext, page: Page
) -> None:
    context.grant_permissions(["notifications"])
    page.add_init_script("""notes = []; Notification = class {
      static permission = "granted"
      static requestPermission = async () => "granted"
      constructor(title, {body}) { notes.push([title, body]) } }""")
    server.report(job_id, "provisioning")
    watch(page, server, job_id)
    page.get_by_role("button", name="Notify me at the end").click()
    expect(page.locator("#bell")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.locator("#bell")).to_have_attribute("aria-pressed", "true")
    server.report(job_id, "vm_created")
    expect_rank(page, 2)
    assert page.evaluate("notes") == []
    server.report(job_id, "running")
    expect_rank(page, 5)
    assert page.evaluate("notes") == [[f"Done · {job_id}", f"{HEADLINES[-1]}."]]
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
    expect(page.locator("[data-since]").first).to_have_text(re.compile(r"^for \d{1,2} s$"))


def test_focus_scroll_and_what_was_opened_survive_a_change(serve: Serve, job_id: str, page: Page) -> None:
    server = serve(QUIET_AFTER="5", LOST_AFTER="5")
    server.report(job_id, "vm_created", workflow_run_id=1, repository="acme/fleet")
    page.set_viewport_size({"width": 360, "height": 400})
    watch(page, server, job_id)
    page.locator("#run").focus()
    page.evaluate("scrollTo(0, 240)")
    page.evaluate("getSelection().selectAllChildren(document.getElementById('run'))")
    server.report(job_id, "ansible_started", workflow_run_id=1)
    expect_rank(page, 3)
    expect(page.locator("#run")).to_be_focused()
    assert page.evaluate("scrollY") == 240
    assert page.evaluate("getSelection().toString()") == "View the run on GitHub (needs access)"
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


@pytest.fixture(scope="module")
def phone(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    yield page
    page.close()


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_accessible_fits_and_stays_legible(gallery: str, phone: Page, state: str) -> None:
    phone.set_viewport_size({"width": 360, "height": 740})
    phone.emulate_media(color_scheme="light")
    show(phone, gallery, state)
    phone.evaluate("for (const all of document.querySelectorAll('details')) all.open = true")
    rules = {"meta-refresh": {"enabled": state != "script-blocked"}}  # where nothing else brings news
    results = Axe().run(phone, options={"rules": rules, **WHAT_IS_WRONG})
    assert results.violations_count == 0, results.generate_report()
    phone.emulate_media(color_scheme="dark")
    contrast = {"runOnly": ["color-contrast"], **WHAT_IS_WRONG}
    assert phone.evaluate("options => axe.run(options)", contrast)["violations"] == []
    phone.set_viewport_size({"width": 320, "height": 640})
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert phone.evaluate(fits)
    phone.set_viewport_size({"width": 360, "height": 740})
    phone.evaluate("document.documentElement.style.fontSize = '200%'")
    assert phone.evaluate(fits)
    if state != "long-names" and not state.startswith("largest"):  # their words are longer than a line
        for text, lines, words in phone.evaluate(LINES):
            assert lines <= max(2, words), f"{text!r} takes {lines} lines"


def test_on_paper_the_bar_is_drawn_and_the_error_is_whole(gallery: str, page: Page) -> None:
    show(page, gallery, "failed-long-error")
    page.emulate_media(media="print")
    expect(page.locator("#error pre")).to_be_visible()
    expect(page.locator("#bell")).to_be_hidden()
    assert page.evaluate("getComputedStyle(bar).printColorAdjust") == "exact"


def test_in_forced_colours_the_bar_and_the_bell_are_told_without_hue(gallery: str, page: Page) -> None:
    page.emulate_media(forced_colors="active")
    show(page, gallery, "configuring")
    filled = page.locator("#bar").screenshot()
    page.evaluate("delete bar.dataset.start; bar.value = 0")
    assert page.locator("#bar").screenshot() != filled
    signs = "getComputedStyle(bell, '::before').content"
    before = page.evaluate(signs)
    page.evaluate("bell.setAttribute('aria-pressed', true)")
    assert page.evaluate(signs) != before


def test_a_link_that_was_revoked_says_so_and_asks_no_more(gallery: str, page: Page) -> None:
    page.clock.install()
    show(page, gallery, "gone")
    expect(page.locator("#said")).to_have_text(re.compile("no longer works"))
    expect(page.locator("#gone")).to_contain_text("Last known state, at")
    expect(page).to_have_title("Link no longer works · agent-7")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(130_000)
    assert asked == []


def test_a_login_page_in_place_of_the_state_is_no_connection(gallery: str, page: Page) -> None:
    show(page, gallery, "login-page")
    expect(page.locator("#offline h2")).to_contain_text("No connection since")
    expect(page.locator("#steps")).to_have_count(1)


def test_a_page_whose_script_did_not_start_says_so_and_reloads(gallery: str, page: Page) -> None:
    page.goto(f"{gallery}/p/script-blocked")
    expect(page.locator("#unstarted")).to_be_visible(timeout=10_000)
    with page.expect_navigation():
        page.evaluate("reload.content = '0'")


def test_a_page_whose_script_has_started_does_not_reload(gallery: str, page: Page) -> None:
    page.goto(f"{gallery}/p/embedded")  # it would after a second
    page.evaluate("loads = 1")
    expect(page.locator("#unstarted")).to_have_count(0)
    expect(page.locator("#signal")).to_have_text(re.compile("1[01] s ago"))  # it was 7
    assert page.evaluate("loads") == 1


class Wiki(StandIn):
    """A page of somebody else's that embeds the one it is asked for."""

    def do_GET(self) -> None:
        frame = f'<!doctype html><iframe sandbox="allow-scripts" src="{self.path[1:]}"></iframe>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(frame)))
        self.end_headers()
        self.wfile.write(frame)


def test_in_a_sandboxed_frame_it_reloads_itself_without_a_false_alarm(page: Page) -> None:
    with listening(Wiki) as port, served(f"http://127.0.0.1:{port}") as gallery:
        with page.expect_response("**/p/embedded"):
            page.goto(f"http://127.0.0.1:{port}/{gallery}/p/embedded")
        with page.expect_response("**/p/embedded"):
            frame = page.frame_locator("iframe")
            expect(frame.locator("#signal")).to_be_visible()
            expect(frame.locator("#unstarted")).to_have_count(0)
            expect(frame.locator("#offline")).to_be_hidden()
            assert frame.locator("#run").get_attribute("target") == "_blank"
        page.goto("about:blank")


def test_durations_are_worded_alike_by_server_and_script(gallery: str, page: Page) -> None:
    show(page, gallery, "configuring")
    for seconds in (0, 59, 60, 61, 3599, 3600, 3660, 86399, 86400, 90061, 360000):
        page.evaluate(
            "s => { signal.dateTime = new Date(Date.now() - s * 1000 - 300).toISOString() }", seconds
        )
        said = re.compile(f"^({duration(seconds)}|{duration(seconds + 1)}) ago$")
        expect(page.locator("#signal")).to_have_text(said)
