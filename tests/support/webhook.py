"""The webhook to which Apprise's json:// sends, as a team's own service would offer it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from tests.support.stand_in import StandIn, listening


class Webhook:
    """What was told; while `is_away` it answers 503, and while `may_answer` is not set it does not answer."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.refused = 0
        self.is_away = False
        self.refuses = ""  # a topic of ntfy's, which sends here as well
        self.may_answer = Event()
        self.may_answer.set()
        self.url = ""

    def about(self, job_id: str) -> list[str]:
        """The titles of the messages that name a job."""
        return [each["title"] for each in self.told if job_id in each["message"]]


@contextmanager
def webhook() -> Iterator[Webhook]:
    hook = Webhook()

    class Handler(StandIn):
        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hook.may_answer.wait(60)
            is_away = hook.is_away or said.get("topic", "") == hook.refuses != ""
            if is_away:
                hook.refused += 1
            else:
                hook.told.append(said)
            self.send_response(503 if is_away else 200)
            self.end_headers()

    with listening(Handler) as port:
        hook.url = f"json://127.0.0.1:{port}/a-secret-path"
        yield hook
        hook.may_answer.set()
