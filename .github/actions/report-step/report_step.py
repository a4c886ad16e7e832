"""Report a step of a workflow run to Milepost: one signed callback, or heartbeats.

    python3 report_step.py              one callback, made of the environment
    python3 report_step.py heartbeat    a sign of life every HEARTBEAT_SECONDS (60)

Environment:
    CALLBACK_SECRET     the key; nothing is signed without one
    CALLBACK_URL        http(s), and within CALLBACK_ORIGIN where that is set
    JOB_ID, STATUS, STEP, FAILED_STEP, ERROR, SERVER_ID, SERVER_IP, TAILSCALE_IP
                        the fields; an empty one is left out
    GITHUB_RUN_ID, GITHUB_RUN_ATTEMPT
                        GitHub's own; they say which attempt reports
    RETRY_SECONDS       how long to keep trying: 120 for `running` and `failed`, which
                        end an attempt; 10 for the rest, which any later one implies
    HEARTBEAT_FILE      heartbeats end when this file is gone
    RUNNER_PID          heartbeats end when this process is gone (POSIX only)

The exit code is 0 whatever happens: a run must not depend on who watches it. What could
not be delivered is said in the log, as a GitHub warning.

Every try signs and sends the same body. `sent_at` stays the time of the milestone, so two
minutes of tries keep well within the receiver's default CALLBACK_MAX_SKEW of 300 s. A
redirect is never followed: it could carry the callback out of CALLBACK_ORIGIN.
"""

import hashlib
import hmac
import json
import os
import sys
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection, InvalidURL
from pathlib import Path
from threading import Thread
from urllib.parse import SplitResult, urlsplit

CONNECT_SECONDS = 3.0
TRY_SECONDS = 10.0
END_SECONDS = 120.0
HEARTBEAT_SECONDS = 60.0
LONGEST_JOB_SECONDS = 6 * 3600.0  # GitHub's limit for a job on its own runners
ERROR_LENGTH = 2000  # what Milepost keeps
DEFAULT_PORTS = {"http": 80, "https": 443}
FIELDS = ["JOB_ID", "STATUS", "STEP", "FAILED_STEP", "ERROR"]
FIELDS += ["SERVER_ID", "SERVER_IP", "TAILSCALE_IP"]


class DeliveryError(Exception):
    """A callback did not arrive; the message says why."""


class RefusedError(DeliveryError):
    """It will not arrive however often it is tried."""


def setting(name: str) -> str:
    """Return a variable as text that UTF-8 can carry, "" where it is not set."""
    return os.fsencode(os.environ.get(name, "")).decode(errors="replace").strip()


def seconds(name: str, default: float) -> float:
    """Return a variable as a positive number of seconds."""
    text = setting(name)
    try:
        value = float(text or default)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise RefusedError(f"{name} is not a number of seconds: {text!r}")
    return value


def origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port, as RFC 6454 compares them."""
    return url.scheme, url.hostname, url.port or DEFAULT_PORTS.get(url.scheme)


def receiver() -> SplitResult:
    """Return CALLBACK_URL once it is known to be one that may get signatures."""
    address, allowed = setting("CALLBACK_URL"), setting("CALLBACK_ORIGIN")
    try:
        url = urlsplit(address)
        if url.scheme not in DEFAULT_PORTS or not url.hostname or address.split() != [address]:
            raise RefusedError(f"callback URL is not an http(s) address: {address!r}")
        if allowed and origin(url) != origin(urlsplit(allowed)):
            raise RefusedError(f"callback URL {address!r} is outside CALLBACK_ORIGIN {allowed!r}")
    except ValueError as broken:
        raise RefusedError(f"callback URL {address!r}: {broken}") from broken
    return url


def callback(**fields: str) -> bytes:
    """Return the body of a callback that happens now."""
    run = {
        "workflow_run_id": setting("GITHUB_RUN_ID"),
        "run_attempt": setting("GITHUB_RUN_ATTEMPT"),
    }
    present = {name: value for name, value in (fields | run).items() if value}
    return json.dumps(present | {"sent_at": round(time.time(), 3)}).encode()


def signature(body: bytes) -> str:
    """Return the value of X-Signature for a body."""
    key = setting("CALLBACK_SECRET")
    if not key:
        raise RefusedError("CALLBACK_SECRET is empty: is the repository secret set?")
    return "sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


def post(url: SplitResult, body: bytes) -> tuple[int, str]:
    """Send a body; return the status and the beginning of what a refusal says."""
    connect = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = connect(url.hostname or "", url.port, timeout=CONNECT_SECONDS)
    headers = {"Content-Type": "application/json", "X-Signature": signature(body)}
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    try:
        connection.connect()
        connection.sock.settimeout(TRY_SECONDS)
        connection.request("POST", target, body, headers)
        response = connection.getresponse()
        said = b"" if response.status == 200 else response.read(300)
        return response.status, said.decode(errors="replace")
    finally:
        connection.close()


def attempt(url: SplitResult, body: bytes, limit: float) -> None:
    """Send a body in at most `limit` seconds, or raise DeliveryError.

    A thread keeps the bound: a socket's timeout covers neither a name lookup nor an
    answer that trickles in byte by byte.
    """
    outcome: list[tuple[int, str] | Exception] = []

    def work() -> None:
        try:
            outcome.append(post(url, body))
        except (OSError, HTTPException, ValueError, RefusedError) as problem:
            outcome.append(problem)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    match outcome:
        case [(200, _)]:
            return
        case [(408 | 429 as status, _)]:
            raise DeliveryError(f"{url.netloc} answered {status}")
        case [(int(status), said)] if 300 <= status < 500:
            raise RefusedError(f"{url.netloc} answered {status}: {said}")
        case [(status, _)]:
            raise DeliveryError(f"{url.netloc} answered {status}")
        case [RefusedError() | ValueError() | InvalidURL() as problem]:
            raise RefusedError(str(problem))
        case [problem]:
            raise DeliveryError(f"{url.netloc}: {problem or type(problem).__name__}")
    raise DeliveryError(f"{url.netloc} gave no answer in {limit:.0f} s")


def deliver(body: bytes, patience: float) -> None:
    """Try with growing pauses until delivered, refused or out of patience (seconds)."""
    url, deadline, pause = receiver(), time.monotonic() + patience, 1.0
    while True:
        try:
            return attempt(url, body, min(TRY_SECONDS, deadline - time.monotonic()))
        except RefusedError:
            raise
        except DeliveryError:
            if time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        pause *= 2


def report() -> None:
    """Send the one callback that the environment describes."""
    fields = {name.lower(): setting(name) for name in FIELDS}
    fields["error"] = fields["error"][:ERROR_LENGTH]
    ends = fields["status"] in {"running", "failed"}
    deliver(callback(**fields), seconds("RETRY_SECONDS", END_SECONDS if ends else TRY_SECONDS))


def wanted(file: str, runner: str) -> bool:
    """Say whether the run that asked for heartbeats is still there."""
    try:
        if runner.isdecimal():
            os.kill(int(runner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    return not file or Path(file).exists()


def heartbeat() -> None:
    """Send heartbeats until nobody wants them; one warning for each outage."""
    file, runner = setting("HEARTBEAT_FILE"), setting("RUNNER_PID")
    interval = seconds("HEARTBEAT_SECONDS", HEARTBEAT_SECONDS)
    start, beats, heard = time.monotonic(), 1, True
    while wanted(file, runner) and time.monotonic() < start + LONGEST_JOB_SECONDS:
        if time.monotonic() < start + beats * interval:
            time.sleep(min(1.0, interval))
            continue
        beats += 1
        try:
            deliver(callback(job_id=setting("JOB_ID"), type="heartbeat"), TRY_SECONDS)
            heard = True
        except DeliveryError as problem:
            if heard:
                warn("heartbeat", problem)
            heard = False


def warn(what: str, problem: DeliveryError) -> None:
    """Print a GitHub warning on one line, whatever a receiver put into it.

    https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    """
    text = f"Milepost did not get the {what} callback: {problem}"
    for character, escape in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(character, escape)
    print(f"::warning title=report-step::{text}", flush=True)


def main() -> None:
    """Report, and let nothing that goes wrong with it reach the run."""
    beating = sys.argv[1:] == ["heartbeat"]
    try:
        heartbeat() if beating else report()
    except DeliveryError as problem:
        warn("heartbeat" if beating else setting("STEP") or setting("STATUS"), problem)


if __name__ == "__main__":
    main()
