"""The server's door: whatever a client does or leaves undone, everybody else is answered."""

import itertools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

import webapp.worker
from tests.support.databases import Databases
from tests.support.load import Client, request
from tests.support.server import CALLBACKS, ROOT, Serve, Server, free_port, sign, wait_until
from webapp.connections import PAUSE
from webapp.worker import ARRIVES_WITHIN, DRAINED_WITHIN

pytestmark = pytest.mark.one_database


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    """A connection on which these bytes were sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(sent)
    return connection


def to_the_end(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    answer = b""
    while part := connection.recv(65_536):
        answer += part
    return answer


def head(path: str, length: int, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: milepost", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


# Stopping


def test_at_sigterm_streams_and_idle_connections_end_at_once(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    with ExitStack() as clients:
        streams = [clients.enter_context(closing(server.events(job_id))) for _ in range(50)]
        idle = [clients.enter_context(connect(server)) for _ in range(50)]
        for events in streams:
            events.next()
        server.stop()
        for events in streams:
            said = [*events]  # to the end: the chunked answer is whole, and no proxy logs an error
            assert all(event.keys() == {""} for event in said), "a comment, where opening took long"
        for connection in idle:
            assert connection.recv(1) == b""


def test_what_has_begun_at_sigterm_is_answered_within_three_seconds(serve: Serve, job_id: str) -> None:
    server = serve()
    body = json.dumps({"job_id": job_id, "status": "provisioning"}).encode()
    with (
        connect(server, head(CALLBACKS, len(body), f"X-Signature: {sign(body)}") + body[:9]) as begun,
        connect(server, head("/sign-in", 9) + b"t") as never_ends,
    ):
        wait_until(lambda: server.is_up())
        start = time.monotonic()
        server.stop(wait=False)
        wait_until(lambda: not server.is_up())
        begun.sendall(body[9:])
        assert b" 200 OK" in (answer := to_the_end(begun))
        assert b"Connection: close" in answer
        server.stop()
        assert time.monotonic() - start < 5  # 1.9 s on a machine with nothing else to do
        assert to_the_end(never_ends) == b""
    server.start()
    assert server.job(job_id)["status"] == "provisioning"


@pytest.mark.slow
def test_after_an_update_a_hup_serves_the_new_code_and_loses_no_request(
    database: Databases, tmp_path: Path, job_id: str
) -> None:
    for part in ("webapp", "templates", "static"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "wsgi.py", tmp_path)
    server = Server(tmp_path, database.migrated())
    server.root = tmp_path
    server.start()
    (old,) = server.workers()
    for name in ("routes/middleware.py", "worker.py", "logs.py", "config.py"):
        with (tmp_path / "webapp" / name).open("a") as file:
            file.write("\nprint(__name__, file=__import__('sys').stdout, flush=True)\n")
    broken = tmp_path / "webapp" / "storage" / "tables.py"
    right = broken.read_text()
    broken.write_text("this is no Python")
    os.kill(server.pid, signal.SIGHUP)
    wait_until(lambda: "not reloaded" in server.log.read_text())
    assert server.workers() == [old] and server.is_up()
    broken.write_text(right)
    os.kill(server.pid, signal.SIGHUP)
    for _ in itertools.takewhile(lambda _: old in server.workers(), itertools.count()):
        assert server.report(job_id, "heartbeat") is False  # each on a connection of its own
    fresh = {"webapp.routes.middleware", "webapp.worker", "webapp.logs", "webapp.config"}
    wait_until(lambda: fresh <= set(server.log.read_text().splitlines()))
    server.stop()
    assert "Traceback" not in server.log.read_text()


# What a client says of itself


def test_no_forwarder_header_is_believed(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    headers = {"SCRIPT_NAME": "/p", "PATH_INFO": "/healthz", "Script-Name": "/p", "X-Forwarded-Prefix": "/p"}
    assert requests.get(server.link(job_id), headers=headers, timeout=30).status_code == 200
    for said in ({"X-Forwarded-Proto": "https", "X-Forwarded-Protocol": "x"}, {"X-Forwarded-Ssl": "on"}):
        answer = server.post(b"{}", **said)
        assert answer.status_code == 400 and "job_id" in answer.json()["error"]


def test_a_client_behind_a_proxy_is_its_address_without_the_port(serve: Serve) -> None:
    server = serve(TRUSTED_PROXIES="1")
    said = ("203.0.113.7:4711", "[2001:db8::7]:4711", "[2001:db8::7]", "2001:db8::7", "203.0.113.7")
    for client in said:
        server.post(b"{}", **{"X-Forwarded-For": client})
    log = [json.loads(line) for line in server.log.read_text().splitlines()]
    heard = [line["address"] for line in log if line["event"] == "request" and line["status"] == 400]
    assert heard == ["203.0.113.7", "2001:db8::7", "2001:db8::7", "2001:db8::7", "203.0.113.7"]


# Streams


@pytest.mark.parametrize("path", ["/events", "/steps", ""])
def test_a_callback_does_not_stand_behind_the_watchers_that_came_before(
    serve: Serve, job_id: str, path: str
) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    asked = request(urlsplit(server.link(job_id)).path + path)
    (worker,) = server.workers()
    with ExitStack() as clients:
        os.kill(worker, signal.SIGSTOP)  # so that all of them are there when it looks
        watchers = [clients.enter_context(connect(server, asked)) for _ in range(600)]
        body = json.dumps({"job_id": job_id, "status": "provisioning", "step": "vm_created"}).encode()
        whole = head(CALLBACKS, len(body), f"X-Signature: {sign(body)}", "Connection: close") + body
        late = clients.enter_context(connect(server, whole))
        os.kill(worker, signal.SIGCONT)
        assert b" 200 OK" in to_the_end(late)
        poll = select.poll()
        for watcher in watchers:
            poll.register(watcher, select.POLLIN)
        assert len(poll.poll(0)) < 400


def test_a_burst_that_filled_a_turn_leaves_no_request_waiting(serve: Serve) -> None:
    server = serve()
    (worker,) = server.workers()
    with ExitStack() as clients:
        os.kill(worker, signal.SIGSTOP)
        burst = [clients.enter_context(connect(server)) for _ in range(webapp.worker.Server.max_accept)]
        os.kill(worker, signal.SIGCONT)
        taken = []
        for _ in range(20):
            asked_at = time.monotonic()
            burst[0].sendall(request("/nothing"))
            assert b" 404 " in burst[0].recv(65_536)
            taken.append(time.monotonic() - asked_at)
    assert min(taken) < PAUSE  # each of them took longer


@pytest.mark.slow
def test_streams_leave_connections_for_everything_else(serve: Serve, job_id: str) -> None:
    server = serve()
    server.stop()
    server.limits = ("prlimit", "--nofile=128:128")
    server.start()
    server.report(job_id, "provisioning")
    path = urlsplit(server.link(job_id)).path
    with ExitStack() as clients:
        opened = [clients.enter_context(connect(server, request(f"{path}/events"))) for _ in range(120)]
        answers = [connection.recv(15) for connection in opened]
        assert answers.count(b"HTTP/1.1 200 OK") > 50 and b"HTTP/1.1 503 SE" in answers
        assert server.report(job_id, "vm_created") is False
        assert server.is_up()


@pytest.mark.slow
def test_the_more_streams_the_later_a_page_comes_back(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    with ExitStack() as streams:
        opened = [streams.enter_context(closing(server.events(job_id))) for _ in range(100)]
        waits = [int(events.next()["retry"]) for events in opened]
    assert all(1000 <= wait < 1000 + 1000 * 100 for wait in waits)
    assert len(set(waits)) > 10 and max(waits) > waits[0]


def test_a_stream_of_an_unknown_link_is_a_404(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    assert server.api(f"/api/jobs/{job_id}/revoke", method="POST").ok
    assert requests.get(f"{link}/events", timeout=30).status_code == 404
    assert requests.get(f"{link}x/events", timeout=30).status_code == 404


# The log


def dead_pipe() -> int:
    """The end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "stderr", [dead_pipe, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["gone", "full"]
)
@pytest.mark.slow
def test_a_log_that_is_gone_or_full_from_the_start_is_survived(
    serve: Serve, job_id: str, stderr: Callable[[], int]
) -> None:
    server = serve()
    server.stop()
    log = stderr()
    server.start(stderr=log)
    os.close(log)
    assert server.report(job_id, "provisioning") is False
    server.stop()


@pytest.mark.slow
def test_a_closed_stderr_is_survived_at_the_start(tmp_path: Path, job_id: str) -> None:
    for part in ("webapp", "templates", "static", ".github/actions"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "wsgi.py", tmp_path)
    port, key = free_port(), "the callback key of this test"
    environ = {"PATH": os.environ["PATH"], "PORT": str(port), "GITHUB_CALLBACK_SECRET": key}
    command = ["sh", "-c", 'exec "$0" -m webapp 2>&-', sys.executable]
    process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL)
    try:
        url, body = f"http://127.0.0.1:{port}", f'{{"job_id": "{job_id}", "status": "provisioning"}}'.encode()

        def is_taken() -> bool:
            with suppress(requests.ConnectionError):
                headers = {"X-Signature": sign(body, key)}
                return requests.post(url + CALLBACKS, data=body, headers=headers, timeout=30).ok
            return False

        wait_until(is_taken, within=60)
        assert requests.get(f"{url}/nothing", timeout=30).status_code == 404  # which would be a line
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_log_reader_that_stalls_holds_up_nobody_and_hears_of_the_gap(serve: Serve) -> None:
    server = serve()
    server.stop()
    reading, writing = os.pipe()
    server.start(stderr=writing)
    os.close(writing)
    ask = request("/nothing")
    with closing(Client(server.port)) as client:
        load = client.storm([ask] * 3000, 30)
    assert load.errors == 3000  # all of them a 404
    written = b""
    while b"log lines were dropped" not in written:
        written += os.read(reading, 65_536)
    os.close(reading)
    lines = [json.loads(line) for line in written.splitlines()]
    (dropped,) = (line["count"] for line in lines if line["event"] == "log lines were dropped")
    assert len([line for line in lines if line["event"] == "request"]) + dropped == 3000


# Half-sent requests


@pytest.mark.parametrize(
    "half",
    [
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        head("/sign-in", 999) + b"t",
        head("/api/jobs", 999),
        head("/nothing", 999),
        head(CALLBACKS, 999) + b"{",
        head(CALLBACKS, 999, "X-GitHub-Event: push") + b"{",
        b"POST /sign-in HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\nab",
    ],
)
def test_a_half_sent_request_is_let_go_at_every_door(hasty: Server, half: bytes) -> None:
    start, answer = time.monotonic(), b""
    with connect(hasty, half) as connection, suppress(OSError):
        while not answer.endswith(b"closed") and time.monotonic() < start + 10:
            connection.sendall(b"x")  # a byte now and then buys no time
            if select.select([connection], [], [], 0.1)[0]:
                answer += connection.recv(65_536) or b"closed"
    assert 0.9 < time.monotonic() - start < 5
    assert b" 200 OK" not in answer


@pytest.fixture(scope="module")
def hasty(_serve: Serve) -> Iterator[Server]:
    """A Milepost that gives a request one second to arrive."""
    server = _serve(GITHUB_WEBHOOK_SECRET="the webhook key of the tests")
    server.stop()
    server.config = "python:tests.support.hasty"
    server.start()
    yield server
    server.stop()


def test_the_deadlines_together_are_below_those_of_the_contract() -> None:
    assert ARRIVES_WITHIN + DRAINED_WITHIN < 30


@pytest.mark.slow
def test_half_sent_requests_of_one_address_make_way_for_whole_ones(serve: Serve, job_id: str) -> None:
    server = serve()
    server.stop()
    server.limits = ("prlimit", "--nofile=256:256")
    server.start()
    with ExitStack() as clients:
        for n in range(400):
            clients.enter_context(connect(server, head("/sign-in", 9) + b"t"))
            if n % 20 == 0:
                start = time.monotonic()
                server.report(job_id, "heartbeat")
                assert server.is_up()
                assert time.monotonic() - start < 2
        assert server.open_files() < 256
    assert "no connection can be accepted" not in server.log.read_text()


def test_running_out_of_files_is_one_line_and_passes_by_itself(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    (worker,) = server.workers()
    limit = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    with ExitStack() as clients:
        streams = [clients.enter_context(closing(server.events(job_id))) for _ in range(20)]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (10, limit[1]))
        refused = connect(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        wait_until(lambda: "no connection can be accepted" in server.log.read_text())
        assert select.select([refused], [], [], 0.5)[0] == []
        resource.prlimit(worker, resource.RLIMIT_NOFILE, limit)
        start = time.monotonic()
        assert b" 200 OK" in to_the_end(refused)
        assert time.monotonic() - start < 1
        assert server.report(job_id, "vm_created") is False
        for events in streams:
            assert events.next()["event"] == "steps"
    assert server.log.read_text().count("no connection can be accepted") == 1


# Bodies


@pytest.mark.parametrize("path", [CALLBACKS, "/sign-in", "/api/jobs"])
def test_a_client_that_waits_for_100_continue_is_told_to_go_on(server: Server, path: str) -> None:
    with connect(server, head(path, 2, "Expect: 100-continue")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert connection.recv(100).startswith(b"HTTP/1.1 40")


def test_a_delivery_is_not_read_where_no_key_is_set(server: Server) -> None:
    with connect(server, head(CALLBACKS, 2**20, "X-GitHub-Event: push")) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")  # nothing of the body was sent


def test_a_client_that_pipelines_without_end_keeps_nobody_waiting(server: Server, job_id: str) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3000)
        start = time.monotonic()
        for _ in range(5):
            assert requests.get(f"{server.url}/healthz", timeout=30).ok
        assert time.monotonic() - start < 1
