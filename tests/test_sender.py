"""The sender: what it sends, whom it refuses, and that a run never depends on it."""

import contextlib
import hashlib
import hmac
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.receiver import KEY, SENDER, Receiver, answer, environment, receiving, reset, send
from tests.support.server import wait_until

pytestmark = pytest.mark.one_database


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


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
    assert (log, receiver.got.empty()) == ("Reported running\n", True)


def test_text_from_a_run_is_data_and_fits_the_receiver(receiver: Receiver) -> None:
    hostile = ' quote " newline \n $(id) {{ 1 }} \udcff '
    send(CALLBACK_URL=receiver.url, STATUS="failed", STEP="provision", ERROR="é" * 50_000 + hostile)
    (body,) = receiver.bodies()
    assert body["error"].endswith('é quote " newline \n $(id) {{ 1 }} \ufffd')
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
    assert send(CALLBACK_URL=receiver.url, CALLBACK_ORIGIN=allowed, STATUS="running") == "Reported running\n"
    assert len(receiver.bodies()) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_tries_again_when_the_receiver_may_recover(receiver: Receiver, status: int) -> None:
    receiver.answers.insert(0, answer(status))
    assert (
        send(CALLBACK_URL=receiver.url, STATUS="provisioning", STEP="vm_created") == "Reported vm_created\n"
    )
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
    assert send(CALLBACK_URL=receiver.url, STATUS="failed", FAILED_STEP="configure") == "Reported failed\n"
    assert len(receiver.bodies()) == 2


def test_gives_up_on_a_receiver_that_hangs(receiver: Receiver) -> None:
    receiver.answers[:] = [lambda _: receiver.over.wait()]
    log = send(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS="1")
    assert "gave no answer in 1 s" in log


def test_an_interrupted_sender_fails_nothing_either(receiver: Receiver) -> None:
    receiver.answers[:] = [lambda _: receiver.over.wait()]
    fields = environment(CALLBACK_URL=receiver.url, STATUS="running", RETRY_SECONDS="60")
    with subprocess.Popen([sys.executable, "-I", SENDER], env=fields, stdout=subprocess.PIPE) as process:
        receiver.got.get(timeout=30)
        process.send_signal(signal.SIGINT)
        log, _ = process.communicate(timeout=30)
    assert (process.returncode, b"interrupted" in log) == (0, True)


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


def beats_of(folder: Path) -> list[Path]:
    """Where /proc shows the heartbeats whose log is in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HEARTBEAT_FILE={folder}".encode() in (process / "environ").read_bytes():
                found.append(process)
    return found


@pytest.fixture
def job(receiver: Receiver, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job whose heartbeats do not outlive the test."""
    with subprocess.Popen(["sleep", "600"]) as runner:
        yield {
            "CALLBACK_URL": receiver.url,
            "RUNNER_TEMP": str(tmp_path),
            "RUNNER_PID": str(runner.pid),
            "HEARTBEAT_SECONDS": "0.1",
        }
        runner.kill()
    wait_until(lambda: not beats_of(tmp_path))


def test_a_status_beside_the_heartbeat_is_sent(
    receiver: Receiver, job: dict[str, str], tmp_path: Path
) -> None:
    assert send(**job, HEARTBEAT="start", STATUS="in_progress") == "Reported provisioning\n"
    wait_until(lambda: receiver.got.qsize() >= 3)
    log = send(**job, HEARTBEAT="stop", STATUS="success")
    assert log.startswith("Reported heartbeat\n") and log.endswith("Reported running\n")
    wait_until(lambda: not beats_of(tmp_path))
    statuses = [body.get("status") or body["type"] for body in receiver.bodies()]
    assert statuses[:2] == ["provisioning", "heartbeat"] and "running" in statuses


def test_no_later_step_finds_the_key_in_a_heartbeat(
    receiver: Receiver, job: dict[str, str], tmp_path: Path
) -> None:
    send(**job, HEARTBEAT="start")
    receiver.got.get(timeout=30)
    (process,) = beats_of(tmp_path)
    for place in ("environ", "cmdline"):
        assert KEY.encode() not in (process / place).read_bytes()


def test_a_second_start_replaces_the_first(receiver: Receiver, job: dict[str, str], tmp_path: Path) -> None:
    send(**job, HEARTBEAT="start")
    (first,) = wait_until(lambda: beats_of(tmp_path))
    send(**job, HEARTBEAT="start")
    wait_until(lambda: first not in beats_of(tmp_path))
    assert len(beats_of(tmp_path)) == 1
