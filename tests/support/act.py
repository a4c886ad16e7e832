"""Workflows, run by act without Docker in a repository of their own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.server import ROOT

BIN = Path(sys.executable).parent


@dataclass
class Repository:
    """A repository with report-step in it; actions of others do nothing there but set `outputs`."""

    folder: Path
    secrets: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    event: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.copytree(ROOT / ".github/actions", self.root / ".github/actions")
        said = "\n".join(
            f"echo '{name}={value}' >>\"$GITHUB_OUTPUT\"" for name, value in self.outputs.items()
        )
        outputs = {
            name: {"description": name, "value": f"${{{{ steps.x.outputs.{name} }}}}"}
            for name in self.outputs
        }
        step = {"id": "x", "shell": "bash", "run": said or "true"}
        stub = {"name": "stub", "outputs": outputs, "runs": {"using": "composite", "steps": [step]}}
        self.write("../stub/action.yml", json.dumps(stub))
        git: list[str | Path] = ["git", "-C", self.root, "-c", "user.name=x", "-c", "user.email=x"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run([*git, *command], check=True)

    @property
    def root(self) -> Path:
        return self.folder / "repository"

    def write(self, path: str, text: str) -> None:
        """Put a file there; a script can be run."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def start(self, workflow: str, environment: dict[str, str] | None = None, **inputs: str) -> "Run":
        """Begin a run of a workflow's text; `environment` is what the runner's steps see besides."""
        self.write(".github/workflows/workflow.yml", workflow)
        files = {"eventpath": self.event | {"inputs": inputs}, "secret-file": self.secrets}
        command: list[str | Path] = [BIN / "act", "workflow_dispatch", "-P", "ubuntu-latest=-self-hosted"]
        for option, content in (files | {"var-file": self.variables}).items():
            file = self.folder / f"{option}.yml"
            file.write_text(json.dumps(content))
            command += [f"--{option}", file]
        command += ["--no-cache-server", "--insecure-secrets", "--action-offline-mode"]
        command += ["--action-cache-path", self.folder / "cache"]
        for name, value in (environment or {}).items():
            command += ["--env", f"{name}={value}"]
        for action in re.findall(r"uses: ([\w-]+/[\w-]+@\w+)", workflow):
            command += ["--local-repository", f"{action}={self.folder / 'stub'}"]
        log = self.folder / "log"
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env={"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(self.folder)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Run(process, log)


@dataclass
class Run:
    """A run under way."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self) -> bool:
        """Say whether it succeeded."""
        return self.process.wait(120) == 0

    def cancel(self) -> None:
        """Do what GitHub's cancel button does."""
        self.process.send_signal(signal.SIGINT)
