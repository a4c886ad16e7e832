"""The workflow with the real ansible-playbook, over SSH into a machine that is not this one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.machine import HERE, PRIVATE, PUBLIC, Machine, missing
from tests.provisioning.registry import Registry, registry_on
from tests.provisioning.relay import Relay
from tests.provisioning.test_workflow import CONFIGURING_FAILED, DONE, SUCCESS, Scene
from tests.provisioning.workflow import AGENT_SECRET, Runner
from tests.support.server import Server, wait_until


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if lacking := missing():
        pytest.exit(lacking, returncode=2)
    machine = Machine(tmp_path_factory.mktemp("machine") / "root")
    yield machine
    machine.remove()


@pytest.fixture
def registry(machine: Machine) -> Iterator[Registry]:
    with registry_on(HERE, machine.root / "bin/busybox") as registry:
        yield registry


@pytest.fixture
def scene(
    server: Server,
    relay: Relay,
    clouds: Clouds,
    machine: Machine,
    registry: Registry,
    private_key: str,
    tmp_path: Path,
    job_id: str,
) -> Scene:
    clouds.address, clouds.booted = PRIVATE, machine.boot
    runner = Runner(tmp_path, clouds, private_key, tmp_path, registry.image)
    # Ansible's own connections outlive a run by 60 s, which on GitHub ends with its machine.
    short = {"ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=2s"}
    return Scene(server, relay, clouds, runner, job_id, environment=short)


def test_the_playbook_makes_a_bare_server_run_the_agent(
    scene: Scene, machine: Machine, registry: Registry
) -> None:
    registry.away = True
    assert not scene.run(), "half-way there, the agent's image cannot be pulled"
    assert "“Pull the agent's image”" in scene.failure()["error"]
    assert "manifest unknown" in scene.failure()["error"]
    assert scene.relay.milestones() == [*SUCCESS[:3], "failed"]
    assert scene.states() == CONFIGURING_FAILED
    assert not scene.clouds.servers and not scene.clouds.devices

    registry.away = False
    scene.assert_a_rerun_succeeds()
    assert_configured(machine)

    (server,) = scene.clouds.servers
    assert scene.run(), scene.log[-4000:]
    assert "changed=0 " in scene.log, "the second run of the playbook changes nothing"
    assert list(scene.clouds.servers) == [server]
    assert scene.states() == DONE


def assert_configured(machine: Machine) -> None:
    """What the playbook promises, as the machine itself sees it."""
    assert machine.run("cloud-init", "schema", "--config-file", "/whole").startswith("Valid")
    mode, up = (machine.root / "var/log/tailscale").read_text().splitlines()
    assert mode == "600" and up.startswith("up --auth-key=file:")
    assert machine.run("systemctl", "is-enabled", "agent", "nftables", "docker").split() == ["enabled"] * 3
    assert machine.run("systemctl", "is-active", "agent", "nftables", "docker").split() == ["active"] * 3
    assert 'Unattended-Upgrade "1"' in machine.run("apt-config", "dump")
    assert machine.run("stat", "--format", "%a %U", "/etc/agent/agent.env").split() == ["600", "root"]
    agent = wait_until(
        lambda: machine.run("docker", "inspect", "--format", "{{.State.Pid}}", "agent").strip()
    )
    assert (
        machine.run("stat", "--format", "%u", f"/proc/{agent}").split()
        == machine.run("id", "-u", "agent").split()
    )
    assert AGENT_SECRET in machine.run("cat", f"/proc/{agent}/environ").split("\0"), (
        "its environment, as data"
    )
    assert machine.lets_in(PRIVATE) and not machine.lets_in(PUBLIC), "SSH comes in over Tailscale only"
