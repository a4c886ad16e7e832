"""The workflow, from its inputs to the page: every ending, and a receiver that is not there."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.hetzner import HCLOUD_TOKEN, hetzner_error
from tests.provisioning.relay import Relay, State
from tests.provisioning.tailnet import OAUTH
from tests.provisioning.workflow import AGENT_SECRET, DESTROY, PROVISION, SWEEP, Run, Runner
from tests.support.server import KEY, Server, free_port, wait_until

pytestmark = pytest.mark.one_database

SUCCESS = ["provisioning", "vm_created", "ansible_started", "ansible_complete", "running"]
DONE = ["completed"] * 5
CREATING_FAILED = ["completed", "error", "pending", "pending", "pending"]
CONFIGURING_FAILED = ["completed", "completed", "completed", "error", "pending"]


@dataclass
class Scene:
    """One job: its runs, and where it is seen."""

    server: Server
    relay: Relay
    clouds: Clouds
    runner: Runner
    job_id: str
    attempts: int = 0
    log: str = ""

    environment: dict[str, str] = field(default_factory=dict)

    def start(self, play: str = "", workflow: str = PROVISION, **inputs: Any) -> Run:
        self.attempts += 1
        environment = {"PLAY": play, "GITHUB_RUN_ATTEMPT": str(self.attempts), "JOIN_SECONDS": "1"}
        environment |= self.runner.all_installed() | self.environment
        fields = {"job_id": self.job_id, "agent_id": "agent-7"}
        if workflow == PROVISION:
            fields |= {"region": "eu-central", "callback_url": self.relay.url}
        return self.runner.start(fields | inputs, environment, workflow)

    def run(self, play: str = "", **inputs: Any) -> bool:
        """A whole run and what must hold after any: nothing runs on, no secret is left or told."""
        run = self.start(play, **inputs)
        succeeded = run.finish()
        self.assert_clean(run)
        return succeeded

    def assert_clean(self, run: Run) -> None:
        wait_until(lambda: not run.processes())
        self.log = run.log.read_text()
        assert not list(run.folder.rglob("milepost-*"))
        tokens = [*self.clouds.tailnet.tokens, *self.clouds.tailnet.issued]
        for secret in (KEY, HCLOUD_TOKEN, OAUTH["client_secret"], AGENT_SECRET, "PRIVATE KEY", *tokens):
            assert secret not in self.log

    def failure(self) -> dict[str, Any]:
        return self.relay.callbacks[-1]

    def states(self) -> list[str]:
        return self.server.states(self.job_id)

    def assert_a_rerun_succeeds(self) -> None:
        """The same job again: a new attempt, and one server in the end."""
        self.clouds.joins = True
        assert self.run()
        assert self.relay.milestones()[-5:] == SUCCESS
        assert self.states() == DONE
        assert len(self.clouds.servers) == len(self.clouds.devices) == 1


@pytest.fixture
def scene(server: Server, relay: Relay, clouds: Clouds, runner: Runner, job_id: str) -> Scene:
    return Scene(server, relay, clouds, runner, job_id)


REAL_PIP = {"PYTHONPATH": ""}


def test_success_reports_every_milestone_in_order(scene: Scene) -> None:
    scene.environment |= REAL_PIP
    assert scene.run()
    assert scene.relay.milestones() == SUCCESS
    assert scene.states() == DONE
    (number, server) = next(iter(scene.clouds.servers.items()))
    told = {"server_id": str(number), "server_ip": "192.0.2.7", "tailscale_ip": "127.77.0.7"}
    assert scene.relay.callbacks[-1].items() >= (told | {"run_attempt": "1"}).items()
    assert scene.relay.reported("vm_created")["note"] == "cx23 in nbg1"
    assert server["labels"].keys() >= {"milepost-node", "milepost-ready"}
    for milestone in SUCCESS:
        assert f"| Reported {milestone}" in scene.log
    notices = [line for line in scene.log.splitlines() if "::notice" in line]
    assert len(notices) == 1 and scene.server.link(scene.job_id) in notices[0], "the link, once"
    modes = {
        Path(name).name: mode for mode, name in map(str.split, scene.runner.played.read_text().splitlines())
    }
    assert modes == {
        "milepost-provisioning": "700",
        "key": "600",
        "agent.env": "600",
        "inventory.json": "600",
    }


def test_heartbeats_fill_the_time_after_the_first_milestone(scene: Scene) -> None:
    run = scene.start("hangs")
    wait_until(scene.runner.played.exists, within=60)  # the last milestone of this run was reported
    enough = max(scene.relay.heartbeats() + 1, 3)
    wait_until(lambda: scene.relay.heartbeats() >= enough, within=60)
    run.cancel()
    run.finish()
    scene.assert_clean(run)
    said = [callback.get("status") for callback in scene.relay.callbacks]
    assert said[0] == "provisioning" and said[said.index("failed") - 1] is None, "from the first to the end"


def test_a_rerun_that_fails_keeps_the_agent_that_ran(scene: Scene) -> None:
    names = {"job_id": f"{scene.job_id}-".ljust(64, "x")[:63] + "-", "region": "US-East"}
    assert scene.run(**names), "whatever id and region Milepost takes"
    scene.job_id = names["job_id"]
    (kept,) = scene.clouds.servers
    assert not scene.run("fails", **names)
    assert list(scene.clouds.servers) == [kept] and len(scene.clouds.devices) == 1
    said = scene.failure()
    assert said["error"].endswith(f"The server was kept, because an earlier run had it ready: {kept}.")
    assert (said["server_left"], said["server_id"]) == (True, str(kept))
    assert scene.server.page(scene.job_id)["server_left"] is True
    assert scene.states() == CONFIGURING_FAILED


def test_a_refused_creation_is_reported_with_its_reason(scene: Scene) -> None:
    limit = hetzner_error(403, "resource_limit_exceeded", "server limit exceeded")
    scene.clouds.faults["POST servers"] = [limit]
    assert not scene.run()
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert scene.failure().items() >= {"failed_step": "provision", "step": "provision"}.items()
    assert "server limit exceeded" in scene.failure()["error"]
    assert scene.failure()["error"].endswith("No server was left behind.")
    assert scene.failure()["server_left"] is False
    assert scene.states() == CREATING_FAILED
    assert scene.server.page(scene.job_id)["error"] == scene.failure()["error"]
    scene.assert_a_rerun_succeeds()


def test_a_server_that_never_joins_is_deleted(scene: Scene) -> None:
    scene.clouds.joins = False
    assert not scene.run()
    assert "did not join the Tailscale network" in scene.failure()["error"]
    assert scene.failure()["error"].endswith("The server was deleted.")
    assert scene.failure()["server_left"] is False
    assert scene.clouds.servers == {}
    assert scene.states() == CREATING_FAILED


def test_an_agent_that_ends_is_told_in_its_own_last_words(scene: Scene) -> None:
    assert not scene.run("crashes")
    assert scene.relay.milestones() == [*SUCCESS[:3], "failed"]
    assert scene.failure()["failed_step"] == "configure"
    assert "The agent ended after 2 s of 20. Its last lines:\nbroken\n" in scene.failure()["error"]
    assert scene.clouds.is_empty
    assert scene.states() == CONFIGURING_FAILED
    assert "\nbroken\n" in scene.server.page(scene.job_id)["error"]
    scene.assert_a_rerun_succeeds()


def test_a_server_that_cannot_be_deleted_is_named(scene: Scene) -> None:
    scene.clouds.faults["DELETE servers/ID"] = [hetzner_error(403, "forbidden", "insufficient permissions")]
    assert not scene.run("fails")
    (left,) = scene.clouds.servers
    assert "“Install Docker, the firewall and automatic updates”: No package" in scene.failure()["error"]
    assert f"Server {left} may be left behind" in scene.failure()["error"]
    assert scene.failure()["server_id"] == str(left)
    assert "server_left" not in scene.failure(), "which is not known"
    scene.assert_a_rerun_succeeds()


def test_cancelling_in_the_middle_deletes_the_server_and_says_so(scene: Scene) -> None:
    run = scene.start("hangs")
    wait_until(scene.runner.played.exists, within=60)
    run.cancel()
    assert not run.finish()
    scene.assert_clean(run)
    assert scene.relay.milestones() == [*SUCCESS[:3], "failed"]
    assert scene.failure()["failed_step"] == "cancelled"
    assert scene.failure()["error"] == "The run was cancelled. The server was deleted."
    assert scene.failure()["server_left"] is False
    assert scene.clouds.servers == {}
    assert scene.states() == [*CONFIGURING_FAILED[:3], "cancelled", "pending"]
    scene.assert_a_rerun_succeeds()


def test_a_runner_that_vanishes_leaves_a_server_which_the_rerun_adopts(scene: Scene) -> None:
    run = scene.start("hangs")
    wait_until(scene.runner.played.exists, within=60)
    run.kill()
    shutil.rmtree(run.folder / "cache")
    (left,) = scene.clouds.servers
    scene.assert_a_rerun_succeeds()
    assert list(scene.clouds.servers) == [left]


@pytest.mark.parametrize(("state", "play"), [("down", "fails"), ("hanging", ""), ("failing", "")])
def test_the_receiver_does_not_touch_the_run(scene: Scene, state: State, play: str) -> None:
    scene.relay.state = lambda _: state
    scene.environment |= {"RETRY_SECONDS": "1", "HEARTBEAT_SECONDS": "30"}  # else 10, and 120 at the end
    assert scene.run(play) == (play == "")
    assert len(scene.clouds.servers) == len(scene.clouds.devices) == (play == "")
    assert "::warning" in scene.log


def test_nobody_listening_from_start_to_end_does_not_touch_the_run(scene: Scene) -> None:
    scene.environment["RETRY_SECONDS"] = "1"
    assert scene.run(callback_url=f"http://127.0.0.1:{free_port()}/")


def test_a_receiver_that_is_away_in_the_middle_sees_the_end(scene: Scene) -> None:
    away = {"vm_created", "ansible_started"}
    scene.relay.state = lambda callback: "down" if callback.get("step") in away else "up"
    assert scene.run()
    assert scene.relay.milestones() == ["provisioning", "ansible_complete", "running"]
    assert scene.states() == DONE


def test_a_run_that_fails_before_the_server_says_that_there_is_none(scene: Scene) -> None:
    scene.environment |= REAL_PIP | {"PIP_IGNORE_INSTALLED": "1"}  # and there is no index to install from
    assert not scene.run()
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert scene.failure()["failed_step"] == scene.failure()["step"] == "unknown"
    assert scene.failure()["error"] == "Install the Hetzner client failed. This run created no server."
    assert scene.clouds.requests == []


@pytest.mark.parametrize("inputs", [{"agent_id": "x\n::error::{{ 7 * 7 }}\"'$(id)"}, {"region": "moon';id"}])
def test_bad_input_is_refused_with_its_reason_before_anything_exists(
    scene: Scene, inputs: dict[str, str]
) -> None:
    assert not scene.run(**inputs)
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert next(iter(inputs)) in scene.failure()["error"]
    assert scene.failure()["failed_step"] == "provision"
    assert scene.failure()["server_left"] is False
    assert "POST servers" not in scene.clouds.requests
    assert scene.clouds.tailnet.issued == set() and scene.clouds.servers == {}


def test_a_bad_job_id_reaches_nobody(scene: Scene) -> None:
    assert not scene.run(job_id='x", "status": "running')
    assert scene.relay.milestones() == ["provisioning", "failed"], "which Milepost refused"
    assert scene.clouds.requests == []


def test_the_first_job_reports_only_where_it_has_the_key(scene: Scene) -> None:
    scene.runner.drop_key_of_first_job()
    assert scene.run()
    assert scene.relay.milestones() == SUCCESS, "then the second job begins with it"


def test_a_dry_run_orders_and_reports_nothing(scene: Scene) -> None:
    assert not scene.run(dry_run="true")
    assert "cannot be asked for" in scene.log, "of an image that is nowhere"
    assert "may give tag:ci and tag:agent" in scene.log
    assert scene.relay.callbacks == []
    assert scene.clouds.is_empty and scene.clouds.tailnet.keys == {}


def test_an_agent_is_destroyed_and_the_sweep_finds_nothing_left(scene: Scene) -> None:
    assert scene.run()
    scene.environment |= REAL_PIP
    scene.clouds.tailnet.add("agent-0123456789ab", ["100.64.1.1"], tags=["tag:agent"])
    assert scene.run(workflow=DESTROY, job_id="")
    assert scene.clouds.servers == {} and len(scene.clouds.devices) == 1
    assert scene.run(workflow=SWEEP, days="7", delete="false")
    assert "device agent-0123456789ab: its server is gone" in scene.log
    assert len(scene.clouds.devices) == 1
    assert scene.run(workflow=SWEEP, days="7", delete="true")
    assert scene.clouds.devices == {}
