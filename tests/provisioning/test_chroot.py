"""The workflow with the real ansible-playbook, over SSH into a machine that is not this one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.hetzner import Json
from tests.provisioning.machine import HERE, PRIVATE, PUBLIC, Machine, missing
from tests.provisioning.packages import Packages, Signer, packages_on
from tests.provisioning.registry import Registry, registry_on
from tests.provisioning.relay import Relay
from tests.provisioning.test_workflow import CONFIGURING_FAILED, DONE, SUCCESS, Scene
from tests.provisioning.workflow import AGENT_SECRET, Runner
from tests.support.server import Server, wait_until

FOREIGN = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00" + bytes(100)  # of another architecture
WATCHED = "7"  # seconds, where the time is not what is tested


@pytest.fixture(params=["trixie", "bookworm"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if lacking := missing():
        pytest.exit(lacking, returncode=2)
    machine = Machine(tmp_path_factory.mktemp("machine") / "root", request.param)
    yield machine
    machine.remove()


@pytest.fixture
def registry(machine: Machine) -> Iterator[Registry]:
    with registry_on(HERE, machine.root / "bin/busybox") as registry:
        yield registry


@pytest.fixture
def packages(machine: Machine, signer: Signer, tmp_path: Path) -> Iterator[Packages]:
    with packages_on(HERE, machine.suite, tmp_path / "packages", signer) as packages:
        yield packages


@pytest.fixture
def scene(
    server: Server,
    relay: Relay,
    clouds: Clouds,
    machine: Machine,
    registry: Registry,
    packages: Packages,
    private_key: str,
    tmp_path: Path,
    job_id: str,
) -> Scene:
    def boot(user_data: Json) -> None:
        machine.boot(user_data)

    clouds.address, clouds.booted = PRIVATE, boot
    runner = Runner(tmp_path, clouds, private_key, tmp_path, registry.image)
    runner.variables["SERVER_IMAGE"] = {"trixie": "debian-13", "bookworm": "debian-12"}[machine.suite]
    # Ansible's own connections outlive a run by 60 s, which on GitHub ends with its machine.
    special = {"ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=2s", "WATCH_SECONDS": WATCHED}
    special["TAILSCALE_PACKAGES_URL"] = packages.url
    return Scene(server, relay, clouds, runner, job_id, environment=special)


def test_the_playbook_makes_a_bare_server_run_the_agent(
    scene: Scene,
    machine: Machine,
    registry: Registry,
    packages: Packages,
    signer: Signer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """One machine for all of it: to make one takes longer than all else."""
    if machine.suite == "trixie":
        registry.away = True
        assert not scene.run(), "half-way there, the agent's image cannot be pulled"
        assert "“Pull the agent's image”" in scene.failure()["error"]
        assert "manifest unknown" in scene.failure()["error"]
        assert scene.relay.milestones() == [*SUCCESS[:3], "failed"]
        assert scene.states() == CONFIGURING_FAILED
        assert scene.clouds.is_empty
        registry.away = False

    scene.assert_a_rerun_succeeds()
    assert_configured(machine)

    (server,) = scene.clouds.servers
    assert scene.run(), scene.log[-4000:]
    assert "changed=0 " in scene.log, "the second run of the playbook changes nothing"
    assert list(scene.clouds.servers) == [server]
    assert scene.states() == DONE

    assert_docker_outlives_the_firewall(machine, registry)
    assert_patched(machine, packages, signer)
    assert_another_key_is_refused(machine, packages, Signer(tmp_path_factory.mktemp("another")))
    if machine.suite == "bookworm":
        assert_a_dead_agent_is_no_success(scene, machine, registry)


def assert_configured(machine: Machine) -> None:
    """What the playbook promises, as the machine itself sees it."""
    assert machine.run("cloud-init", "schema", "--config-file", "/whole").startswith("Valid")
    assert machine.run("cloud-init", "status").strip() == "status: done", "without a warning"
    mode, up = (machine.root / "var/log/tailscale").read_text().splitlines()
    assert mode == "600" and up.startswith("up --auth-key=file:")
    assert machine.run("dpkg-query", "--show", "--showformat=${Version}", "tailscale") == "1.0"
    machine.fails("which", "gpg")  # with which cloud-init would have asked a key server
    assert machine.run("systemctl", "is-enabled", "agent", "nftables", "docker").split() == ["enabled"] * 3
    assert machine.run("systemctl", "is-active", "agent", "nftables", "docker").split() == ["active"] * 3
    assert machine.run("stat", "--format", "%a %U", "/etc/agent/agent.env").split() == ["600", "root"]
    process = agent_process(machine)
    assert (
        machine.run("stat", "--format", "%u", f"/proc/{process}").split()
        == machine.run("id", "-u", "agent").split()
    )
    environment = machine.run("cat", f"/proc/{process}/environ").split("\0")
    assert AGENT_SECRET in environment, "its environment, as data"
    assert machine.lets_in(PRIVATE) and not machine.lets_in(PUBLIC), "SSH comes in over Tailscale only"


def agent_process(machine: Machine) -> str:
    """Its process id, once it runs."""
    asked = "docker inspect --format '{{.State.Pid}}' agent 2>/dev/null | grep -v '^0' || true"
    return str(wait_until(lambda: machine.run("sh", "-c", asked).strip()))


def assert_docker_outlives_the_firewall(machine: Machine, registry: Registry) -> None:
    """What Debian does to the service at upgrades, and the agent's way out."""
    address = registry.image.split("/")[0]

    def gets_out() -> None:
        machine.run("docker", "exec", "agent", "/busybox", "wget", "-q", "-O", "-", f"http://{address}/v2/")

    gets_out()
    machine.run("systemctl", "restart", "nftables")
    gets_out()
    assert machine.lets_in(PRIVATE) and not machine.lets_in(PUBLIC)
    machine.run("systemctl", "stop", "nftables")
    gets_out()
    assert machine.lets_in(PUBLIC), "and off is off"
    machine.run("systemctl", "start", "nftables")


def assert_patched(machine: Machine, packages: Packages, signer: Signer) -> None:
    """Tailscale's new version comes by itself, and Docker does not stay on a file that is gone."""
    assert 'Unattended-Upgrade "1"' in machine.run("apt-config", "dump")
    assert 'Automatic-Reboot "true"' in machine.run("apt-config", "dump")
    packages.publish("2.0", signer)
    machine.run("apt-get", "update")
    machine.run("unattended-upgrade", "--verbose")
    assert machine.run("dpkg-query", "--show", "--showformat=${Version}", "tailscale") == "2.0"

    before = machine.run("systemctl", "show", "docker", "--value", "--property=MainPID")
    machine.run("sh", "-c", "cd /usr/sbin && cp -p dockerd new && mv new dockerd")
    machine.run("needrestart", "-q", "-r", "a")
    assert machine.run("systemctl", "show", "docker", "--value", "--property=MainPID") != before
    wait_until(lambda: machine.run("systemctl", "is-active", "docker", "agent").split() == ["active"] * 2)
    agent_process(machine)


def assert_another_key_is_refused(machine: Machine, packages: Packages, another: Signer) -> None:
    packages.publish("3.0", another)
    another.close()
    update = ["apt-get", "update", "-o", "APT::Update::Error-Mode=any"]
    assert packages.url in machine.fails(*update)
    assert "3.0" not in machine.run("apt-cache", "policy", "tailscale")


def assert_a_dead_agent_is_no_success(scene: Scene, machine: Machine, registry: Registry) -> None:
    """What runs for a moment does not run; its own last words are the error, without its secrets."""
    busybox, foreign = machine.root / "bin/busybox", machine.root.with_name("foreign")
    foreign.write_bytes(FOREIGN)
    foreign.chmod(0o755)
    says = 'echo broken; echo "$AGENT_TOKEN is mine"; sleep %d; exit 1'
    scene.environment["WATCH_SECONDS"] = "20"
    for tag, program, command, said in (
        ("broken", busybox, ["/busybox", "sh", "-c", says % 0], "broken"),
        ("late", busybox, ["/busybox", "sh", "-c", says % 12], "broken"),
        ("foreign", foreign, None, "exec format error"),
        ("empty", busybox, [], "command"),
    ):
        scene.runner.image = registry.push(program, tag, command)
        assert not scene.run(), tag
        error = scene.server.page(scene.job_id)["error"]
        assert "“See the agent run for a while”" in error and "Its last lines:\n" in error, error
        assert said in error and (said == "broken") == ("broken\n*** is mine" in error), error
        assert AGENT_SECRET.partition("=")[2] not in error
        assert scene.states() == CONFIGURING_FAILED
        assert len(scene.clouds.servers) == 1 and scene.failure()["server_left"] is True
    scene.runner.image, scene.environment["WATCH_SECONDS"] = registry.image, WATCHED
    scene.assert_a_rerun_succeeds()
