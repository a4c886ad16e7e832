"""A receiver on loopback that answers as it is told, and the sender, run as a workflow runs it."""

import contextlib
import json
import os
import queue
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.support.server import ROOT
from tests.support.stand_in import StandIn, listening

SENDER = ROOT / ".github/actions/report-step/report_step.py"
KEY = "a key that only the two ends know"
LINK = "https://milepost.example/p/token-1"
RECEIVED = json.dumps({"received": True, "duplicate": False, "progress_url": LINK}).encode()

Answer = Callable[[BaseHTTPRequestHandler], object]


@dataclass
class Receiver:
    """Keeps what it got; `answers` are used up, the last one stays."""

    answers: list[Answer]
    over: threading.Event = field(default_factory=threading.Event)
    got: "queue.Queue[tuple[bytes, str]]" = field(default_factory=queue.Queue)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body, _ in list(self.got.queue)]


def answer(status: int, body: bytes = RECEIVED, **headers: str) -> Answer:
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


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for as long as this lasts; the requests' targets are in `asked`."""
    state = Receiver([answer(200)])

    class Handler(StandIn):
        def do_POST(self) -> None:
            state.asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.got.put((body, self.headers["X-Signature"]))
            with contextlib.suppress(OSError):
                (state.answers.pop(0) if state.answers[1:] else state.answers[0])(self)

        def do_CONNECT(self) -> None:
            state.asked.append(self.path)
            self.send_error(403)

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    with listening(Handler) as port:
        state.url = f"http://127.0.0.1:{port}/api/webhooks/github"
        try:
            yield state
        finally:
            state.over.set()


def environment(**fields: str) -> dict[str, str]:
    """What a runner's step sees; tries are as many as ever, but in quick succession."""
    run = {"GITHUB_RUN_ID": "7001", "GITHUB_RUN_ATTEMPT": "2"}
    job = {"CALLBACK_SECRET": KEY, "JOB_ID": "job-1"}
    patience = {"RETRY_SECONDS": "3", "PAUSE_SECONDS": "0.05"}
    return {"PATH": os.environ["PATH"]} | run | job | patience | fields


def send(python: str | Path = sys.executable, **fields: str) -> str:
    """Run the sender as a workflow does and return its log."""
    done = subprocess.run(
        [python, "-I", SENDER],
        check=False,
        env=environment(**fields),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert KEY not in done.stdout
    return done.stdout


def snippet(beginning: str) -> str:
    """The block of reporting.md that begins so."""
    text = (ROOT / ".github/docs/reporting.md").read_text()
    (found,) = re.findall(rf"```\w+\n({re.escape(beginning)}.*?)```", text, re.DOTALL)
    return str(found)
