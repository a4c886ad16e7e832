"""Reporting without GitHub: the plain shell, GitLab CI, Jenkins and curl, as reporting.md shows them."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.receiver import KEY, SENDER, Receiver, receiving, snippet
from tests.support.server import sign, wait_until

pytestmark = pytest.mark.one_database

BUILD = {"done": "echo built", "fails": "echo no space left; exit 1", "hangs": "exec sleep 600"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver
        assert all(sign(body, KEY) == mac.removeprefix("sha256=") for body, mac in receiver.got.queue)
        assert all("sent_at" in body and "workflow_run_id" in body for body in receiver.bodies())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the sender and two scripts, both of which succeed."""
    shutil.copy(SENDER, tmp_path)
    (tmp_path / "key").write_text(f"{KEY}\n")
    for script in ("build", "publish"):
        plan(tmp_path, script, "done")
    return tmp_path


def plan(project: Path, script: str, outcome: str) -> None:
    """Let a script be done, fail or hang."""
    file = project / f"{script}.sh"
    file.write_text(f"#!/bin/sh\n{BUILD[outcome]}\n")
    file.chmod(0o755)


def shell(project: Path, script: str, *options: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Begin a script in a shell of its own, as a runner does."""
    path = {"PATH": os.environ["PATH"], "PAUSE_SECONDS": "0.05", "RETRY_SECONDS": "2"}
    command = ["bash", *options, "-c", script]
    return subprocess.Popen(command, cwd=project, env=path | environment, start_new_session=True)


def reported(receiver: Receiver) -> list[tuple[str, str | None]]:
    """Each milestone or end, and where it failed."""
    bodies = [body for body in receiver.bodies() if "status" in body]
    return [(body.get("step", body["status"]), body.get("failed_step")) for body in bodies]


BUILDING, PUBLISHING, DONE = ("building", None), ("publishing", None), ("running", None)
ENDINGS = {
    "done": [BUILDING, PUBLISHING, DONE],
    "fails": [BUILDING, ("failed", "building")],
    "hangs": [BUILDING, ("failed", "cancelled")],
}


@pytest.mark.parametrize("outcome", ENDINGS)
def test_a_plain_shell_reports_every_end(receiver: Receiver, project: Path, outcome: str) -> None:
    plan(project, "build", outcome)
    script = snippet("#!/usr/bin/env bash")
    key = str(project / "key")
    with shell(project, script, CALLBACK_URL=receiver.url, KEY_FILE=key, TMPDIR=str(project)) as run:
        if outcome == "hangs":
            wait_until(lambda: reported(receiver))
            wait_until(lambda: list(project.glob("tmp.*/log")))
            os.killpg(run.pid, signal.SIGINT)
        assert (run.wait(60) == 0) == (outcome == "done")
    assert reported(receiver) == ENDINGS[outcome]
    if outcome == "fails":
        assert receiver.bodies()[-1]["error"] == "no space left"
    assert not list(project.glob("tmp.*")), "nothing is left behind"


@pytest.mark.parametrize(
    ("outcome", "status"),
    [("done", "success"), ("fails", "failed"), ("hangs", "canceled"), ("hangs", "running")],
)
def test_gitlab_reports_every_end(receiver: Receiver, project: Path, outcome: str, status: str) -> None:
    plan(project, "build", outcome)
    job = yaml.safe_load(snippet("# .gitlab-ci.yml"))["deploy"]
    given = {"CI_JOB_ID": "71", "CI_PIPELINE_ID": "55", "CI_PROJECT_DIR": str(project)}
    variables = {name: os.path.expandvars(value) for name, value in job["variables"].items()}
    variables = {
        name: re.sub(r"\$(\w+)", lambda found: given[found[1]], value) for name, value in variables.items()
    }
    environment = given | variables | {"CALLBACK_SECRET": KEY, "CALLBACK_URL": receiver.url}
    with shell(project, "\n".join(job["script"]), "-eo", "pipefail", **environment) as script:
        if outcome == "hangs":
            wait_until(lambda: reported(receiver))
            os.killpg(script.pid, signal.SIGKILL)
        script.wait(60)
    shell(project, "\n".join(job["after_script"]), **environment, CI_JOB_STATUS=status).wait(60)
    assert reported(receiver) == ENDINGS[outcome]
    assert receiver.bodies()[0]["workflow_run_id"] == "71"


@pytest.mark.parametrize(
    ("outcome", "result"), [("done", "SUCCESS"), ("fails", "FAILURE"), ("hangs", "ABORTED")]
)
def test_jenkins_reports_every_end(receiver: Receiver, project: Path, outcome: str, result: str) -> None:
    plan(project, "build", outcome)
    text = snippet("// Jenkinsfile")
    environment = dict(re.findall(r"(\w+) = '(\S+)'\n", text)) | {"BUILD_URL": "https://ci.example/12/"}
    environment |= {"CALLBACK_SECRET": KEY, "CALLBACK_URL": receiver.url, "BUILD_NUMBER": "12"}
    environment |= {"RUNNER_TEMP": str(project / "temporary")}
    for stage in re.findall(r"sh '''(.*?)'''", text, re.DOTALL):
        with shell(project, stage, "-e", **environment) as script:
            if outcome == "hangs":
                wait_until(lambda: reported(receiver))
                os.killpg(script.pid, signal.SIGTERM)
            if script.wait(60) != 0:
                break
    (post,) = re.findall(r"sh '([^']+)'\n", text)
    shell(project, post, "-e", **environment, STATUS=result).wait(60)
    assert reported(receiver) == ENDINGS[outcome]
    assert receiver.bodies()[0]["workflow_run_id"] == "12"


def test_curl_reports_without_python(receiver: Receiver, project: Path) -> None:
    given = {"CALLBACK_URL": receiver.url, "CALLBACK_SECRET": KEY, "JOB_ID": "site", "WORKFLOW_RUN_ID": "3"}
    assert shell(project, snippet("report() {"), "-e", **given).wait(60) == 0
    bodies: list[dict[str, Any]] = receiver.bodies()
    assert [(body["status"], body["step"]) for body in bodies] == [
        ("in_progress", "building"),
        ("success", ""),
    ]
