"""What one request costs: processor time of the workers, what a second worker is worth, a large database."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice

import requests
from sqlalchemy import create_engine, text

from tests.bench.bench import Bench, Figure, Figures, Milepost, in_turn
from tests.support import growth
from tests.support.load import (
    Client,
    Load,
    cpu_seconds,
    heartbeat,
    median,
    milestone,
    new_jobs,
    quantile,
    request,
    workers_of,
)
from tests.support.operator import signed_in
from tests.support.server import OPERATOR_TOKEN

TURNS = 3
PRUNE_RATE = 50  # callbacks a second
FIRST = 50  # requests that find everything cold: they are not counted


def opening(bench: Bench) -> Figures:
    """Processor time of one opened stream, beside the same worker that sends as many bytes without Flask."""
    with bench.milepost() as milepost:
        paths = [milepost.path(name) for name in milepost.jobs(bench.count(3000))]
        with requests.get(f"{milepost.url}{paths[0]}/events", stream=True, timeout=30) as stream:
            frame = next(stream.iter_content(None))
        (bench.folder / "frame").write_bytes(frame)
        with bench.milepost(app="tests.bench.floor:app", BENCH_FRAME=f"{bench.folder}/frame") as floor:
            taken: list[tuple[float, ...]] = []
            for _ in range(TURNS):
                ours, versions = _opened(milepost, paths)
                again, _ = _opened(milepost, paths, dict(zip(paths, versions, strict=True)))
                taken.append((ours, again, _opened(floor, paths)[0]))
    ours, again, bare = (median(column) for column in zip(*taken, strict=True))
    yield Figure("opening", f"one of {len(paths)} streams", ours, "us", "<= 650")
    yield Figure("opening", "of a page that has the state", again, "us", "<= 650")
    yield Figure("opening", f"floor: {len(frame)} bytes by the same worker alone", bare, "us")


def _opened(
    server: Milepost, paths: list[str], seen: dict[str, str] | None = None
) -> tuple[float, list[str]]:
    """Microseconds of the worker for one stream, each of another job, after a restart; their versions."""
    server.stop()
    server.start()
    client = Client(server.port)
    client.open_streams(paths[:FIRST], seen)
    spent = cpu_seconds(server.workers())
    client.open_streams(paths[FIRST:], seen)
    spent = cpu_seconds(server.workers()) - spent
    client.close()
    newest = {arrival.stream: arrival.version for arrival in client.arrivals}
    return 1e6 * spent / len(paths[FIRST:]), [newest[number] for number in range(len(paths))]


def costs(bench: Bench) -> Figures:
    """Processor time of a page, a fragment and the operator's first page, beside `/healthz`."""
    for database in ("sqlite", "postgresql"):
        with bench.milepost(database) as milepost:
            growth.fill(milepost.database_url, bench.count(10_000))
            paths = [milepost.path(name) for name in milepost.jobs(100)]
            cookie = _cookie(milepost)
            kinds: dict[str, tuple[list[bytes], str]] = {
                "a page": ([request(path) for path in paths], "<= 1200"),
                "a fragment": ([request(f"{path}/steps") for path in paths], "<= 900"),
                "the operator's first page": ([request("/", cookie)], "<= 4000"),
                "floor: /healthz": ([request("/healthz")], ""),
            }
            for kind, (asked, goal) in kinds.items():
                _cost(milepost, asked, FIRST)
                spent = median(_cost(milepost, asked, bench.count(1000, 300)) for _ in range(TURNS))
                yield Figure(f"costs, {database}", kind, spent, "us", goal)


def _cost(server: Milepost, asked: list[bytes], count: int) -> float:
    """Microseconds of the worker for one of these requests."""
    spent = cpu_seconds(server.workers())
    load = server.client.storm(islice(cycle(asked), count), 60, connections=4)
    assert (len(load.latencies), load.errors) == (count, 0), (len(load.latencies), load.errors, count)
    return 1e6 * (cpu_seconds(server.workers()) - spent) / count


def _cookie(server: Milepost) -> str:
    """The header of an operator who has signed in."""
    cookie = signed_in(server).cookie
    return f"Cookie: {cookie.name}={cookie.value}"


def workers(bench: Bench) -> Figures:
    """What a second worker is worth, beside what it is worth to the door that stores nothing."""
    seconds = bench.seconds(5, 1)
    made = partial(new_jobs, count=int(500 * seconds))
    floor = partial(bench.milepost, app="tests.bench.floor:app")
    with floor() as one, floor(workers=2) as two:
        (alone, both), _, _ = in_turn([(one.client, made), (two.client, made)], seconds)
    yield Figure("workers", "floor: two that only verify, by one", both / alone, "x")
    for database, goal in (("postgresql", ">= 1.6"), ("sqlite", "")):
        measure = f"workers, {database}"
        with bench.milepost(database) as one, bench.milepost(database, workers=2) as two:
            (alone, both), _, errors = in_turn([(one.client, made), (two.client, made)], seconds)
            owners = Counter(workers_of(two.client.ports(), two.workers(), two.port).values())
        yield Figure(measure, "stored by one", alone, "/s")
        yield Figure(measure, "stored by two", both, "/s")
        yield Figure(measure, "two by one", both / alone, "x", goal)
        yield Figure(measure, f"of {owners.total()} connections, at the busier", max(owners.values()), "")
        yield Figure(measure, "errors", errors, "", "= 0")


def pruning(bench: Bench) -> Figures:
    """What `flask prune` does to callbacks beside it: the worst of them, and that of as many without it."""
    for database in ("sqlite", "postgresql"):
        with bench.milepost(database) as milepost:
            growth.fill(milepost.database_url, bench.count(10_000))
            _fatten(milepost.database_url)
            (name,) = milepost.jobs(1)

            def beats(milepost: Milepost = milepost, name: str = name) -> Load:
                return milepost.client.pace((heartbeat(name) for _ in range(PRUNE_RATE)), PRUNE_RATE)

            beats()  # the first commit writes back what the filling left in the -wal
            start, beside = time.monotonic(), []
            with ThreadPoolExecutor(1) as terminal:
                pruned = terminal.submit(milepost.flask, "prune", "--older-than", "1")
                while not pruned.done():
                    beside.append(beats())
            taken = time.monotonic() - start
            alone = [beats() for _ in beside]
        measure = f"prune, {database}"
        yield Figure(measure, pruned.result().stdout.strip(), taken, "s")
        worst = {}
        for kind, loads in (("without it", alone), ("beside it", beside)):
            times = [1000 * latency for load in loads for latency in load.latencies]
            worst[kind] = max(times)
            yield Figure(measure, f"a callback {kind}: p99", quantile(times, 0.99), "ms")
            yield Figure(measure, f"a callback {kind}: worst of {len(times)}", worst[kind], "ms")
            yield Figure(measure, f"a callback {kind}: errors", sum(load.errors for load in loads), "", "= 0")
        yield Figure(
            measure, "the worst is later by", worst["beside it"] - worst["without it"], "ms", "<= 50"
        )


def _fatten(database_url: str) -> None:
    """Of a tenth of the callbacks, the bodies become as large as may be."""
    engine = create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        large = "UPDATE callbacks SET body = replace(body, '{', :filling) WHERE id % 10 = 0"
        connection.execute(text(large), {"filling": "{" + " " * 60_000})
    engine.dispose()


def grown(bench: Bench) -> Figures:
    """A large database beside an empty one: medians of requests in turn."""
    for database in ("sqlite", "postgresql"):
        with bench.milepost(database) as empty, bench.milepost(database) as full:
            stored = growth.fill(full.database_url, max(int(100_000 * bench.scale), 10))
            for server in (empty, full):
                server.jobs(50)
            yield from _ratios(f"growth, {database}", stored, empty, full)


def _ratios(measure: str, stored: int, empty: Milepost, full: Milepost) -> Figures:
    operator = f"Authorization: Bearer {OPERATOR_TOKEN}"
    cookies = {server: _cookie(server) for server in (empty, full)}
    kinds: dict[str, Callable[[Milepost, int], bytes]] = {
        "callback, new job": lambda _, n: milestone(f"late-{n}", "provisioning"),
        "callback, heartbeat": lambda _, n: heartbeat("job-0"),
        "page": lambda server, _: request(server.path("job-1")),
        "fragment": lambda server, _: request(f"{server.path('job-1')}/steps"),
        "list": lambda server, _: request("/api/jobs?limit=50", operator),
        "list as a page": lambda server, _: request("/", cookies[server]),
    }
    yield Figure(measure, "callbacks in the database", stored, "")
    for kind, make in kinds.items():
        times: dict[Milepost, list[float]] = {empty: [], full: []}
        for turn in range(300):
            for server, taken in times.items():
                load = server.client.storm([make(server, turn)], 10, connections=1)
                assert not load.errors, f"{kind}: not answered with 200"
                taken += load.latencies
        small, large = (median(taken) * 1000 for taken in times.values())
        yield Figure(measure, f"{kind}: empty", small, "ms")
        yield Figure(measure, f"{kind}: grown", large, "ms")
        yield Figure(measure, f"{kind}: ratio", large / small, "x", "<= 1.25")
