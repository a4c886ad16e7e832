"""A line to Milepost that notes what passes, and can be cut as a receiver's line is cut."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import requests

from tests.support.server import CALLBACKS
from tests.support.stand_in import StandIn, listening

State = Literal["up", "down", "hanging", "failing"]


@dataclass
class Relay:
    """`state` says, for each callback, what happens to it; `callbacks` are those that passed."""

    url: str = ""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    state: Callable[[dict[str, Any]], State] = lambda _: "up"

    def milestones(self) -> list[str]:
        reported = [callback for callback in self.callbacks if "status" in callback]
        return [c["step"] if "step" in c and c["status"] != "failed" else c["status"] for c in reported]

    def reported(self, step: str) -> dict[str, Any]:
        """The callback of a milestone."""
        return next(callback for callback in self.callbacks if callback.get("step") == step)

    def heartbeats(self) -> int:
        return len(self.callbacks) - len(self.milestones())


@contextmanager
def relaying(milepost: str) -> Iterator[Relay]:
    """Carry callbacks to the Milepost of this address."""
    relay, over = Relay(), threading.Event()

    class Handler(StandIn):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = 500, b"{}"
            match relay.state(callback := json.loads(body)):
                case "down":
                    return
                case "hanging":
                    over.wait()
                    return
                case "up":
                    headers = {"X-Signature": self.headers["X-Signature"]}
                    passed = requests.post(milepost + CALLBACKS, data=body, headers=headers, timeout=30)
                    status, answer = passed.status_code, passed.content
                    relay.callbacks.append(callback)
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

    with listening(Handler) as port:
        relay.url = f"http://127.0.0.1:{port}{CALLBACKS}"
        yield relay
        over.set()
