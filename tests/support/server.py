"""A real Milepost for the tests: gunicorn as `make run` starts it, and the ways to speak to it."""

import hashlib
import hmac
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests

from tests.support.events import Events
from tests.support.preloaded import Child, Preloads

ROOT = Path(__file__).resolve().parents[2]
KEY = "the callback key of the tests"
OPERATOR_TOKEN = "the operator token of the tests"
CALLBACKS = "/api/webhooks/github"
_jobs = itertools.count(1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(holds: Callable[..., Any], within: float = 20.0) -> Any:
    """The first true answer of `holds`, asked again and again; fails after `within` seconds."""
    until, pause = time.monotonic() + within, 0.01
    while time.monotonic() < until:
        if answer := holds():
            return answer
        time.sleep(pause)  # between two looks, each a request or more
        pause = min(1.5 * pause, 0.1)
    raise AssertionError(f"not within {within} s")


def new_job_id() -> str:
    return f"job-{next(_jobs)}-{secrets.token_hex(3)}"


def sign(body: bytes, key: str = KEY) -> str:
    return hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


class Server:
    """One Milepost on a port and a database of its own; `settings` are its environment."""

    app = "wsgi:app"
    root = ROOT
    config = "python:webapp.serving"
    limits: tuple[str, ...] = ()  # a command that starts another under them, such as `prlimit`

    def __init__(
        self, folder: Path, database_url: str, preloaded: Preloads | None = None, /, **settings: str
    ) -> None:
        self._preloaded = preloaded
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database_url = database_url
        self.log = folder / f"server-{self.port}.log"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PORT": str(self.port),
            "DATABASE_URL": database_url,
            "GITHUB_CALLBACK_SECRET": KEY,
            "SECRET_KEY": "the secret key of the tests",
            "OPERATOR_TOKEN": OPERATOR_TOKEN,
            "PYTHONUNBUFFERED": "1",
            **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")},
            **settings,
        }
        self._process: subprocess.Popen[bytes] | Child | None = None

    def flask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the terminal's door."""
        words = ["--app", "wsgi", *arguments]
        command = [sys.executable, "-m", "flask", *words]
        if not self._preloaded:
            return subprocess.run(
                command, cwd=ROOT, env=self.environ, check=check, capture_output=True, text=True
            )
        with TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            code = self._preloaded.commands.ask(words, self.environ, stdout, stderr)
            done = subprocess.CompletedProcess(command, code, stdout.read_text(), stderr.read_text())
        if check:
            done.check_returncode()
        return done

    def start(self, stderr: int | None = None, within: float = 30, wait: bool = True) -> None:
        """Start it, its log in a file or, where given, on that descriptor."""
        arguments = ["-c", self.config, self.app]
        if self._preloaded and self.root == ROOT and stderr is None and not self.limits:
            self._process = Child(self._preloaded.servers.ask(arguments, self.environ, self.log, self.log))
        else:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self.limits, sys.executable, "-m", "gunicorn", *arguments],
                    cwd=self.root,
                    env=self.environ,
                    stdout=log,
                    stderr=log if stderr is None else stderr,
                    start_new_session=True,
                )
        if wait:
            wait_until(self.is_up, within)

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthz", timeout=5).ok
        except requests.RequestException:
            return False

    @property
    def pid(self) -> int:
        """Of gunicorn's master, which leads the process group of its workers."""
        assert self._process
        return self._process.pid

    def workers(self) -> list[int]:
        """The process ids of gunicorn's workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def open_files(self) -> int:
        """How many files and sockets the workers hold open."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.workers())

    def stop(self, by: signal.Signals = signal.SIGTERM, wait: bool = True) -> None:
        """Stop it, all of its processes at once where `by` is SIGKILL."""
        if self._process:
            (os.killpg if by == signal.SIGKILL else os.kill)(self.pid, by)
            if wait:
                self._process.wait(30)
                self._process = None

    def refuses_to_start(self) -> str:
        """What it says; it ends by itself."""
        self.start(wait=False)
        assert self._process
        self._process.wait(30)
        assert not self.is_up()
        return self.log.read_text()

    def post(self, body: bytes, key: str = KEY, **headers: str | bytes) -> requests.Response:
        """A callback as the workflow sends it: signed over its very bytes."""
        headers = {"X-Signature": sign(body, key), **headers}
        return requests.post(self.url + CALLBACKS, data=body, headers=headers, timeout=30)

    def report(self, job_id: str, milestone: str, **fields: object) -> bool:
        """A milestone or a heartbeat in the contract's words; whether it was a duplicate."""
        said: dict[str, object] = {"job_id": job_id}
        if milestone == "heartbeat":
            said["type"] = "heartbeat"
        elif milestone in ("provisioning", "running", "failed"):
            said["status"] = milestone
        else:
            said |= {"status": "provisioning", "step": milestone}
        answer = self.post(json.dumps(said | fields).encode())
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["duplicate"])

    def api(self, path: str, **options: Any) -> requests.Response:
        """A request of the operator's, with the bearer token."""
        headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}", **options.pop("headers", {})}
        method = options.pop("method", "POST" if "json" in options or "data" in options else "GET")
        return requests.request(method, self.url + path, headers=headers, timeout=30, **options)

    def create(self, job_id: str, **fields: object) -> requests.Response:
        """Ask for a job of an agent of its own, and for its run unless `dispatch` says no."""
        return self.api("/api/jobs", json={"agent_id": f"agent-{job_id}", "job_id": job_id, **fields})

    def retry(self, job_id: str) -> requests.Response:
        """Ask for a new attempt."""
        return self.api(f"/api/jobs/{job_id}/retry", method="POST")

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the operator's API shows it."""
        answer = self.api(f"/api/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def link(self, job_id: str) -> str:
        """The address of the job's progress page."""
        return str(self.job(job_id)["progress_url"])

    def page(self, job_id: str) -> dict[str, Any]:
        """The job as the watcher's JSON shows it."""
        headers = {"Accept": "application/json"}
        answer = requests.get(self.link(job_id), headers=headers, timeout=30)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, job_id: str, within: float = 20, **fields: object) -> dict[str, Any]:
        """The job as the watcher's JSON shows it, once these fields are so."""

        def look() -> dict[str, Any] | None:
            page = self.page(job_id)
            return page if page | fields == page else None

        return dict(wait_until(look, within))

    def states(self, job_id: str) -> list[str]:
        """The states of the steps, in order."""
        return [step["state"] for step in self.page(job_id)["steps"]]

    def events(self, job_id: str, timeout: float = 30, seen: str = "") -> Events:
        """The job's stream, open; `seen` as a browser tells it that comes back."""
        headers = {"Last-Event-ID": seen} if seen else {}
        return Events(f"{self.link(job_id)}/events", timeout, headers)


Serve = Callable[..., Server]
"""Starts a Milepost on a database of its own; the arguments are its settings."""
