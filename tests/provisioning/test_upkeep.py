"""The check that orders nothing, and what finds and removes what is left over."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.hetzner import READ_ONLY_TOKEN
from tests.provisioning.registry import Registry, registry_on
from tests.provisioning.steps import Steps


@pytest.fixture
def registry() -> Iterator[Registry]:
    with registry_on("127.0.0.1", Path(shutil.which("true") or "/bin/true")) as registry:
        yield registry


def test_the_check_orders_nothing_and_names_what_is_well(
    steps: Steps, clouds: Clouds, registry: Registry
) -> None:
    registry.needs_token = True
    end = steps.run("check_setup.py", "setup", AGENT_IMAGE=registry.image, AGENT_ENVIRONMENT="A=b")
    assert end.code == 0, end.log
    assert end.summary.count("✅") == 10 and "❌" not in end.summary
    assert "cx23 in nbg1" in end.summary and "may give tag:ci and tag:agent" in end.summary
    assert clouds.is_empty and clouds.tailnet.keys == {}
    for token in clouds.tailnet.issued:
        assert token not in end.log


def test_the_check_finds_all_that_is_wrong_at_once(steps: Steps, clouds: Clouds, registry: Registry) -> None:
    registry.away = True
    clouds.tailnet.tags = ["tag:ci", "tag:agent"]
    clouds.keyring = b""
    end = steps.run(
        "check_setup.py",
        "setup",
        AGENT_IMAGE=registry.image,
        AGENT_ENVIRONMENT="no value",
        CALLBACK_SECRET="",
        HCLOUD_TOKEN=READ_ONLY_TOKEN,
        REGION="mars",
        SSH_PRIVATE_KEY="ssh-ed25519 AAAA me",
        SERVER_IMAGE="debian-11",
    )
    for said in (
        "GH_CALLBACK_SECRET is not set",
        "is a public key",
        "line 1 has no “=”",
        "needs Read & Write",
        "region is none of",
        "SERVER_IMAGE is neither",
        "not permitted",
        "cannot be pulled without a login (404)",
    ):
        assert said in end.error or said in end.log, said
    assert clouds.servers == {} and clouds.tailnet.keys == {}


def test_the_check_sees_missing_scopes_and_another_architecture(
    steps: Steps, clouds: Clouds, registry: Registry
) -> None:
    clouds.tailnet.scopes = ["auth_keys", "devices:core:read"]
    end = steps.run("check_setup.py", "setup", AGENT_IMAGE=registry.image, SERVER_TYPE="cax11")
    assert "the OAuth client lacks the scope devices:core (write)" in end.error
    assert f"{registry.image} is for amd64; a cax11 needs arm64" in end.error


def test_destroying_an_agent_deletes_its_servers_and_devices(steps: Steps, clouds: Clouds) -> None:
    steps.make_ready(clouds)
    steps.create(JOB_ID="job-8")
    steps.create(JOB_ID="job-9", AGENT_ID="another")
    one = steps.run("retire.py", "agent", JOB_ID="job-8")
    assert one.code == 0 and len(clouds.servers) == len(clouds.devices) == 2
    both = steps.run("retire.py", "agent", JOB_ID="")
    assert both.code == 0 and len(clouds.servers) == len(clouds.devices) == 1
    assert steps.run("retire.py", "agent", JOB_ID="").outputs["result"] == "There was no such server."
    assert steps.run("retire.py", "agent", AGENT_ID="$(id)").code == 1


def test_the_sweep_lists_what_is_forgotten_and_deletes_only_on_request(steps: Steps, clouds: Clouds) -> None:
    ready = steps.make_ready(clouds)
    for job in ("stale", "fresh"):
        steps.create(JOB_ID=job)
    old, fresh = (s for s in clouds.servers.values() if s["id"] != ready)
    for server in (clouds.servers[ready], old):
        server["labels"]["milepost-claimed"] = "1700000000"
    clouds.tailnet.add("agent-0123456789ab", ["100.64.1.1"], tags=["tag:agent"])
    clouds.tailnet.add("agent-of-somebody", ["100.64.1.2"], tags=["tag:agent"])

    end = steps.run("retire.py", "sweep")
    assert end.outputs == {"servers": "2", "unready": "1", "devices": "1"}
    assert f"server {ready} of agent agent-7, job job-7: an agent ran on it" in end.summary
    assert f"server {old['id']} of agent agent-7, job stale: it never became ready" in end.summary
    assert "device agent-0123456789ab: its server is gone" in end.log
    assert len(clouds.servers) == 3 and len(clouds.devices) == 5

    assert steps.run("retire.py", "sweep", DELETE="true").code == 0
    assert set(clouds.servers) == {ready, fresh["id"]}
    assert {d["hostname"] for d in clouds.devices.values()} >= {"agent-of-somebody"}
    assert len(clouds.devices) == 3
