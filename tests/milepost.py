"""A real Milepost for the tests: gunicorn as `make run` starts it, and the ways to speak to it."""

import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from http.cookiejar import Cookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
KEY = "the callback key of the tests"
OPERATOR_TOKEN = "the operator token of the tests"
CALLBACKS = "/api/webhooks/github"
_jobs = itertools.count(1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(holds: Callable[[], Any], within: float = 20.0) -> Any:
    """The first true answer of `holds`, asked again and again; fails after `within` seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if answer := holds():
            return answer
        time.sleep(0.02)  # between two looks at a condition
    raise AssertionError(f"not within {within} s")


def new_job_id() -> str:
    return f"job-{next(_jobs)}-{secrets.token_hex(3)}"


def sign(body: bytes, key: str = KEY) -> str:
    return hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


class Server:
    """One Milepost on a port and a database of its own; `settings` are its environment."""

    app = "wsgi:app"

    def __init__(self, folder: Path, database_url: str, **settings: str) -> None:
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
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def flask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the terminal's door."""
        command = [sys.executable, "-m", "flask", "--app", "wsgi", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environ, check=check, capture_output=True, text=True
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "gunicorn", "-c", "python:webapp.serving", self.app]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self.is_up, within=30)

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthz", timeout=5).ok
        except requests.ConnectionError:
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

    def states(self, job_id: str) -> list[str]:
        """The states of the five steps, in order."""
        return [step["state"] for step in self.page(job_id)["steps"]]

    def events(self, job_id: str, timeout: float = 30) -> "Events":
        """The job's stream, open."""
        return Events(f"{self.link(job_id)}/events", timeout)


class Events:
    """A stream, read event by event."""

    def __init__(self, url: str, timeout: float = 30, headers: dict[str, str] | None = None) -> None:
        self.response = requests.get(url, stream=True, timeout=timeout, headers=headers)
        assert self.response.status_code == 200, self.response.text
        self._lines = self.response.iter_lines(chunk_size=1, decode_unicode=True)

    def __iter__(self) -> Iterator[dict[str, str]]:
        event: dict[str, str] = {}
        for line in self._lines:
            if not line:
                if event:
                    yield event
                event = {}
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            event[name] = f"{event[name]}\n{value}" if name in event else value

    def next(self) -> dict[str, str]:
        """The next event that is not a comment alone."""
        return next(event for event in self if event.keys() != {""})

    def close(self) -> None:
        self.response.close()


class Operator(requests.Session):
    """A person's browser as far as HTTP goes: it keeps cookies, and sends forms as they are shown."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def ask(self, path: str = "/") -> requests.Response:
        return self.get(self.server.url + path, timeout=30, allow_redirects=False)

    def see(self, path: str = "/") -> str:
        """A page that has to be there."""
        answer = self.ask(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def submit(self, path: str, on: str = "/", **fields: str) -> requests.Response:
        """Send a form of the page `on`, with the hidden fields that it has there."""
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', self.see(on)))
        form = {name: unescape(value) for name, value in hidden.items()} | fields
        return self.post(self.server.url + path, data=form, timeout=30, allow_redirects=False)

    def sign_in(self, token: str = OPERATOR_TOKEN, on: str = "/sign-in") -> requests.Response:
        return self.submit("/sign-in", on, token=token)

    @property
    def cookie(self) -> Cookie:
        return next(iter(self.cookies))


def signed_in(server: Server) -> Operator:
    operator = Operator(server)
    answer = operator.sign_in(server.environ["OPERATOR_TOKEN"])
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    return operator


class StandIn(BaseHTTPRequestHandler):
    """Answers in the name of somebody else's service."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening(handler: type[StandIn], address: str = "127.0.0.1") -> Iterator[int]:
    """A stand-in on a port of its own, for as long as this lasts."""
    server = ThreadingHTTPServer((address, 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def postgresql(folder: Path) -> Iterator["Cluster"]:
    """A temporary cluster of the installed server programs."""
    cluster = Cluster(folder)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """PostgreSQL's own programs, run as its own user where we are root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            folder.chmod(0o755)
            (folder / "data").mkdir()
            subprocess.run(["chown", "postgres", folder / "data"], check=True)
        options = ["-A", "trust", "-U", "milepost", "-E", "UTF8", "--no-sync"]
        self._run("initdb", "-D", str(folder / "data"), *options)

    def start(self) -> None:
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=''", "max_connections=200")
        options = " ".join([f"-p {self.port}", *(f"-c {setting}" for setting in settings)])
        log = str(self.folder / "data" / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", mode, "stop")

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"milepost_{secrets.token_hex(4)}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "milepost", name)
        return f"postgresql://milepost@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: str) -> None:
        homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        path = next((str(home / program) for home in homes if (home / program).exists()), program)
        subprocess.run([*self._as, path, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
