"""How a step and a run end: what is deleted, what is kept, and what is said."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.steps import Steps


def test_a_run_that_fails_deletes_what_it_made_and_keeps_what_was_ready(steps: Steps, clouds: Clouds) -> None:
    assert steps.create().code == 0
    end = steps.cleanup()
    assert end.outputs["result"] == "The server was deleted."
    assert (end.outputs["server_left"], end.outputs["server_id"]) == ("false", "")
    assert clouds.is_empty

    server = steps.make_ready(clouds)
    end = steps.cleanup(GITHUB_RUN_ATTEMPT="2")
    assert end.outputs["result"] == f"The server was kept, because an earlier run had it ready: {server}."
    assert (end.outputs["server_left"], end.outputs["server_id"]) == ("true", str(server))
    assert steps.cleanup(AGENT_ID="$(id)", REGION="mars", GITHUB_RUN_ID="78").outputs["server_left"] == "true"
    assert len(clouds.servers) == len(clouds.devices) == 1

    assert steps.cleanup().outputs["result"] == "The server was deleted.", "of the run that made it"
    assert steps.cleanup().outputs["result"] == "No server was left behind."
    assert steps.cleanup(JOB_ID="$(id)").outputs["server_left"] == "false"


def test_a_server_of_a_version_that_did_not_mark_is_kept(steps: Steps, clouds: Clouds) -> None:
    assert steps.create().code == 0
    (server,) = clouds.servers.values()
    server["labels"] = {"milepost-job": "job-7"}
    assert steps.cleanup().outputs["server_left"] == "true"


def test_a_locked_server_is_waited_for_until_the_time_ends(steps: Steps, clouds: Clouds) -> None:
    assert steps.create().code == 0
    clouds.hetzner.locked = 10
    assert steps.cleanup().outputs["result"] == "The server was deleted."
    assert steps.create().code == 0
    clouds.hetzner.locked = 1_000_000
    end = steps.cleanup(STEP_SECONDS="6", SERVER_ID="4711")
    assert "server is locked" in end.error
    assert end.outputs["result"] == "Server 4711 may be left behind: look for the label milepost-job=job-7."
    assert "server_left" not in end.outputs, "which is not known"


def test_a_device_that_stays_is_told(steps: Steps, clouds: Clouds) -> None:
    assert steps.create().code == 0
    clouds.tailnet.scopes = ["auth_keys", "devices:core:read"]
    end = steps.cleanup()
    assert end.outputs["result"].startswith("The server was deleted. Its device agent-")
    assert end.outputs["server_left"] == "false"


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (signal.SIGINT, "was stopped by a signal"),
        (signal.SIGTERM, "was stopped by a signal"),
        (None, "ran out of time"),
    ],
)
def test_whatever_ends_a_step_the_error_says_what_was_running(
    by: signal.Signals | None, said: str, steps: Steps, clouds: Clouds
) -> None:
    clouds.joins = False
    limit = {"JOIN_SECONDS": "60", "STEP_SECONDS": "60" if by else "4"}
    with steps.running("provision_vm.py", "create", **limit) as step:
        wait_for_line(step.process, "Waiting for server")
        if by:
            step.process.send_signal(by)
        end = step.end()
    (server,) = clouds.servers
    what = f"waiting for server {server} to join the Tailscale network"
    assert end.error == f"Provision VM {said}; what was running: {what}."
    assert end.outputs["server_id"] == str(server)

    clouds.hetzner.locked = 1_000_000
    with steps.running("provision_vm.py", "cleanup", SERVER_ID=str(server)) as step:
        wait_for_line(step.process, "Hetzner says locked")
        step.process.send_signal(by or signal.SIGTERM)
        end = step.end()
    assert f"Server {server} may be left behind" in end.outputs["result"]
    assert "server_left" not in end.outputs


def wait_for_line(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stdout
    assert any(line.startswith(beginning) for line in process.stdout)


def test_a_fault_of_our_own_is_told_with_what_was_running(steps: Steps, clouds: Clouds) -> None:
    clouds.faults["GET v2/tailnet/-/devices"] = [(200, {"devices": [7]})]
    end = steps.create()
    assert "what was running: preparing the order (AttributeError: 'int' object has no" in end.error
    assert "Traceback" in end.log
    clouds.faults["GET v2/tailnet/-/devices"] = [(200, {})]
    assert "its answer is not what its documents say (200)" in steps.create().error


@pytest.fixture
def configured(steps: Steps, programs: Path, tmp_path: Path) -> Steps:
    """With an inventory, and the stand-in for Ansible's program."""
    steps.given["PATH"] = f"{programs}:{steps.given['PATH']}"
    steps.given |= {"PLAYED": str(tmp_path / "played"), "AGENT_ENVIRONMENT": "TOKEN=hunter2hunter2\nA=b"}
    assert steps.run("configure_vm.py", "inventory").code == 0
    return steps


def test_an_error_of_ansibles_is_told_in_whatever_form_it_comes(configured: Steps) -> None:
    def said(play: str) -> str:
        end = configured.run("configure_vm.py", "run", PLAY=play)
        assert "Traceback" not in end.log
        return end.error.removeprefix("Configure VM with Ansible failed: Ansible failed ")

    assert said("fails") == (
        "at “Install Docker, the firewall and automatic updates”: No package matching 'docker.io'."
    )
    assert said("garbles") == "at “Pull [it]”: this is \ufffd no JSON."
    assert said("breaks") == "before its first task: ERROR! the playbook: no hosts."
    assert said("crashes") == (
        "at “See the agent run for a while”: The agent ended after 2 s of 20. Its last lines:\n"
        "broken\nmy token is ***."
    )


def test_ansible_ends_with_its_step(configured: Steps) -> None:
    end = configured.run("configure_vm.py", "run", PLAY="hangs", STEP_SECONDS="1")
    what = "the task “Install Docker, the firewall and automatic updates”"
    assert end.error == f"Configure VM with Ansible ran out of time; what was running: {what}."
