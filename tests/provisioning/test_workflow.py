"""The workflow, from its inputs to the page: every ending, and a receiver that is not there."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.provisioning.clouds import HCLOUD_TOKEN, OAUTH, Answer, Clouds, hetzner_error
from tests.provisioning.relay import Relay, State
from tests.provisioning.workflow import AGENT_SECRET, Run, Runner
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

    def start(self, play: str = "", url: str = "", **inputs: str) -> Run:
        self.attempts += 1
        environment = {"PLAY": play, "GITHUB_RUN_ATTEMPT": str(self.attempts), "JOIN_SECONDS": "1"}
        environment |= self.environment
        fields = {"job_id": self.job_id} | inputs
        return self.runner.start(url or self.relay.url, environment, **fields)

    def run(self, play: str = "", url: str = "", **inputs: str) -> bool:
        """A whole run and what must hold after any: nothing runs on, no secret is left or told."""
        run = self.start(play, url, **inputs)
        succeeded = run.finish()
        self.assert_clean(run)
        return succeeded

    def assert_clean(self, run: Run) -> None:
        wait_until(lambda: not run.processes())
        self.log = run.log.read_text()
        assert not list(run.folder.rglob("milepost-*"))
        tokens = [*self.clouds.tokens, *self.clouds.issued]
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


def test_success_reports_every_milestone_in_order(scene: Scene) -> None:
    assert scene.run()
    assert scene.relay.milestones() == SUCCESS
    assert scene.states() == DONE
    assert (
        scene.relay.callbacks[-1].items()
        >= {
            "server_id": str(next(iter(scene.clouds.servers))),
            "server_ip": "192.0.2.7",
            "tailscale_ip": "127.77.0.7",
            "run_attempt": "1",
        }.items()
    )
    modes = {
        Path(name).name: mode for mode, name in map(str.split, scene.runner.played.read_text().splitlines())
    }
    assert modes == {
        "milepost-provisioning": "700",
        "key": "600",
        "agent.env": "600",
        "inventory.json": "600",
    }


REFUSED: dict[str, tuple[Answer, str]] = {
    "401": (hetzner_error(401, "unauthorized", "unable to authenticate"), "unable to authenticate"),
    "403": (hetzner_error(403, "resource_limit_exceeded", "server limit exceeded"), "server limit exceeded"),
    "422": (hetzner_error(422, "invalid_input", "unsupported location"), "unsupported location"),
}


@pytest.mark.parametrize(("answer", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_creation_is_reported_with_its_reason(scene: Scene, answer: Answer, reason: str) -> None:
    scene.clouds.faults["POST servers"] = [answer]
    assert not scene.run()
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert scene.failure().items() >= {"failed_step": "provision", "step": "provision"}.items()
    assert reason in scene.failure()["error"]
    assert scene.failure()["error"].endswith("No server was left behind.")
    assert scene.states() == CREATING_FAILED
    assert scene.server.page(scene.job_id)["error"] == scene.failure()["error"]
    scene.assert_a_rerun_succeeds()


@pytest.mark.parametrize(
    "fault",
    [
        hetzner_error(429, "rate_limit_exceeded", "limit of 3600 requests per hour reached"),
        hetzner_error(503, "unavailable", "a service or product is currently not available"),
        hetzner_error(500, "server_error", "an error occurred"),
        (502, None),
    ],
    ids=["429", "503", "500", "502"],
)
def test_a_passing_fault_is_waited_out(scene: Scene, fault: Answer) -> None:
    scene.clouds.faults["POST servers"] = [fault]
    assert scene.run()
    assert len(scene.clouds.servers) == 1


def test_a_lost_answer_does_not_make_a_second_server(scene: Scene) -> None:
    scene.clouds.lose_next_answer_to("POST servers")
    assert scene.run()
    assert len(scene.clouds.servers) == 1


def test_a_server_that_never_joins_is_deleted(scene: Scene) -> None:
    scene.clouds.joins = False
    assert not scene.run()
    assert "did not join the Tailscale network" in scene.failure()["error"]
    assert scene.failure()["error"].endswith("The server was deleted.")
    assert scene.clouds.servers == {}
    assert scene.states() == CREATING_FAILED
    scene.assert_a_rerun_succeeds()


def test_ansible_failing_half_way_names_the_task_and_deletes_the_server(scene: Scene) -> None:
    assert not scene.run("fails")
    assert scene.relay.milestones() == [*SUCCESS[:3], "failed"]
    assert scene.failure()["failed_step"] == "configure"
    assert "“Install Docker, the firewall and automatic updates”: No package" in scene.failure()["error"]
    assert not scene.clouds.servers and not scene.clouds.devices
    assert scene.states() == CONFIGURING_FAILED
    scene.assert_a_rerun_succeeds()


def test_a_server_that_cannot_be_deleted_is_named(scene: Scene) -> None:
    scene.clouds.faults["DELETE servers/ID"] = [hetzner_error(403, "forbidden", "insufficient permissions")]
    assert not scene.run("fails")
    (left,) = scene.clouds.servers
    assert f"Server {left} may be left behind" in scene.failure()["error"]
    assert scene.failure()["server_id"] == str(left)
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


def test_heartbeats_fill_a_long_step(scene: Scene) -> None:
    run = scene.start("hangs")
    wait_until(lambda: scene.relay.heartbeats() >= 3, within=60)
    run.cancel()
    run.finish()
    scene.assert_clean(run)


@pytest.mark.parametrize("play", ["", "fails"])
@pytest.mark.parametrize("state", ["down", "hanging", "failing"])
def test_the_receiver_does_not_touch_the_run(scene: Scene, state: State, play: str) -> None:
    scene.relay.state = lambda _: state
    scene.environment |= {"RETRY_SECONDS": "1", "HEARTBEAT_SECONDS": "30"}  # else 10, and 120 at the end
    assert scene.run(play) == (play == "")
    assert len(scene.clouds.servers) == len(scene.clouds.devices) == (play == "")
    assert "::warning" in scene.log


def test_nobody_listening_from_start_to_end_does_not_touch_the_run(scene: Scene) -> None:
    scene.environment["RETRY_SECONDS"] = "1"
    assert scene.run(url=f"http://127.0.0.1:{free_port()}/")


def test_a_receiver_that_is_away_in_the_middle_sees_the_end(scene: Scene) -> None:
    away = {"vm_created", "ansible_started"}
    scene.relay.state = lambda callback: "down" if callback.get("step") in away else "up"
    assert scene.run()
    assert scene.relay.milestones() == ["provisioning", "ansible_complete", "running"]
    assert scene.states() == DONE


def test_a_run_that_fails_before_the_server_says_that_there_is_none(scene: Scene) -> None:
    scene.environment["PIP_IGNORE_INSTALLED"] = "1"  # and there is no index: nothing can be installed
    assert not scene.run()
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert scene.failure()["failed_step"] == scene.failure()["step"] == "unknown"
    assert scene.failure()["error"].endswith("This run created no server.")
    assert scene.clouds.requests == []
    scene.environment.clear()
    scene.assert_a_rerun_succeeds()


@pytest.mark.parametrize(
    "inputs", [{"agent_id": "$(id)"}, {"agent_id": "x\n::error::{{ 7 * 7 }}\"'"}, {"region": "moon';id"}]
)
def test_bad_input_is_refused_with_its_reason_before_anything_exists(
    scene: Scene, inputs: dict[str, str]
) -> None:
    assert not scene.run(**inputs)
    assert scene.relay.milestones() == ["provisioning", "failed"]
    assert next(iter(inputs)) in scene.failure()["error"]
    assert scene.failure()["failed_step"] == "provision"
    assert scene.clouds.requests == []


def test_a_bad_job_id_reaches_nobody(scene: Scene) -> None:
    assert not scene.run(job_id='x", "status": "running')
    assert scene.relay.milestones() == ["provisioning", "failed"], "which Milepost refused"
    assert scene.clouds.requests == []


def test_bad_input_does_not_delete_the_server_that_a_former_run_made(scene: Scene) -> None:
    assert scene.run()
    assert not scene.run(region="moon")
    assert len(scene.clouds.servers) == 1
