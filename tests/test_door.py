"""The server's door: whatever a client does or leaves undone, everybody else is answered."""

import json
import socket
import time
from contextlib import ExitStack, closing

import pytest
import requests

from tests.support.server import CALLBACKS, Serve, Server, sign, wait_until


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
