"""Wake-ups: every stream shows what any process was told, promptly, in order, and no oftener than useful."""

import json
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.events import Events
from tests.support.load import Client, heartbeat, milestone, workers_of
from tests.support.operator import signed_in
from tests.support.server import CALLBACKS, Serve, Server, new_job_id, sign, wait_until
from webapp.streams.hub import SHORTEST_INTERVAL
from webapp.streams.siblings import AT_REST_AFTER

COMMENT_EVERY = 20  # seconds, says the contract
GONE = 30  # clients
PROMPTLY = 10  # seconds on the busiest machine; unwoken, a stream compares what it shows every 20 s
STEPS = ("vm_created", "ansible_started", "ansible_complete")


@dataclass
class Resting:
    """Streams on which nothing happens while the other tests run, and since when."""

    events: Events
    over_http_1_0: socket.socket
    files: int  # that the server had open without those of the clients that are gone
    since: float


@pytest.fixture(scope="module", autouse=True)
def resting(server: Server) -> Iterator[Resting]:
    job_id = new_job_id()
    server.report(job_id, "provisioning")
    path = urlsplit(server.link(job_id)).path
    with (
        closing(server.events(job_id, timeout=COMMENT_EVERY)) as events,
        socket.create_connection(("127.0.0.1", server.port), COMMENT_EVERY) as old,
    ):
        assert events.next()["event"] == "steps"
        old.sendall(f"GET {path}/events HTTP/1.0\r\n\r\n".encode())
        files, since = server.open_files(), time.monotonic()
        with closing(Client(server.port)) as client:
            client.open_streams([path] * GONE)
        yield Resting(events, old, files, since)


@contextmanager
def watching(server: Server, job_ids: Iterable[str], times: int = 1) -> Iterator[Client]:
    """The streams of these jobs, each so often, open and with their first fragment."""
    with closing(Client(server.port)) as client:
        paths = [urlsplit(server.link(job_id)).path for job_id in job_ids]
        client.open_streams(paths * times)
        yield client


def all_show(client: Client, versions: dict[int, str]) -> None:
    """Wait until each of the client's streams has shown this version as its newest."""
    wait_until(lambda: {a.stream: a.version for a in client.listen(0.05)} == versions, PROMPTLY)


def version(server: Server, job_id: str) -> str:
    return str(server.page(job_id)["version"])


def a_connection_to_each_worker(server: Server) -> dict[int, HTTPConnection]:
    found: dict[int, HTTPConnection] = {}

    def look() -> bool:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        port = connection.sock.getsockname()[1]
        found.setdefault(workers_of([port], server.workers(), server.port)[port], connection)
        return found.keys() == set(server.workers())

    wait_until(look)
    return found


def test_the_streams_of_every_worker_show_what_any_worker_was_told(serve: Serve, job_id: str) -> None:
    server = serve(WEB_CONCURRENCY="2")
    server.report(job_id, "provisioning")
    path = urlsplit(server.link(job_id)).path

    with closing(Client(server.port)) as client:

        def spread() -> bool:
            client.open_streams([path])
            ports = client.stream_ports().values()
            return set(workers_of(ports, server.workers(), server.port).values()) == set(server.workers())

        wait_until(spread)
        streams = client.stream_ports()
        workers = a_connection_to_each_worker(server)
        for step, connection in zip(STEPS, workers.values(), strict=False):
            body = json.dumps({"job_id": job_id, "status": "provisioning", "step": step}).encode()
            connection.request("POST", CALLBACKS, body, {"X-Signature": sign(body)})
            assert connection.getresponse().status == 200
            all_show(client, dict.fromkeys(streams, version(server, job_id)))


def test_the_streams_of_two_servers_show_what_either_was_told(
    server: Server, serve: Serve, job_id: str
) -> None:
    other = serve(DATABASE_URL=server.database_url)
    server.report(job_id, "provisioning")
    with watching(server, [job_id]) as here, watching(other, [job_id]) as there:
        for told, step in zip((server, other, server), STEPS, strict=True):
            told.report(job_id, step)
            for client in (here, there):
                all_show(client, {0: version(server, job_id)})


@pytest.mark.slow
def test_a_server_at_rest_hears_what_another_was_told(server: Server, serve: Serve, job_id: str) -> None:
    other = serve(DATABASE_URL=server.database_url)
    server.report(job_id, "provisioning")
    with watching(other, [job_id]) as client:
        client.listen(AT_REST_AFTER + 1)
        server.report(job_id, "vm_created")
        all_show(client, {0: version(server, job_id)})


@pytest.mark.slow
def test_no_change_is_lost_however_fast_they_come(serve: Serve) -> None:
    server = serve(WEB_CONCURRENCY="2")
    job_ids = [new_job_id() for _ in range(30)]
    for job_id in job_ids:
        server.report(job_id, "provisioning")
    with watching(server, job_ids, times=2) as client:
        for step in (*STEPS, "running"):
            told = [milestone(job_id, step) for job_id in job_ids]
            told += [heartbeat(job_id, time.time() + n) for n in range(4) for job_id in job_ids]
            load = client.storm(told, 60)
            assert (len(load.latencies), load.errors) == (len(told), 0)
            newest = [version(server, job_id) for job_id in job_ids]
            all_show(client, dict(enumerate(newest * 2)))


@pytest.mark.one_database
def test_a_burst_of_changes_is_few_frames_and_the_newest_of_them(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    with watching(server, [job_id]) as client:
        client.arrivals.clear()
        load = client.storm([heartbeat(job_id, time.time() + n, note=f"{n}") for n in range(200)], 60)
        assert (len(load.latencies), load.errors) == (200, 0)
        all_show(client, {0: version(server, job_id)})
        assert len(client.arrivals) <= 3 + load.seconds / SHORTEST_INTERVAL


@pytest.mark.parametrize("meanwhile", ["nothing", "heartbeat", "vm_created"])
def test_a_stream_that_joins_later_is_shown_the_state_at_once(
    server: Server, job_id: str, meanwhile: str
) -> None:
    """The frame of a single stream keeps no body: the next stream needs it, and the first one no second."""
    server.report(job_id, "provisioning")
    with closing(server.events(job_id, timeout=PROMPTLY)) as first:
        shown = [first.next()]
        for _ in range(3):
            if meanwhile != "nothing":
                server.report(job_id, meanwhile)
            with closing(server.events(job_id, timeout=PROMPTLY)) as second:
                assert second.next()["id"] == version(server, job_id)
        server.report(job_id, "ansible_started")
        while shown[-1]["id"] != version(server, job_id):
            shown.append(first.next())
        assert all("data-version" in event["data"] for event in shown)
        assert len(shown) == len({event["id"] for event in shown}) == (3 if meanwhile == "vm_created" else 2)


def test_streams_that_join_while_the_job_changes_are_all_shown_its_states(
    server: Server, job_id: str
) -> None:
    server.report(job_id, "provisioning")
    paths = [urlsplit(server.link(job_id)).path]
    with closing(Client(server.port)) as client:
        for n in range(20):
            client.storm([heartbeat(job_id, time.time() + n / 10, note=f"{n % 3}")], 10)
            client.open_streams(paths)  # which waits for its first fragment
        all_show(client, dict.fromkeys(range(20), version(server, job_id)))


@pytest.mark.one_database
def test_silence_is_shown_where_a_stream_joined_between_two_changes(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="1", LOST_AFTER="60")
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    with ExitStack() as clients:
        streams = []
        for n in range(20):
            server.report(job_id, "heartbeat", note=f"{n}")
            server.report(job_id, "heartbeat", note=f"{n}, again")
            streams.append(clients.enter_context(closing(Events(f"{link}/events", timeout=10))))
        for events in streams:
            while 'data-condition="quiet"' not in events.next()["data"]:
                pass


@pytest.mark.one_database
def test_silence_alone_is_shown_and_so_is_its_end(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="0.5", LOST_AFTER="1")
    server.report(job_id, "provisioning")
    with closing(server.events(job_id)) as events:
        shown = [events.next() for _ in range(3)]
        for frame, condition in zip(shown, ("live", "quiet", "lost"), strict=True):
            assert f'data-condition="{condition}"' in frame["data"]
        server.report(job_id, "heartbeat")
        assert 'data-condition="live"' in events.next()["data"]


@pytest.mark.one_database
def test_a_stream_on_a_job_that_is_over_says_so_and_ends(server: Server, job_id: str) -> None:
    server.report(job_id, "failed", error="no room")
    with closing(server.events(job_id)) as events:
        assert [event["event"] for event in events] == ["steps", "done"]


@pytest.mark.slow
def test_a_stream_at_rest_says_that_it_is_still_there(resting: Resting) -> None:
    left = max(COMMENT_EVERY - (time.monotonic() - resting.since), 1)
    resting.events.be_patient(left)
    assert next(iter(resting.events)).keys() == {""}  # a comment alone
    lines = list(takewhile(lambda line: line != b": still here\n", resting.over_http_1_0.makefile("rb")))
    body = lines[lines.index(b"\r\n") + 1 :]
    assert body[0] == b"event: steps\n"
    assert not any(b"\r" in line for line in body)  # HTTP/1.0 knows no chunks


@pytest.mark.slow
def test_a_stream_whose_client_is_gone_is_let_go_of(server: Server, resting: Resting) -> None:
    wait_until(lambda: server.open_files() < resting.files + GONE / 2, within=2 * COMMENT_EVERY + 5)


def test_a_clock_that_is_set_back_stops_no_stream_and_signs_nobody_out(serve: Serve, job_id: str) -> None:
    server = serve(CALLBACK_MAX_SKEW="0")
    server.stop()
    server.config = "python:tests.support.set_back"
    server.start()
    server.report(job_id, "provisioning")
    operator = signed_in(server)
    with closing(server.events(job_id)) as events, closing(operator.listen()) as listed:
        assert (events.next()["event"], listed.next()["event"]) == ("steps", "jobs")
        Path(server.environ["HOME"], "set-back").touch()
        assert set(next(iter(events))) == {""}  # a comment
        server.report(job_id, "vm_created")
        events.be_patient(PROMPTLY)
        assert 'data-step="installing" data-state="active"' in events.next()["data"]
        assert listed.next()["event"] == "jobs"
    assert job_id in operator.see()


@pytest.mark.slow
def test_the_operators_list_hears_of_silence_too(serve: Serve, job_id: str) -> None:
    server = serve(QUIET_AFTER="2", LOST_AFTER="4")
    server.report(job_id, "provisioning")
    with closing(signed_in(server).listen()) as events:
        events.be_patient(PROMPTLY)
        for condition in ("quiet", "lost"):
            while server.page(job_id)["condition"] != condition:
                assert events.next()["event"] == "jobs"
