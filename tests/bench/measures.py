"""What is measured, one function each; every one starts the Milepost that it measures."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import requests
from playwright.sync_api import sync_playwright
from sqlalchemy import create_engine, func, select

from tests.bench import floors
from tests.bench.bench import Bench, Figure, Figures, Milepost, number_of
from tests.support.browser import launch_options
from tests.support.load import (
    MILESTONES,
    Load,
    cpu_seconds,
    heartbeat,
    median,
    milestone,
    new_jobs,
    quantile,
    resident,
    workers_of,
)
from tests.support.pages import Pages, asking
from tests.support.server import Server
from webapp.storage import tables
from webapp.streams.siblings import AT_REST_AFTER, COMPARE_EVERY

STEADY_RATE = 400  # callbacks a second: what 10,000 jobs send
SCREEN_RATE = 20
ALL_BACK_WITHIN = 120  # seconds, or the restart is given up


def callbacks(bench: Bench) -> Figures:
    """Callbacks stored per second, beside a route and a door that only verify, and raw sqlite3."""
    seconds, rounds = bench.seconds(2, 0.5), 15  # short turns: a shared machine's pace changes by the second
    floor = partial(bench.milepost, app="tests.bench.floor:app")
    with bench.milepost() as product, floor(BENCH_ROUTE="1") as route, floor() as door:
        names, sent = product.jobs(2000), 2000
        kinds: dict[str, Callable[[str], Iterator[bytes]]] = {
            "milestones of new jobs": lambda prefix: new_jobs(prefix, int(1000 * seconds)),
            "heartbeats": lambda _: (heartbeat(names[n % 2000]) for n in range(int(5000 * seconds))),
        }
        for kind, requests in kinds.items():
            loads: dict[Milepost, list[Load]] = {product: [], route: [], door: []}
            for turn in range(rounds):
                for server, taken in loads.items():
                    taken.append(server.client.storm(list(requests(f"{kind[:4]}-{turn}")), seconds))
            sent += sum(len(load.latencies) for load in loads[product])
            yield from _beside(kind, *loads.values())
        yield Figure("callbacks", "acknowledged, but not in the database", sent - _rows(product), "", "= 0")
        database = Path(product.database_url.removeprefix("sqlite:///"))
        product.stop()
        for group in (1, 32):
            rate = floors.raw_sqlite(database, seconds, group)
            yield Figure("callbacks", f"floor: raw sqlite3, {group} a commit", rate, "/s")


def _beside(kind: str, product: list[Load], route: list[Load], door: list[Load]) -> Figures:
    yield Figure("callbacks", f"{kind}: stored", median(load.rate for load in product), "/s")
    for name, floor, goal in (("a route of Flask", route, ">= 85"), ("the door", door, "")):
        rate = median(load.rate for load in floor)
        share = median(ours.rate / theirs.rate for ours, theirs in zip(product, floor, strict=True))
        yield Figure("callbacks", f"{kind}: floor: {name} that only verifies", rate, "/s")
        yield Figure("callbacks", f"{kind}: stored of that", 100 * share, "%", goal)
    half, most = (median(load.quantile(share) for load in product) * 1000 for share in (0.5, 0.99))
    floor_most = median(load.quantile(0.99) for load in door) * 1000
    yield Figure("callbacks", f"{kind}: p50", half, "ms")
    yield Figure("callbacks", f"{kind}: p99", most, "ms")
    yield Figure("callbacks", f"{kind}: p99 of p50", most / half, "x", "<= 3")
    yield Figure("callbacks", f"{kind}: p99 of the door that only verifies", floor_most, "ms")
    yield Figure("callbacks", f"{kind}: errors", sum(load.errors for load in product), "", "= 0")


def _rows(server: Server) -> int:
    engine = create_engine(server.database_url)
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(tables.callbacks)).scalar_one()


def screen(bench: Bench) -> Figures:
    """Callback to screen: watchers with a job each, one and two workers, on both databases."""
    yield from _screen(bench, "sqlite", 1, {"same": "<= 25"})
    yield from _screen(bench, "sqlite", 2, {"across": "<= 30"})
    yield from _screen(bench, "postgresql", 1, {"same": "<= 25"})
    yield from _screen(bench, "postgresql", 2, {"across": "<= 15"})


def _screen(bench: Bench, database: str, workers: int, goals: dict[str, str]) -> Figures:
    measure = f"screen, {database}, {number_of(workers)}"
    with bench.milepost(database, workers) as milepost:
        client, names = milepost.client, milepost.jobs(bench.watchers)
        milepost.watch(names)
        count = int(SCREEN_RATE * bench.seconds(30, 5))
        stride = max(len(names) // count, 1)
        chosen = [number * stride % len(names) for number in range(count)]
        load = client.pace([heartbeat(names[n]) for n in chosen], SCREEN_RATE)
        client.listen(10, until=count)
        ports = client.stream_ports()
        owner = workers_of(
            {*ports.values(), *(sent.port for sent in client.sent)}, milepost.workers(), milepost.port
        )
        arrived: dict[int, list[float]] = {}
        for arrival in client.arrivals:
            arrived.setdefault(arrival.stream, []).append(arrival.at)
        taken: dict[str, list[float]] = {"same": [], "across": []}
        missed = 0
        for sent in client.sent:
            stream = chosen[sent.tag]
            if not arrived.get(stream):
                missed += 1
                continue
            where = "same" if owner.get(ports[stream]) == owner.get(sent.port) else "across"
            taken[where].append((arrived[stream].pop(0) - sent.at) * 1000)
    for where, times in taken.items():
        if times:
            label = f"{where} worker" if where == "same" else "across workers"
            yield Figure(measure, f"{label}: p50", quantile(times, 0.5), "ms")
            yield Figure(measure, f"{label}: p99", quantile(times, 0.99), "ms", goals.get(where, ""))
            yield Figure(measure, f"{label}: max of {len(times)}", max(times), "ms")
    yield Figure(measure, "fragments missed", missed, "", "= 0")
    yield Figure(measure, "errors", load.errors, "", "= 0")


def one_job(bench: Bench) -> Figures:
    """One job with all of the watchers, beside a bare epoll loop that writes the same bytes."""
    with bench.milepost() as milepost:
        client, name = milepost.client, milepost.jobs(1)[0]
        milepost.watch([name] * bench.watchers)
        taken, missed = [], 0
        for step in (*MILESTONES[1:], "running"):
            client.arrivals.clear()
            client.pace([milestone(name, step)], 1)
            client.listen(60, until=bench.watchers)
            taken.append(max(a.at for a in client.arrivals) - client.sent[-1].at)
            missed += bench.watchers - len({a.stream for a in client.arrivals})
            client.listen(0.5)
        fragment = requests.get(f"{milepost.url}{milepost.path(name)}/steps", timeout=30).content
    bare = floors.bare_stream(bench.watchers, fragment)
    yield Figure("one job", f"all {bench.watchers} have it, median", median(taken) * 1000, "ms")
    yield Figure("one job", f"worst of {len(taken)}", max(taken) * 1000, "ms")
    yield Figure("one job", "floor: bare epoll loop, median", median(bare) * 1000, "ms")
    yield Figure("one job", "worst, of the bare loop", max(taken) / median(bare), "x", "<= 5")
    yield Figure("one job", "versions missed", missed, "", "= 0")


def watchers(bench: Bench) -> Figures:
    """What open streams cost: memory, callbacks beside them, processor time at rest."""
    seconds = bench.seconds(10)
    with bench.milepost() as milepost:
        client, names = milepost.client, milepost.jobs(bench.watchers)
        milepost.watch(names[:1])
        before = [client.storm(list(new_jobs(f"alone-{n}", int(700 * seconds))), seconds) for n in range(3)]
        client.listen(2)
        memory, start = resident(milepost.workers()), time.monotonic()
        milepost.watch(names[1:])
        yield Figure(
            "watchers", f"{len(names)} opened, and shown their fragment", time.monotonic() - start, "s"
        )
        each = (resident(milepost.workers()) - memory) / max(len(names) - 1, 1)
        yield Figure("watchers", f"memory each, of {len(names)}", each / 1024, "KiB", "<= 24")
        beside = [client.storm(list(new_jobs(f"beside-{n}", int(700 * seconds))), seconds) for n in range(3)]
        alone, busy = (median(load.rate for load in loads) for loads in (before, beside))
        yield Figure("watchers", "callbacks with none open", alone, "/s")
        yield Figure("watchers", f"callbacks with {len(names)} idle", busy, "/s")
        yield Figure("watchers", "of that with none", 100 * busy / alone, "%", ">= 75")
        client.listen(AT_REST_AFTER + COMPARE_EVERY)  # what callbacks have changed is compared once more
        rest = bench.seconds(30, 20)
        start = cpu_seconds(milepost.workers())
        client.listen(rest)
        spent = 100 * (cpu_seconds(milepost.workers()) - start) / rest
    yield Figure("watchers", "processor at rest", spent, "% of a core", "< 2")
    bare = 100 * floors.bare_rest(bench.watchers, rest)
    yield Figure("watchers", "floor: bare loop with as many comments", bare, "% of a core")


def sustained(bench: Bench) -> Figures:
    """All at once and for long: every stream open, and the callbacks of as many jobs."""
    yield from _sustained(bench, 1, bench.seconds(600, 10), "< 50")
    yield from _sustained(bench, 2, bench.seconds(60, 10))


def _sustained(bench: Bench, workers: int, seconds: float, goal: str = "") -> Figures:
    with bench.milepost(workers=workers) as milepost:
        client, names = milepost.client, milepost.jobs(bench.watchers)
        milepost.watch(names)
        count = int(seconds * STEADY_RATE)
        memory: list[int] = []

        def heartbeats() -> Iterator[bytes]:
            for n in range(count):
                if n in (0, count // 10, count // 2):
                    memory.append(resident(milepost.workers()))
                yield heartbeat(names[n % len(names)])

        start = cpu_seconds(milepost.workers())
        load = client.pace(heartbeats(), STEADY_RATE)
        client.listen(5, until=count)
        spent = 100 * (cpu_seconds(milepost.workers()) - start) / load.seconds
        memory.append(resident(milepost.workers()))
    measure = f"sustained {STEADY_RATE}/s, {number_of(workers)}"
    yield Figure(measure, "for", seconds, "s")
    yield Figure(measure, "p50 of the answer", load.quantile(0.5) * 1000, "ms")
    yield Figure(measure, "p99 of the answer", load.quantile(0.99) * 1000, "ms", goal)
    yield Figure(measure, "errors", load.errors + client.ended, "", "= 0")
    for when, held in zip(("at the start", "after a tenth", "after half", "at the end"), memory, strict=True):
        yield Figure(measure, f"memory {when}", held / 2**20, "MiB")
    yield Figure(measure, "fragments sent of callbacks", 100 * len(client.arrivals) / count, "%")
    yield Figure(measure, "processor", spent, "% of a core")


def killed(bench: Bench) -> Figures:
    """A worker killed under a page in a browser: how long until it shows, by itself, what came after."""
    taken = []
    with bench.milepost() as milepost, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        page, name = browser.new_page(), milepost.jobs(1)[0]
        with page.expect_response(re.compile("/events")):
            page.goto(milepost.url + milepost.path(name))
        for step in MILESTONES[1:]:
            start = time.monotonic()
            os.kill(milepost.workers()[0], signal.SIGKILL)
            milepost.report(name, step)  # its connection waits for the next worker
            version = milepost.page(name)["version"]
            page.locator(f'#steps[data-version="{version}"]').wait_for()
            taken.append(time.monotonic() - start)
        browser.close()
    yield Figure("a worker killed", "the page shows the newest state, median", median(taken), "s")
    yield Figure("a worker killed", f"worst of {len(taken)}", max(taken), "s", "<= 3")


def restart(bench: Bench) -> Figures:
    """All pages come back after a restart, streams and polls; callbacks and /healthz meanwhile."""
    for workers in (1, 2):
        yield from _restart(bench, workers, "<= 7" if workers == 1 else "<= 4")


def _restart(bench: Bench, workers: int, goal: str) -> Figures:
    with bench.milepost(workers=workers) as milepost:
        names = milepost.jobs(bench.watchers)
        pages = Pages(milepost.port, [milepost.path(name) for name in names])
        pages.open()
        pages.forget()
        with ThreadPoolExecutor(1) as supervisor:
            pages.turn_until(supervisor.submit(milepost.stop).done, 60)
        milepost.start(wait=False)
        with asking(milepost.port, names[0]) as asked:
            pages.turn_until(lambda: bool(asked()), 60)
            since = time.monotonic()
            until = since + ALL_BACK_WITHIN
            pages.turn_until(
                lambda: pages.back == len(names) or time.monotonic() > until, ALL_BACK_WITHIN + 9
            )
            taken = time.monotonic() - since
            until = time.monotonic() + 10  # what is still asked is answered
            pages.turn_until(lambda: time.monotonic() > until, 20)
            meanwhile = [each for each in asked() if each.began >= since]
        pages.close()
    measure = f"restart, {number_of(workers)}"
    yield Figure(measure, f"the last of {len(names)} streams is back", taken, "s", goal)
    yield Figure(measure, f"not back after {ALL_BACK_WITHIN} s", len(names) - pages.back, "", "= 0")
    yield Figure(measure, "connections of the pages, at most", pages.most, "")
    yield Figure(
        measure, "asked meanwhile, and not answered 200", sum(not a.is_good for a in meanwhile), "", "= 0"
    )
    for name in ("callback", "healthz"):
        times = [each.seconds for each in meanwhile if each.name == name]
        yield Figure(measure, f"{name}: p50", quantile(times, 0.5) * 1000, "ms")
        yield Figure(measure, f"{name}: p99", quantile(times, 0.99) * 1000, "ms", "<= 1000")
        yield Figure(measure, f"{name}: worst of {len(times)}", max(times) * 1000, "ms", "<= 2000")
