"""What the steps of the workflow do and refuse by themselves, against the stand-ins."""

import base64
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.hetzner import READ_ONLY_TOKEN, Answer, hetzner_error
from tests.provisioning.registry import Registry, registry_on
from tests.provisioning.steps import Ended, Steps, good

HOSTILE = ['a"b', "a'b", "$(id)", "`id`", "a\nb", "a\r\nb=c", "{{ 7 * 7 }}", "{% raw %}", "a;b", "../a", "-a"]
HOSTILE += ["a b", "é", "a\u2028b", "a" * 256, "!!python/x", "a: b"]
SOME = ["$(id)", "a\r\nb=c", "{{ 7 * 7 }}", "a" * 256]  # where the rule is that of another name


@pytest.fixture
def steps(tmp_path: Path, clouds: Clouds, private_key: str) -> Steps:
    return Steps(tmp_path, good(tmp_path, clouds, private_key))


def create(steps: Steps, **environment: str) -> Ended:
    return steps.run("provision_vm.py", "create", **environment)


def cleanup(steps: Steps, **environment: str) -> Ended:
    return steps.run("provision_vm.py", "cleanup", **environment)


def make_ready(steps: Steps, clouds: Clouds) -> int:
    """A server whose agent ran, made by the first attempt of run 77; its id."""
    assert create(steps).code == 0
    (server,) = clouds.servers
    steps.run("provision_vm.py", "ready", SERVER_ID=str(server))
    return server


# Inputs


@pytest.mark.parametrize(
    ("name", "values"),
    [("JOB_ID", HOSTILE), ("AGENT_ID", SOME), ("REGION", SOME), ("AGENT_IMAGE", HOSTILE)],
)
def test_what_could_be_code_is_refused_before_anything_is_asked_for(
    name: str, values: list[str], steps: Steps, clouds: Clouds
) -> None:
    def refused(value: str) -> Ended:
        return create(steps, **{name: value})

    with ThreadPoolExecutor(2) as pool:
        for end in pool.map(refused, values):
            assert end.outputs.keys() == {"error"}, "one line of output, whatever the value"
            assert name.lower() in end.error.lower()
            assert end.log == f"::error::{end.error.replace('%', '%25')}\n", "one line of log, too"
    assert clouds.requests == []


@pytest.mark.parametrize(
    ("name", "values"),
    [("JOB_ID", SOME), ("AGENT_ID", SOME), ("AGENT_IMAGE", SOME), ("TAILSCALE_IP", HOSTILE)],
)
def test_what_could_be_code_is_never_written_for_ansible(
    name: str, values: list[str], steps: Steps, tmp_path: Path
) -> None:
    def inventory(value: str) -> int:
        return steps.run("configure_vm.py", "inventory", **{name: value}).code

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(inventory, values)) == {1}
    assert not (tmp_path / "milepost-provisioning").exists()


@pytest.mark.parametrize("name", ["HCLOUD_TOKEN", "AGENT_IMAGE", "SSH_PRIVATE_KEY", "TAILSCALE_OAUTH_SECRET"])
def test_a_secret_that_was_forgotten_is_named(name: str, steps: Steps, clouds: Clouds) -> None:
    assert create(steps, **{name: ""}).error == f"Provision VM failed: {name} is not set."
    assert clouds.servers == {}


def test_every_job_and_agent_that_milepost_takes_gets_a_server_of_its_own(
    steps: Steps, clouds: Clouds
) -> None:
    names = ["a", "x" * 64, "job-", "Job_7.", "sha256." + "0" * 48]
    for name in names:
        assert create(steps, JOB_ID=name, AGENT_ID=name).code == 0, name
        assert create(steps, JOB_ID=name, AGENT_ID=name).code == 0, "which the second time finds it"
    assert len(clouds.servers) == len(clouds.devices) == len(names)
    for name in names:
        assert cleanup(steps, JOB_ID=name).outputs["server_left"] == "false"
    assert clouds.is_empty


def test_a_cloud_that_cannot_be_reached_is_one_readable_line(steps: Steps) -> None:
    away = create(steps, TAILSCALE_BASE_URL="http://127.0.0.1:1")
    assert away.error == "Provision VM failed: Tailscale cannot be reached (ConnectionError)."
    away = create(steps, HCLOUD_ENDPOINT="http://127.0.0.1:1", STEP_SECONDS="5.5")
    assert away.error == "Provision VM failed: Hetzner cannot be reached (ConnectionError)."
    assert "Traceback" not in away.log


def written_differently(key: str) -> dict[str, str]:
    lines = key.strip().split("\n")
    return {
        "Windows": key.replace("\n", "\r\n"),
        "two characters": key.replace("\n", "\\n"),
        "two characters, of Windows": key.replace("\n", "\\r\\n"),
        "no last line end": key.rstrip("\n"),
        "one line": " ".join(lines),
        "spaces around": f"\n\n  {key}  \n",
        "quotes": f"'{key}'",
        "indented": "\n".join(f"    {line}" for line in lines),
        "base64": base64.b64encode(key.encode()).decode(),
        "base64, in lines": base64.encodebytes(key.encode()).decode(),
    }


def test_an_ssh_key_is_taken_however_it_was_pasted(
    steps: Steps, clouds: Clouds, private_key: str, tmp_path: Path
) -> None:
    for number, (how, key) in enumerate(written_differently(private_key).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        end = steps.run("configure_vm.py", "inventory", SSH_PRIVATE_KEY=key, RUNNER_TEMP=str(folder))
        assert end.code == 0, how
        assert (folder / "milepost-provisioning/key").read_text() == private_key, how
    assert create(steps, SSH_PRIVATE_KEY=private_key.replace("\n", "\r\n")).code == 0


def test_an_ssh_key_that_cannot_be_used_is_named_for_what_it_is(
    steps: Steps, clouds: Clouds, ssh_keys: dict[str, str]
) -> None:
    for kind, said in {
        "public": "is a public key",
        "with a passphrase": "has a passphrase",
        "with a passphrase, old": "has a passphrase",
        "half": "is only a part of a private key",
        "damaged": "is damaged or cut",
        "PuTTY": "is a key of PuTTY's",
        "certificate": "is a certificate",
        "anything": "is not a private key",
    }.items():
        assert said in create(steps, SSH_PRIVATE_KEY=ssh_keys[kind]).error, kind
    assert clouds.requests == []


def test_an_environment_that_docker_refuses_is_named_by_its_line_alone(steps: Steps, clouds: Clouds) -> None:
    for line, said in {
        "no-equals-secret": "line 2 has no “=”",
        "=secret": "line 2 has no name",
        "A NAME=secret": "line 2 has a space in its name",
        "A=" + "secret" * 12_000: "line 2 is longer than 64 KiB",
    }.items():
        end = create(steps, AGENT_ENVIRONMENT=f"GOOD=1\n{line}\nGOOD=2")
        assert said in end.error
        assert "secret" not in end.log
    assert clouds.requests == []
    assert create(steps, AGENT_ENVIRONMENT="\r\n# a comment\r\n  A=b c\r\nB=\r\n").code == 0


# What Hetzner sells


def taken(end: Ended) -> str:
    assert end.code == 0, end.log
    return end.outputs["taken"]


@pytest.mark.parametrize(
    ("region", "is_taken"),
    [
        ("", "cx23 in nbg1"),
        ("US-East", "cpx11 in ash"),
        ("SIN", "cpx11 in sin"),
        ("new1", "cpx11 in new1"),
        ("af-south", "cpx11 in new1"),
    ],
)
def test_a_region_in_any_case_gets_what_is_sold_there(
    region: str, is_taken: str, steps: Steps, clouds: Clouds
) -> None:
    assert taken(create(steps, REGION=region)) == is_taken
    (server,) = clouds.servers.values()
    assert f"{server['server_type']['name']} in {server['location']['name']}" == is_taken


def test_what_is_sold_out_is_passed_over_in_the_order_of_preference(steps: Steps, clouds: Clouds) -> None:
    clouds.hetzner.sold_out = {("cx23", "nbg1")}
    clouds.hetzner.gone = {("cx23", "fsn1"), ("cx23", "hel1")}
    end = create(steps)
    assert taken(end) == "cpx22 in nbg1"
    assert [line for line in end.log.splitlines() if "rder" in line or "Not available" in line] == [
        "Preparing the order",
        "Ordering a cx23 in fsn1",
        "Not available: cx23 in fsn1: error during placement",
        "Ordering a cx23 in hel1",
        "Not available: cx23 in hel1: error during placement",
        "Ordering a cpx22 in nbg1",
    ]


def test_where_nothing_can_be_ordered_the_reason_names_what_was_tried(steps: Steps, clouds: Clouds) -> None:
    clouds.hetzner.gone = {("cx23", place) for place in ("nbg1", "fsn1", "hel1")}
    assert "sold out: cx23 in nbg1: error during placement; " in create(steps, SERVER_TYPE="cx23").error
    said = create(steps, SERVER_TYPE="cx23, cx33", REGION="us-west").error
    assert "Hetzner has none of cx23, cx33 in hil now" in said
    assert "region is none of eu-central, eu-north, us-east" in create(steps, REGION="mars").error
    assert clouds.servers == {}
    assert taken(create(steps, SERVER_TYPE="cx99 cpx22")) == "cpx22 in nbg1"


@pytest.mark.parametrize(
    "fault",
    [
        hetzner_error(503, "unavailable", "a service or product is currently not available"),
        hetzner_error(500, "server_error", "an error occurred"),
        (502, None),
    ],
    ids=["503", "500", "502"],
)
def test_a_passing_fault_is_waited_out(steps: Steps, clouds: Clouds, fault: Answer) -> None:
    clouds.faults["POST servers"] = [fault]
    assert create(steps).code == 0
    assert len(clouds.servers) == 1


def test_a_lost_answer_does_not_make_a_second_server(steps: Steps, clouds: Clouds) -> None:
    clouds.lose_next_answer_to("POST servers")
    assert create(steps).code == 0
    assert len(clouds.servers) == len(clouds.devices) == 1


def test_a_refusal_is_told_in_the_words_of_hetzner(steps: Steps, clouds: Clouds) -> None:
    assert "unable to authenticate" in create(steps, HCLOUD_TOKEN="another").error
    assert "only allowed to perform GET" in create(steps, HCLOUD_TOKEN=READ_ONLY_TOKEN).error
    assert clouds.servers == {}


# Tailscale


def test_an_oauth_client_may_only_give_what_its_own_tag_owns(steps: Steps, clouds: Clouds) -> None:
    tailnet = clouds.tailnet
    tailnet.tags = ["tag:ci", "tag:agent"]  # "for both tags" may ask for both at once, never for one
    tailnet.owners["tag:agent"] = []
    advice = create(steps).error
    assert "requested tags [tag:agent] are invalid or not permitted" in advice
    assert "exactly the runner's tag" in advice
    tailnet.tags = ["tag:ci"]
    assert "not permitted" in create(steps).error
    assert "not permitted" in create(steps, TAILSCALE_TAG="tag:unknown").error
    tailnet.owners["tag:agent"], tailnet.scopes = ["tag:ci"], ["devices:core"]
    assert "the scopes auth_keys and devices:core" in create(steps).error
    assert clouds.servers == {}
    tailnet.scopes.append("auth_keys")
    assert create(steps).code == 0
    (device,) = clouds.devices.values()
    assert device["tags"] == ["tag:agent"]


def test_a_device_is_the_server_by_more_than_its_name(steps: Steps, clouds: Clouds) -> None:
    clouds.tailnet.devices["0"] = {"id": "0", "nodeId": "n0CNTRL"}  # one that says nothing of itself
    assert create(steps).code == 0
    (device,) = (d for d in clouds.devices.values() if "tags" in d)
    name, genuine = device["hostname"], clouds.address
    clouds.tailnet.add(name, ["100.64.6.66"])  # an insider's
    clouds.tailnet.add(name, ["100.64.6.67"], tags=["tag:agent"])  # of somebody who may give the tag
    clouds.tailnet.add(name, ["100.64.6.68"], tags=["tag:agent"], age=3600)  # older than the server
    again = create(steps)
    assert again.outputs["tailscale_ip"] == genuine
    make_ready(steps, clouds)
    del clouds.devices[device["id"]]
    said = create(steps).error
    assert "its device is no longer in the Tailscale network" in said and "Destroy agent" in said
    assert len(clouds.servers) == 1


def test_of_two_devices_that_could_be_a_new_server_none_is_trusted(steps: Steps, clouds: Clouds) -> None:
    assert create(steps).code == 0
    (device,) = clouds.devices.values()
    (server,) = clouds.servers.values()
    del server["labels"]["milepost-node"]
    clouds.tailnet.add(device["hostname"], ["100.64.6.67"], tags=["tag:agent"])
    assert "none of them is trusted" in create(steps, JOIN_SECONDS="9").error


def test_a_package_key_that_is_not_tailscales_is_refused_before_the_order(
    steps: Steps, clouds: Clouds
) -> None:
    known = "2596A99EAAB33821893C0A79458CA832957F5868"
    end = create(steps, TAILSCALE_PACKAGES_FINGERPRINT="")
    assert f"has not the fingerprint {known}, but {clouds.fingerprint}" in end.error
    clouds.keyring *= 2
    assert "has not the fingerprint" in create(steps).error, "two keys are one too many"
    clouds.keyring = b"<html>"
    assert "but none" in create(steps).error
    assert "404" in create(steps, TAILSCALE_PACKAGES_URL=f"{clouds.url}/packages/x").error
    assert clouds.servers == {} and clouds.tailnet.devices == {}


# The end of a run


def test_a_run_that_fails_deletes_what_it_made_and_keeps_what_was_ready(steps: Steps, clouds: Clouds) -> None:
    assert create(steps).code == 0
    end = cleanup(steps)
    assert end.outputs["result"] == "The server was deleted."
    assert (end.outputs["server_left"], end.outputs["server_id"]) == ("false", "")
    assert clouds.is_empty

    server = make_ready(steps, clouds)
    end = cleanup(steps, GITHUB_RUN_ATTEMPT="2")
    assert end.outputs["result"] == f"The server was kept, because an earlier run had it ready: {server}."
    assert (end.outputs["server_left"], end.outputs["server_id"]) == ("true", str(server))
    assert (
        cleanup(steps, AGENT_ID="$(id)", REGION="mars", GITHUB_RUN_ID="78").outputs["server_left"] == "true"
    )
    assert len(clouds.servers) == len(clouds.devices) == 1

    assert cleanup(steps).outputs["result"] == "The server was deleted.", "of the run that made it"
    assert cleanup(steps).outputs["result"] == "No server was left behind."
    assert cleanup(steps, JOB_ID="$(id)").outputs["server_left"] == "false"


def test_a_server_of_a_version_that_did_not_mark_is_kept(steps: Steps, clouds: Clouds) -> None:
    assert create(steps).code == 0
    (server,) = clouds.servers.values()
    server["labels"] = {"milepost-job": "job-7"}
    assert cleanup(steps).outputs["server_left"] == "true"


def test_a_locked_server_is_waited_for_until_the_time_ends(steps: Steps, clouds: Clouds) -> None:
    assert create(steps).code == 0
    clouds.hetzner.locked = 10
    assert cleanup(steps).outputs["result"] == "The server was deleted."
    assert create(steps).code == 0
    clouds.hetzner.locked = 1_000_000
    end = cleanup(steps, STEP_SECONDS="6", SERVER_ID="4711")
    assert "server is locked" in end.error
    assert end.outputs["result"] == "Server 4711 may be left behind: look for the label milepost-job=job-7."
    assert "server_left" not in end.outputs, "which is not known"


def test_a_device_that_stays_is_told(steps: Steps, clouds: Clouds) -> None:
    assert create(steps).code == 0
    clouds.tailnet.scopes = ["auth_keys", "devices:core:read"]
    end = cleanup(steps)
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
    with steps.running("provision_vm.py", "create", **limit) as process:
        wait_for_line(process, "Waiting for server")
        if by:
            process.send_signal(by)
        log, _ = process.communicate(timeout=15)
    (server,) = clouds.servers
    end = steps.ended(process, log)
    what = f"waiting for server {server} to join the Tailscale network"
    assert end.error == f"Provision VM {said}; what was running: {what}."
    assert end.outputs["server_id"] == str(server)

    clouds.hetzner.locked = 1_000_000
    with steps.running("provision_vm.py", "cleanup", SERVER_ID=str(server)) as process:
        wait_for_line(process, "Hetzner says locked")
        process.send_signal(by or signal.SIGTERM)
        log, _ = process.communicate(timeout=15)
    end = steps.ended(process, log)
    assert f"Server {server} may be left behind" in end.outputs["result"]
    assert "server_left" not in end.outputs


def wait_for_line(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stdout
    assert any(line.startswith(beginning) for line in process.stdout)


def test_a_fault_of_our_own_is_told_with_what_was_running(steps: Steps, clouds: Clouds) -> None:
    clouds.faults["GET v2/tailnet/-/devices"] = [(200, {"devices": [7]})]
    end = create(steps)
    assert "what was running: preparing the order (AttributeError: 'int' object has no" in end.error
    assert "Traceback" in end.log
    clouds.faults["GET v2/tailnet/-/devices"] = [(200, {})]
    assert "its answer is not what its documents say (200)" in create(steps).error


# Ansible


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


# The check that orders nothing


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


# What is left over


def test_destroying_an_agent_deletes_its_servers_and_devices(steps: Steps, clouds: Clouds) -> None:
    make_ready(steps, clouds)
    create(steps, JOB_ID="job-8")
    create(steps, JOB_ID="job-9", AGENT_ID="another")
    one = steps.run("retire.py", "agent", JOB_ID="job-8")
    assert one.code == 0 and len(clouds.servers) == len(clouds.devices) == 2
    both = steps.run("retire.py", "agent", JOB_ID="")
    assert both.code == 0 and len(clouds.servers) == len(clouds.devices) == 1
    assert steps.run("retire.py", "agent", JOB_ID="").outputs["result"] == "There was no such server."
    assert steps.run("retire.py", "agent", AGENT_ID="$(id)").code == 1


def test_the_sweep_lists_what_is_forgotten_and_deletes_only_on_request(steps: Steps, clouds: Clouds) -> None:
    ready = make_ready(steps, clouds)
    for job in ("stale", "fresh"):
        create(steps, JOB_ID=job)
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
