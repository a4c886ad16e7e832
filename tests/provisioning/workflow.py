"""The real workflow file, run by act without Docker; actions of others do nothing here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.provisioning.clouds import HCLOUD_TOKEN, OAUTH, Clouds
from tests.support.server import KEY, ROOT

WORKFLOW = ".github/workflows/provision-agent.yml"
BIN = Path(sys.executable).parent
AGENT_SECRET = "AGENT_TOKEN=the agent's {{ own }} $(secret)"


@dataclass
class Runner:
    """A repository of one's own with the secrets set; `fields` of `start` are the inputs."""

    folder: Path
    clouds: Clouds
    private_key: str
    programs: Path
    image: str = "registry.example/agent:1"

    def __post_init__(self) -> None:
        shutil.copytree(ROOT / ".github", self.folder / "repository/.github", dirs_exist_ok=True)
        stub = self.folder / "stub/action.yml"
        stub.parent.mkdir()
        step = {"shell": "bash", "run": "true"}
        stub.write_text(json.dumps({"name": "stub", "runs": {"using": "composite", "steps": [step]}}))
        self.used = re.findall(r"uses: ([\w-]+/[\w-]+@\w+)", (ROOT / WORKFLOW).read_text())
        self.played = self.folder / "played"
        git: list[str | Path] = [
            "git",
            "-C",
            self.folder / "repository",
            "-c",
            "user.name=x",
            "-c",
            "user.email=x",
        ]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run([*git, *command], check=True)

    def start(self, callback_url: str, environment: dict[str, str] | None = None, **fields: str) -> "Run":
        """Begin a run; `environment` is what the runner's steps see besides."""
        inputs = {"region": "eu-central", "callback_url": callback_url, "agent_id": "agent-7"} | fields
        event, secrets, variables = (self.folder / name for name in ("event", "secrets", "variables"))
        event.write_text(json.dumps({"inputs": inputs}))
        secrets.write_text(
            json.dumps(
                {
                    "GH_CALLBACK_SECRET": KEY,
                    "HCLOUD_TOKEN": HCLOUD_TOKEN,
                    "TAILSCALE_OAUTH_CLIENT_ID": OAUTH["client_id"],
                    "TAILSCALE_OAUTH_SECRET": OAUTH["client_secret"],
                    "SSH_PRIVATE_KEY": self.private_key,
                    "AGENT_ENVIRONMENT": AGENT_SECRET,
                }
            )
        )
        variables.write_text(json.dumps({"AGENT_IMAGE": self.image}))
        steps = {
            "HCLOUD_ENDPOINT": f"{self.clouds.url}/v1",
            "TAILSCALE_BASE_URL": self.clouds.url,
            "JOIN_SECONDS": "20",
            "RETRY_SECONDS": "3",
            "HEARTBEAT_SECONDS": "1",
            "PLAYED": str(self.played),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        } | (environment or {})
        command: list[str | Path] = [BIN / "act", "workflow_dispatch", "-W", WORKFLOW]
        command += ["-P", "ubuntu-latest=-self-hosted", "--eventpath", event, "--action-offline-mode"]
        command += ["--secret-file", f"{secrets}.yml", "--var-file", f"{variables}.yml", "--no-cache-server"]
        command += ["--insecure-secrets"]  # or act itself would hide what leaks
        command += ["--action-cache-path", self.folder / "cache"]
        for file in (secrets, variables):
            file.rename(f"{file}.yml")
        for name, value in steps.items():
            command += ["--env", f"{name}={value}"]
        for action in self.used:
            command += ["--local-repository", f"{action}={self.folder / 'stub'}"]
        log = self.folder / "log"
        path = f"{self.programs}:{BIN}:{os.environ['PATH']}"
        process = subprocess.Popen(
            command,
            cwd=self.folder / "repository",
            env={"PATH": path, "HOME": str(self.folder)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Run(process, log, self.folder)


@dataclass
class Run:
    """A run under way."""

    process: subprocess.Popen[bytes]
    log: Path
    folder: Path

    def finish(self, within: float = 300) -> bool:
        """Say whether it succeeded."""
        return self.process.wait(within) == 0

    def cancel(self) -> None:
        """Do what GitHub's cancel button does."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Take the runner's machine away: its processes end and report nothing."""
        os.killpg(self.process.pid, signal.SIGKILL)
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def processes(self) -> list[int]:
        """Return what the run has started and not ended."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.folder).encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
        return found
