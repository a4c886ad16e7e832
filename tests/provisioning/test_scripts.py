"""What the scripts of the workflow refuse by themselves, entered as a step enters them."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.provisioning.clouds import HCLOUD_TOKEN, OAUTH, Clouds
from tests.support.server import ROOT

HOSTILE = ['a"b', "a'b", "$(id)", "`id`", "a\nb", "a\r\nb=c", "{{ 7 * 7 }}", "{% raw %}", "a;b", "../a", "-a"]
HOSTILE += ["a b", "é", "a\u2028b", "a" * 256, "!!python/x", "a: b"]


def step(folder: Path, script: str, command: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """Exit code, outputs and log of one step."""
    outputs = folder / f"outputs-{os.urandom(4).hex()}"
    outputs.touch()
    known = {"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(outputs), "RUNNER_TEMP": str(folder)}
    done = subprocess.run(
        [sys.executable, ROOT / ".github/provisioning" / script, command],
        env=known | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    return done.returncode, said, done.stdout + done.stderr


@pytest.fixture
def good(clouds: Clouds, private_key: str) -> dict[str, str]:
    """What a run that works is given."""
    return {
        "JOB_ID": "job-7",
        "AGENT_ID": "agent-7",
        "REGION": "eu-central",
        "AGENT_IMAGE": "registry.example/agent:1",
        "HCLOUD_TOKEN": HCLOUD_TOKEN,
        "HCLOUD_ENDPOINT": f"{clouds.url}/v1",
        "TAILSCALE_BASE_URL": clouds.url,
        "TAILSCALE_OAUTH_CLIENT_ID": OAUTH["client_id"],
        "TAILSCALE_OAUTH_SECRET": OAUTH["client_secret"],
        "TAILSCALE_IP": "100.64.0.7",
        "SSH_PRIVATE_KEY": private_key,
    }


@pytest.mark.parametrize("name", ["JOB_ID", "AGENT_ID", "REGION", "AGENT_IMAGE"])
def test_what_could_be_code_is_refused_before_anything_is_asked_for(
    name: str, good: dict[str, str], clouds: Clouds, tmp_path: Path
) -> None:
    def create(value: str) -> tuple[int, dict[str, str], str]:
        return step(tmp_path, "provision_vm.py", "create", **good | {name: value})

    with ThreadPoolExecutor(2) as pool:
        for code, said, log in pool.map(create, HOSTILE):
            assert code == 1
            assert said.keys() == {"error"}, "one line of output, whatever the value"
            assert name.lower() in said["error"].lower()
            assert log == f"::error::{said['error'].replace('%', '%25')}\n", "one line of log, too"
    assert clouds.requests == []


@pytest.mark.parametrize("name", ["JOB_ID", "AGENT_ID", "AGENT_IMAGE", "TAILSCALE_IP"])
def test_what_could_be_code_is_never_written_for_ansible(
    name: str, good: dict[str, str], tmp_path: Path
) -> None:
    def inventory(value: str) -> int:
        return step(tmp_path, "configure_vm.py", "inventory", **good | {name: value})[0]

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(inventory, HOSTILE)) == {1}
    assert not (tmp_path / "milepost-provisioning").exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("HCLOUD_TOKEN", "HCLOUD_TOKEN is not set"),
        ("AGENT_IMAGE", "AGENT_IMAGE is not set"),
        ("SSH_PRIVATE_KEY", "SSH_PRIVATE_KEY is not set"),
        ("TAILSCALE_OAUTH_SECRET", "TAILSCALE_OAUTH_SECRET is not set"),
    ],
)
def test_a_secret_that_was_forgotten_is_named(
    missing: str, said: str, good: dict[str, str], clouds: Clouds, tmp_path: Path
) -> None:
    code, outputs, _ = step(tmp_path, "provision_vm.py", "create", **good | {missing: ""})
    assert (code, outputs["error"]) == (1, f"Provision VM failed: {said}.")
    assert clouds.servers == {}


def test_a_cloud_that_cannot_be_reached_is_one_readable_line(good: dict[str, str], tmp_path: Path) -> None:
    code, outputs, log = step(
        tmp_path, "provision_vm.py", "create", **good | {"TAILSCALE_BASE_URL": "http://127.0.0.1:1"}
    )
    assert code == 1
    assert outputs["error"] == "Provision VM failed: Tailscale cannot be reached (ConnectionError)."
    assert log.count("\n") == 1
