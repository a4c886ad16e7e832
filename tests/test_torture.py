"""Killed under load, out of memory, restarted: what was acknowledged is there, once, and streams recover.

`make torture` sets TORTURE, the seconds that each of these tests goes on.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.databases import Databases
from tests.support.server import CALLBACKS, KEY, ROOT, Serve, Server, new_job_id, wait_until

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("TORTURE", 4))
STEPS = ("provisioning", "vm_created", "ansible_started", "ansible_complete", "running")
SENDER = ROOT / ".github" / "actions" / "report-step" / "report_step.py"


class Load(threading.Thread):
    """Sends callbacks one after the other, whatever happens to the server, and notes those that it took."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.taken, self.is_over = server, [], False  # type: ignore[var-annotated]

    def run(self) -> None:
        while not self.is_over:
            job_id = new_job_id()
            for step in STEPS:
                try:
                    self.server.report(job_id, step)
                except (requests.RequestException, AssertionError):  # gone, or 503
                    time.sleep(0.01)
                    break
                self.taken.append((job_id, step))


def milestones(server: Server, job_id: str) -> list[str]:
    answer: dict[str, Any] = server.api(f"/api/jobs/{job_id}/callbacks").json()
    return [callback["milestone"] for callback in answer["callbacks"]]


def test_no_kill_loses_or_doubles_what_was_acknowledged(own_database: Databases, serve: Serve) -> None:
    server = serve(DATABASE_URL=own_database.migrated())
    loads = [Load(server) for _ in range(3)]
    for load in loads:
        load.start()
    until, kills = time.monotonic() + SECONDS, 0
    try:
        while kills < 3 or time.monotonic() < until:
            time.sleep(random.uniform(0.1, 0.6))  # the moment of a kill is anybody's
            kind = ("worker", "group", "database")[kills % 3]
            if kind == "worker":
                for worker in server.workers():
                    os.kill(worker, signal.SIGKILL)
            elif kind == "group":
                server.stop(signal.SIGKILL)
                server.start(within=60)
            elif own_database.kind == "postgresql":
                own_database.cluster.stop("immediate")
                own_database.cluster.start()
            kills += 1
            wait_until(server.is_up, within=60)
    finally:
        for load in loads:
            load.is_over = True
            load.join()
    taken = [each for load in loads for each in load.taken]
    assert len(taken) > 10
    for job_id in {job_id for job_id, _ in taken}:
        stored = milestones(server, job_id)
        acknowledged = [step for known, step in taken if known == job_id]
        assert len(stored) == len(set(stored)) and set(acknowledged) <= set(stored)


@pytest.mark.one_database
def test_without_memory_no_answer_is_final_and_streams_go_on_after_it(tmp_path: Path) -> None:
    server = Server(tmp_path, Databases("sqlite").migrated())  # gevent prints tracebacks of MemoryError
    server.start()
    try:
        check_memory(server, new_job_id())
    finally:
        server.stop(signal.SIGKILL)


def check_memory(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    (worker,) = server.workers()
    statuses: set[int] = set()
    large = json.dumps({"status": "provisioning", "more": [[i] for i in range(8000)]})
    with closing(server.events(job_id, timeout=60)) as events:
        events.next()
        resource.prlimit(worker, resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
        bodies = [f'{{"job_id": "{new_job_id()}", {large[1:]}' for _ in range(40)]
        threads = [threading.Thread(target=send, args=(server, body, statuses)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        resource.prlimit(worker, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(server.is_up)
        server.report(job_id, "vm_created")
    with closing(server.events(job_id)) as events:
        events.next()
        server.report(job_id, "ansible_started")
        assert 'data-step="configuring" data-state="active"' in events.next()["data"]
    assert statuses <= {200, 503}


def send(server: Server, body: str, statuses: set[int]) -> None:
    with suppress(requests.RequestException):  # nothing was said
        statuses.add(server.post(body.encode()).status_code)


class Runs(threading.Thread):
    """Workflow runs, one after the other, which report each step through the shipped sender."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.is_over, self.said = server, False, ""
        self.reported: list[str] = []
        self.ends = threading.Semaphore(0)

    def run(self) -> None:
        while not self.is_over:
            job_id = new_job_id()
            for step in STEPS:
                said = {"STEP": step} if step not in ("provisioning", "running") else {"STATUS": step}
                environment = sender(self.server, job_id) | said
                self.said += subprocess.check_output([sys.executable, SENDER], env=environment, text=True)
            self.reported.append(job_id)
            self.ends.release()


@pytest.mark.one_database
def test_restarts_under_the_shipped_sender_lose_nothing(serve: Serve) -> None:
    server = serve()
    runs = [Runs(server) for _ in range(2)]
    for run in runs:
        run.start()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        server.stop()
        server.start(within=60)
        assert all(run.ends.acquire(timeout=60) for run in runs)
    for run in runs:
        run.is_over = True
        run.join()
    assert "::warning" not in "".join(run.said for run in runs)
    for job_id in [job_id for run in runs for job_id in run.reported]:
        assert milestones(server, job_id) == [*reversed(STEPS)]


def sender(server: Server, job_id: str) -> dict[str, str]:
    said = {"CALLBACK_URL": server.url + CALLBACKS, "CALLBACK_SECRET": KEY, "JOB_ID": job_id}
    run = {"SUMMARY": "no", "GITHUB_RUN_ID": "7", "GITHUB_RUN_ATTEMPT": "1"}
    return {"PATH": os.environ["PATH"], "no_proxy": "*", **said, **run}
