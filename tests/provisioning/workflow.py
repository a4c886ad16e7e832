"""The real workflow file, run by act without Docker; actions of others do nothing here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.provisioning.clouds import PACKAGES, Clouds
from tests.provisioning.hetzner import HCLOUD_TOKEN
from tests.provisioning.tailnet import OAUTH
from tests.support.server import KEY, ROOT

WORKFLOWS = ".github/workflows"
PROVISION, DESTROY, SWEEP = "provision-agent.yml", "destroy-agent.yml", "sweep.yml"
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
    secrets: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shutil.copytree(ROOT / ".github", self.folder / "repository/.github", dirs_exist_ok=True)
        stub = self.folder / "stub/action.yml"
        stub.parent.mkdir()
        step = {"shell": "bash", "run": "true"}
        stub.write_text(json.dumps({"name": "stub", "runs": {"using": "composite", "steps": [step]}}))
        workflows = [(ROOT / WORKFLOWS / name).read_text() for name in (PROVISION, DESTROY, SWEEP)]
        self.used = set(re.findall(r"uses: ([\w-]+/[\w-]+@\w+)", "".join(workflows)))
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

    def all_installed(self) -> dict[str, str]:
        """A pip that finds everything installed, as the real one does after most of a run's time."""
        pip = self.folder / "installed" / "pip"
        pip.mkdir(parents=True, exist_ok=True)
        (pip / "__main__.py").touch()
        return {"PYTHONPATH": str(pip.parent)}

    def drop_key_of_first_job(self) -> None:
        """As where only the environment of the second job has the key."""
        workflow = self.folder / "repository" / WORKFLOWS / PROVISION
        whole = workflow.read_text()
        workflow.write_text(whole.replace("secrets.GH_CALLBACK_SECRET", "secrets.NONE", 2))

    def start(
        self, inputs: dict[str, str], environment: dict[str, str] | None = None, workflow: str = PROVISION
    ) -> "Run":
        """Begin a run; `environment` is what the runner's steps see besides."""
        event, secrets, variables = (self.folder / name for name in ("event", "secrets", "variables"))
        event.write_text(json.dumps({"inputs": inputs, "repository": {"visibility": "private"}}))
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
                | self.secrets
            )
        )
        variables.write_text(json.dumps({"AGENT_IMAGE": self.image} | self.variables))
        steps = {
            "HCLOUD_ENDPOINT": f"{self.clouds.url}/v1",
            "TAILSCALE_BASE_URL": self.clouds.url,
            "TAILSCALE_PACKAGES_URL": f"{self.clouds.url}{PACKAGES}",
            "TAILSCALE_PACKAGES_FINGERPRINT": self.clouds.fingerprint,
            "JOIN_SECONDS": "20",
            "RETRY_SECONDS": "3",
            "HEARTBEAT_SECONDS": "1",
            "PLAYED": str(self.played),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        } | (environment or {})
        command: list[str | Path] = [BIN / "act", "workflow_dispatch", "-W", f"{WORKFLOWS}/{workflow}"]
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
        for entry in Path("/proc").glob("[0-9]*/environ"):  # HOME is there
            with suppress(OSError):
                if str(self.folder).encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
        return found
