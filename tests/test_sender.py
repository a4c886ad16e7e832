"""The sender: what it sends, whom it refuses, and that a run never depends on it."""

import contextlib
import hashlib
import hmac
import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SENDER = Path(__file__).parents[1] / ".github/actions/report-step/report_step.py"
KEY = "a key that only the two ends know"

Answer = Callable[[BaseHTTPRequestHandler], object]


@dataclass
class Receiver:
    """A server on loopback that keeps what it got; `answers` are used up, the last one stays."""

    answers: list[Answer]
    over: threading.Event = field(default_factory=threading.Event)
    got: "queue.Queue[tuple[bytes, str]]" = field(default_factory=queue.Queue)
    url: str = ""

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body, _ in list(self.got.queue)]


def answer(status: int, body: bytes = b"{}", **headers: str) -> Answer:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Close with RST: a linger time of zero drops what was not sent yet."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver([answer(200, b'{"received": true, "duplicate": false}')])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.got.put((body, self.headers["X-Signature"]))
            with contextlib.suppress(OSError):
                (state.answers.pop(0) if state.answers[1:] else state.answers[0])(self)

        def log_message(self, *_: object) -> None:
            pass

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/api/webhooks/github"
    yield state
    state.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def environment(**fields: str) -> dict[str, str]:
    run = {"GITHUB_RUN_ID": "7001", "GITHUB_RUN_ATTEMPT": "2", "RETRY_SECONDS": "3"}
    job = {"CALLBACK_SECRET": KEY, "JOB_ID": "job-1"}
    return {"PATH": os.environ["PATH"]} | run | job | fields


def send(**fields: str) -> str:
    """Run the sender as a workflow does and return its log."""
    done = subprocess.run(
        [sys.executable, "-I", SENDER],
        check=False,
        env=environment(**fields),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert KEY not in done.stdout
    return done.stdout


def test_sends_one_signed_callback_with_the_run_and_the_time(receiver: Receiver) -> None:
    log = send(
        CALLBACK_URL=receiver.url,
        STATUS="running",
        SERVER_ID="42",
        SERVER_IP="192.0.2.7",
        TAILSCALE_IP="100.64.0.7",
        ERROR="",
    )
    body, signature = receiver.got.get_nowait()
    digest = hmac.new(KEY.encode(), body, hashlib.sha256).hexdigest()
    fields = json.loads(body)
    assert signature.removeprefix("sha256=") == digest
    assert fields.pop("sent_at") > 1_700_000_000
    assert fields == {
        "job_id": "job-1",
        "status": "running",
        "server_id": "42",
        "server_ip": "192.0.2.7",
        "tailscale_ip": "100.64.0.7",
        "workflow_run_id": "7001",
        "run_attempt": "2",
    }
    assert (log, receiver.got.empty()) == ("", True)


def test_text_from_a_run_is_data_and_fits_the_receiver(receiver: Receiver) -> None:
    hostile = 'quote " newline \n $(id) {{ 1 }} \udcff '
    send(CALLBACK_URL=receiver.url, STATUS="failed", STEP="provision", ERROR=hostile + "é" * 50_000)
    (body,) = receiver.bodies()
    assert body["error"].startswith('quote " newline \n $(id) {{ 1 }} \ufffd é')
    assert len(body["error"]) == 2000


@pytest.mark.parametrize("key", ["", " \n"])
def test_refuses_to_sign_without_a_key_and_says_so(receiver: Receiver, key: str) -> None:
    log = send(CALLBACK_URL=receiver.url, CALLBACK_SECRET=key, STATUS="running")
    assert log.startswith("::warning") and "CALLBACK_SECRET is empty" in log
    assert receiver.got.empty()


@pytest.mark.parametrize(
    "url",
    ["", "ftp://127.0.0.1/", "file:///etc/passwd", "//127.0.0.1/", "http://", "http://[", "a\nb"],
)
def test_refuses_a_callback_url_that_is_not_http(url: str) -> None:
    assert send(CALLBACK_URL=url, STATUS="running").count("::warning") == 1


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://127.0.0.1/a b", "http://a..b"]
)
def test_an_address_nobody_can_have_is_not_tried_again(url: str) -> None:
    log = send(CALLBACK_URL=url, STATUS="running", RETRY_SECONDS="3600")
    assert log.count("::warning") == 1


@pytest.mark.parametrize(
    "allowed",
    [
        "https://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost",
        "https://milepost.example",
        "x",
    ],
)
def test_signs_nothing_for_a_receiver_outside_the_allowed_origin(receiver: Receiver, allowed: str) -> None:
    log = send(CALLBACK_URL=receiver.url, CALLBACK_ORIGIN=allowed, STATUS="running")
    assert "outside CALLBACK_ORIGIN" in log
    assert receiver.got.empty()


def test_a_name_before_an_at_sign_is_no_origin(receiver: Receiver) -> None:
    disguised = receiver.url.replace("127.0.0.1", "milepost.example@127.0.0.1")
    port = receiver.url.split(":")[2].split("/")[0]
    log = send(CALLBACK_URL=disguised, CALLBACK_ORIGIN=f"http://milepost.example:{port}", STATUS="running")
    assert "outside CALLBACK_ORIGIN" in log
    assert receiver.got.empty()


def test_signs_for_the_allowed_origin_whatever_its_path(receiver: Receiver) -> None:
    allowed = receiver.url.removesuffix("/api/webhooks/github").replace("http", "HTTP")
    assert send(CALLBACK_URL=receiver.url, CALLBACK_ORIGIN=allowed, STATUS="running") == ""
    assert len(receiver.bodies()) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_tries_again_when_the_receiver_may_recover(receiver: Receiver, status: int) -> None:
    receiver.answers.insert(0, answer(status))
    assert send(CALLBACK_URL=receiver.url, STATUS="provisioning", STEP="vm_created") == ""
    first, second = receiver.got.get_nowait(), receiver.got.get_nowait()
    assert first == second, "the same milestone at the same time, so a repeat is a duplicate"


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusal_is_final_and_its_reason_is_in_the_log(receiver: Receiver, status: int) -> None:
    receiver.answers[:] = [answer(status, b"100 % wrong\r\n::error::gotcha")]
    log = send(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS="3600")
    assert f"answered {status}: 100 %25 wrong%0D%0A::error::gotcha" in log
    assert log.count("\n") == 1
    assert len(receiver.bodies()) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_follows_no_redirect(receiver: Receiver, status: int) -> None:
    receiver.answers[:] = [answer(status, Location=receiver.url)]
    assert f"answered {status}" in send(CALLBACK_URL=receiver.url, STATUS="running")
    assert len(receiver.bodies()) == 1


def test_a_receiver_that_answers_500_for_ever_costs_a_warning(receiver: Receiver) -> None:
    receiver.answers[:] = [answer(500)]
    assert "running callback" in send(CALLBACK_URL=receiver.url, STATUS="running")
    assert len(receiver.bodies()) > 1


def test_a_receiver_that_resets_the_connection_is_tried_again(receiver: Receiver) -> None:
    receiver.answers.insert(0, reset)
    assert send(CALLBACK_URL=receiver.url, STATUS="failed", FAILED_STEP="configure") == ""
    assert len(receiver.bodies()) == 2


def test_gives_up_on_a_receiver_that_hangs(receiver: Receiver) -> None:
    receiver.answers[:] = [lambda _: receiver.over.wait()]
    log = send(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS="1")
    assert "gave no answer in 1 s" in log


def test_an_answer_that_trickles_in_does_not_stretch_the_bound(receiver: Receiver) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not receiver.over.wait(0.1):
            handler.wfile.write(b"x")

    receiver.answers[:] = [trickle]
    log = send(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS="1")
    assert "gave no answer" in log


def test_a_receiver_that_is_down_costs_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    log = send(CALLBACK_URL=f"http://127.0.0.1:{port}/", STATUS="provisioning", STEP="vm_created")
    assert log.startswith("::warning title=report-step::Milepost did not get the vm_created")


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "0"])
def test_a_bad_number_is_said_and_fails_nothing(receiver: Receiver, value: str) -> None:
    log = send(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS=value)
    assert "RETRY_SECONDS is not a number of seconds" in log


@contextlib.contextmanager
def beating(**fields: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-I", SENDER, "heartbeat"],
        env=environment(HEARTBEAT_SECONDS="0.2", RETRY_SECONDS="", **fields),
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_heartbeats_go_on_until_their_file_is_gone(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    file.touch()
    with beating(CALLBACK_URL=receiver.url, HEARTBEAT_FILE=str(file)) as process:
        beats = [json.loads(receiver.got.get(timeout=30)[0]) for _ in range(3)]
        file.unlink()
        assert process.wait(timeout=30) == 0
    assert {(beat["type"], beat["job_id"], beat["workflow_run_id"]) for beat in beats} == {
        ("heartbeat", "job-1", "7001")
    }
    assert all("status" not in beat for beat in beats)
    times = [beat["sent_at"] for beat in beats]
    assert times == sorted(set(times)), "each one newer, or it would be a duplicate"


def test_heartbeats_end_with_the_runner(receiver: Receiver) -> None:
    with (
        subprocess.Popen(["sleep", "600"]) as runner,
        beating(CALLBACK_URL=receiver.url, RUNNER_PID=str(runner.pid)) as process,
    ):
        receiver.got.get(timeout=30)
        runner.kill()
        runner.wait()
        assert process.wait(timeout=30) == 0


def test_heartbeats_survive_an_outage_and_say_it_once(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    file.touch()
    refused = [answer(401)] * 3
    receiver.answers[:] = [answer(200), *refused, answer(200)]
    with beating(CALLBACK_URL=receiver.url, HEARTBEAT_FILE=str(file)) as process:
        for _ in range(6):
            receiver.got.get(timeout=30)
        file.unlink()
        log, _ = process.communicate(timeout=30)
    assert log.count("did not get the heartbeat callback") == 1
