"""The server's door: whatever a client does or leaves undone, everybody else is answered."""

import itertools
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from tests.support.load import Client, request
from tests.support.server import CALLBACKS, ROOT, Serve, Server, sign, wait_until

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
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 3
        for events in streams:
            assert list(events) == []  # the chunked answer is whole: no proxy logs an error
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
        assert time.monotonic() - start < 3
        assert to_the_end(never_ends) == b""
    server.start()
    assert server.job(job_id)["status"] == "provisioning"


def test_after_an_update_a_hup_serves_the_new_code_and_loses_no_request(
    new_database: Callable[[], str], tmp_path: Path, job_id: str
) -> None:
    for part in ("webapp", "templates", "static"):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / "wsgi.py", tmp_path)
    server = Server(tmp_path, new_database())
    server.root = tmp_path
    server.flask("db", "upgrade")
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
    assert "Traceback" not in server.log.read_text().partition("not reloaded")[2]


# What a client says of itself


def test_no_forwarder_header_is_believed(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    headers = {"SCRIPT_NAME": "/p", "PATH_INFO": "/healthz", "Script-Name": "/p", "X-Forwarded-Prefix": "/p"}
    assert requests.get(server.link(job_id), headers=headers, timeout=30).status_code == 200
    for said in ({"X-Forwarded-Proto": "https", "X-Forwarded-Protocol": "x"}, {"X-Forwarded-Ssl": "on"}):
        answer = server.post(b"{}", **said)
        assert answer.status_code == 400 and "job_id" in answer.json()["error"]


# The log


def dead_pipe() -> int:
    """The end of a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "stderr", [dead_pipe, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["gone", "full"]
)
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


def test_a_log_reader_that_stalls_holds_up_nobody_and_learns_what_it_missed(serve: Serve) -> None:
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
