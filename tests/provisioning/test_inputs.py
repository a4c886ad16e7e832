"""What a run is given: what is refused before anything is asked for, and what is mended."""

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds
from tests.provisioning.steps import Ended, Steps

HOSTILE = ['a"b', "a'b", "$(id)", "`id`", "a\nb", "a\r\nb=c", "{{ 7 * 7 }}", "{% raw %}", "a;b", "../a", "-a"]
HOSTILE += ["a b", "é", "a\u2028b", "a" * 256, "!!python/x", "a: b"]
SOME = ["$(id)", "a\r\nb=c", "{{ 7 * 7 }}", "a" * 256]  # where the rule is that of another name


@pytest.mark.parametrize(
    ("name", "values"),
    [("JOB_ID", HOSTILE), ("AGENT_ID", SOME), ("REGION", SOME), ("AGENT_IMAGE", HOSTILE)],
)
def test_what_could_be_code_is_refused_before_anything_is_asked_for(
    name: str, values: list[str], steps: Steps, clouds: Clouds
) -> None:
    def refused(value: str) -> Ended:
        return steps.create(**{name: value})

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
    assert steps.create(**{name: ""}).error == f"Provision VM failed: {name} is not set."
    assert clouds.servers == {}


def test_every_job_and_agent_that_milepost_takes_gets_a_server_of_its_own(
    steps: Steps, clouds: Clouds
) -> None:
    names = ["a", "x" * 64, "job-", "Job_7.", "sha256." + "0" * 48]
    for name in names:
        assert steps.create(JOB_ID=name, AGENT_ID=name).code == 0, name
        assert steps.create(JOB_ID=name, AGENT_ID=name).code == 0, "which the second time finds it"
    assert len(clouds.servers) == len(clouds.devices) == len(names)
    for name in names:
        assert steps.cleanup(JOB_ID=name).outputs["server_left"] == "false"
    assert clouds.is_empty


def test_a_cloud_that_cannot_be_reached_is_one_readable_line(steps: Steps) -> None:
    away = steps.create(TAILSCALE_BASE_URL="http://127.0.0.1:1")
    assert away.error == "Provision VM failed: Tailscale cannot be reached (ConnectionError)."
    away = steps.create(HCLOUD_ENDPOINT="http://127.0.0.1:1", STEP_SECONDS="5.5")
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
    assert steps.create(SSH_PRIVATE_KEY=private_key.replace("\n", "\r\n")).code == 0


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
        assert said in steps.create(SSH_PRIVATE_KEY=ssh_keys[kind]).error, kind
    assert clouds.requests == []


def test_an_environment_that_docker_refuses_is_named_by_its_line_alone(steps: Steps, clouds: Clouds) -> None:
    for line, said in {
        "no-equals-secret": "line 2 has no “=”",
        "=secret": "line 2 has no name",
        "A NAME=secret": "line 2 has a space in its name",
        "A=" + "secret" * 12_000: "line 2 is longer than 64 KiB",
    }.items():
        end = steps.create(AGENT_ENVIRONMENT=f"GOOD=1\n{line}\nGOOD=2")
        assert said in end.error
        assert "secret" not in end.log
    assert clouds.requests == []
    assert steps.create(AGENT_ENVIRONMENT="\r\n# a comment\r\n  A=b c\r\nB=\r\n").code == 0
