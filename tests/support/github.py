"""A stand-in for GitHub's REST API on loopback, which speaks its documented protocol, and its payloads.

https://docs.github.com/en/rest/actions/workflows#create-a-workflow-dispatch-event
https://docs.github.com/en/rest/actions/workflow-runs
https://docs.github.com/en/webhooks/webhook-events-and-payloads#workflow_run
"""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.stand_in import StandIn, listening

TOKEN = "the dispatch token of the tests"
REPOSITORY = "octo/agents"
WORKFLOW = f"/repos/{REPOSITORY}/actions/workflows/provision-agent.yml"
_ids = itertools.count(7_000_000_001)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def a_run(
    job_id: str, status: str = "queued", conclusion: str | None = None, **fields: object
) -> dict[str, Any]:
    """A workflow run as GitHub describes one, without what nobody here looks at."""
    id = fields.pop("id", None) or next(_ids)
    return {
        "id": id,
        "name": "Provision agent",
        "display_title": f"Provision {job_id}",
        "path": ".github/workflows/provision-agent.yml@main",
        "event": "workflow_dispatch",
        "status": status,
        "conclusion": conclusion,
        "run_attempt": 1,
        "head_branch": "main",
        "html_url": f"https://github.example/{REPOSITORY}/actions/runs/{id}",
        "created_at": now(),
        "run_started_at": now(),
        "updated_at": now(),
        **fields,
    }


@dataclass
class GitHub:
    """What was asked of it, and how it answers: by `answers` while there are any, else as it should."""

    url: str = ""
    runs: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    inputs: list[dict[str, str]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, object], dict[str, str]]] = field(default_factory=list)
    raw: bytes | None = None  # all that is answered, with a 200
    tells_details: bool = True
    state: str = "active"  # of the workflow
    hang: threading.Event | None = None
    hanging: int = 0

    @property
    def settings(self) -> dict[str, str]:
        """A Milepost's, so that it asks here."""
        return {
            "DISPATCH_API_URL": self.url,
            "DISPATCH_TOKEN": TOKEN,
            "DISPATCH_REPOSITORY": REPOSITORY,
        }

    def refuse(self, status: int, message: str = "", **headers: str) -> None:
        """Answer the next request with this error."""
        self.answers.append((status, {"message": message}, headers))

    def dispatched(self, job_id: str) -> int:
        """How many runs were started for a job."""
        return sum(inputs["job_id"] == job_id for inputs in self.inputs)

    def answer(self, method: str, target: str, body: bytes, token: str) -> tuple[int, object, dict[str, str]]:
        path = urlsplit(target).path
        self.asked.append((method, path))
        if self.answers:
            return self.answers.pop(0)
        if token != f"Bearer {TOKEN}":
            return 401, {"message": "Bad credentials"}, {}
        if (method, path) == ("POST", f"{WORKFLOW}/dispatches"):
            return self._dispatch(json.loads(body))
        if (method, path) == ("GET", WORKFLOW):
            return 200, {"id": 1, "name": "Provision agent", "state": self.state}, {}
        if (method, path) == ("GET", f"{WORKFLOW}/runs"):
            since = parse_qs(urlsplit(target).query)["created"][0].removeprefix(">=")
            runs = [run for run in reversed(self.runs) if run["created_at"] >= since]
            return 200, {"total_count": len(runs), "workflow_runs": runs}, {}
        for run in self.runs:
            if path == f"/repos/{REPOSITORY}/actions/runs/{run['id']}":
                return 200, run, {}
        return 404, {"message": "Not Found"}, {}

    def _dispatch(self, asked: dict[str, Any]) -> tuple[int, object, dict[str, str]]:
        if "return_run_details" in asked and not self.tells_details:  # as Enterprise Server 3.19 does
            return 422, {"message": 'Invalid request.\n\n"return_run_details" is not a permitted key.'}, {}
        self.inputs.append(asked["inputs"])
        self.runs.append(a_run(asked["inputs"]["job_id"]))
        if not asked.get("return_run_details"):
            return 204, None, {}
        id = self.runs[-1]["id"]
        run_url = f"{self.url}/repos/{REPOSITORY}/actions/runs/{id}"
        return 200, {"workflow_run_id": id, "run_url": run_url, "html_url": self.runs[-1]["html_url"]}, {}


@contextmanager
def github() -> Iterator[GitHub]:
    """One GitHub, listening."""
    stand_in = GitHub()

    class Handler(StandIn):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "")
            if stand_in.hang:
                stand_in.hanging += 1
                stand_in.hang.wait(60)
            status, said, headers = stand_in.answer(self.command, self.path, body, token)
            content = b"" if said is None else json.dumps(said).encode()
            if stand_in.raw is not None:
                status, content = 200, stand_in.raw
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # whoever asked has given up
                self.wfile.write(content)

        do_POST = do_GET

    with listening(Handler) as port:
        stand_in.url = f"http://127.0.0.1:{port}"
        try:
            yield stand_in
        finally:
            if stand_in.hang:
                stand_in.hang.set()


def workflow_run(run: dict[str, Any]) -> dict[str, Any]:
    """The payload of a `workflow_run` delivery, without what nobody here looks at."""
    action = {"queued": "requested", "waiting": "requested", "in_progress": "in_progress"}
    return {
        "action": action.get(run["status"], "completed"),
        "workflow_run": run,
        "workflow": {"id": 1, "name": run["name"], "path": run["path"].partition("@")[0]},
        "repository": {"id": 2, "name": REPOSITORY.partition("/")[2], "full_name": REPOSITORY},
        "sender": {"login": "octocat", "id": 3},
    }


def workflow_job(run: dict[str, Any], status: str, conclusion: str | None = None) -> dict[str, Any]:
    """The payload of a `workflow_job` delivery of a run's only job."""
    return {
        "action": status,
        "workflow_job": {
            "id": next(_ids),
            "run_id": run["id"],
            "run_attempt": run["run_attempt"],
            "workflow_name": run["name"],
            "name": "provision",
            "head_branch": "main",
            "html_url": f"{run['html_url']}/job/1",
            "status": status,
            "conclusion": conclusion,
            "created_at": now(),
            "started_at": now(),
            "completed_at": now() if conclusion else None,
            "labels": ["ubuntu-latest"],
            "runner_id": 1,
            "runner_name": "GitHub Actions 1",
        },
        "repository": {"id": 2, "name": REPOSITORY.partition("/")[2], "full_name": REPOSITORY},
        "sender": {"login": "octocat", "id": 3},
    }
