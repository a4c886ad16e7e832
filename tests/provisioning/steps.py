"""One step of the workflow by itself, entered as the workflow enters it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.provisioning.clouds import PACKAGES, Clouds
from tests.provisioning.hetzner import HCLOUD_TOKEN
from tests.provisioning.tailnet import OAUTH
from tests.support.preloaded import Preloads
from tests.support.server import ROOT

SCRIPTS = ROOT / ".github/provisioning"


@dataclass(frozen=True)
class Ended:
    """How a step ended: its exit code, outputs, log, and what it adds to the page of the run."""

    code: int
    outputs: dict[str, str]
    log: str
    summary: str

    @property
    def error(self) -> str:
        assert self.code == 1 and f"::error::{self.outputs['error'][:20]}" in self.log
        return self.outputs["error"]


@dataclass
class Steps:
    """`given` is what a run that works has in its environment."""

    folder: Path
    given: dict[str, str]
    preloaded: Preloads

    def run(self, script: str, command: str, **environment: str) -> Ended:
        files = self._files()
        arguments, log = [str(SCRIPTS / script), command], files["GITHUB_OUTPUT"].with_suffix(".log")
        code = self.preloaded.commands.ask(arguments, self.given | named(files) | environment, log, log)
        return ended(code, files, log.read_text())

    def create(self, **environment: str) -> Ended:
        return self.run("provision_vm.py", "create", **environment)

    def cleanup(self, **environment: str) -> Ended:
        return self.run("provision_vm.py", "cleanup", **environment)

    def make_ready(self, clouds: Clouds) -> int:
        """A server whose agent ran, made by the first attempt of run 77; its id."""
        assert self.create().code == 0
        (server,) = clouds.servers
        assert self.run("provision_vm.py", "ready", SERVER_ID=str(server)).code == 0
        return server

    @contextmanager
    def running(self, script: str, command: str, **environment: str) -> Iterator["Running"]:
        """A process of its own, to be sent signals."""
        files = self._files()
        process = subprocess.Popen(
            [sys.executable, SCRIPTS / script, command],
            env=self.given | named(files) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Running(process, files)
        finally:
            process.kill()
            process.wait()

    def _files(self) -> dict[str, Path]:
        mark = os.urandom(4).hex()
        files = {name: self.folder / f"{name}-{mark}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        return files


@dataclass
class Running:
    """A step under way."""

    process: "subprocess.Popen[str]"
    files: dict[str, Path]

    def end(self) -> Ended:
        """Wait for it."""
        log, _ = self.process.communicate(timeout=15)
        return ended(self.process.returncode, self.files, log)


def named(files: dict[str, Path]) -> dict[str, str]:
    return {name: str(file) for name, file in files.items()}


def ended(code: int, files: dict[str, Path], log: str) -> Ended:
    said = read_outputs(files["GITHUB_OUTPUT"].read_text())
    return Ended(code, said, log, files["GITHUB_STEP_SUMMARY"].read_text())


def read_outputs(text: str) -> dict[str, str]:
    """As the runner reads them: `name=value`, or `name<<mark`, lines and the mark."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if heredoc := re.fullmatch(r"(\w+)<<(.+)", line):
            value = []
            while (following := next(lines)) != heredoc[2]:
                value.append(following)
            found[heredoc[1]] = "\n".join(value)
        else:
            name, _, found_value = line.partition("=")
            found[name] = found_value
    return found


def good(folder: Path, clouds: Clouds, private_key: str) -> dict[str, str]:
    """What a run that works is given."""
    return {
        "PATH": os.environ["PATH"],
        "RUNNER_TEMP": str(folder),
        "GITHUB_RUN_ID": "77",
        "GITHUB_RUN_ATTEMPT": "1",
        "JOB_ID": "job-7",
        "AGENT_ID": "agent-7",
        "REGION": "eu-central",
        "AGENT_IMAGE": "registry.example/agent:1",
        "CALLBACK_SECRET": "a callback key of the tests",
        "HCLOUD_TOKEN": HCLOUD_TOKEN,
        "HCLOUD_ENDPOINT": f"{clouds.url}/v1",
        "TAILSCALE_BASE_URL": clouds.url,
        "TAILSCALE_PACKAGES_URL": f"{clouds.url}{PACKAGES}",
        "TAILSCALE_PACKAGES_FINGERPRINT": clouds.fingerprint,
        "TAILSCALE_OAUTH_CLIENT_ID": OAUTH["client_id"],
        "TAILSCALE_OAUTH_SECRET": OAUTH["client_secret"],
        "TAILSCALE_IP": "100.64.0.7",
        "SSH_PRIVATE_KEY": private_key,
        "JOIN_SECONDS": "1",
        "RETRY_PAUSE_SECONDS": "0.02",
    }
