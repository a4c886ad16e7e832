"""Create or destroy the server of a job: a Hetzner Cloud server in a Tailscale network.

    python3 provision_vm.py create     outputs server_id, server_ip, tailscale_ip
    python3 provision_vm.py destroy    outputs result, a sentence; server_id if one is left

A label carries the job id: `create` adopts the server that a former run of the job left, and
`destroy` finds it whether or not its id was ever handed on.
"""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import requests
from hcloud import APIException, Client, HCloudException
from hcloud.images import Image
from hcloud.locations import Location
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer
from runner import ProvisioningError, agent_image, identifier, output, run, setting
from tailscale import KEY_SECONDS, Tailscale

LABEL = "milepost-job"
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LOCATIONS = {
    "eu-central": "nbg1",
    "eu-north": "hel1",
    "us-east": "ash",
    "us-west": "hil",
    "ap-southeast": "sin",
} | {location: location for location in ("fsn1", "nbg1", "hel1", "ash", "hil", "sin")}
IMAGE = "debian-12"
ADMIN = "provisioner"
KEY_FILE = "/run/tailscale-auth-key"
CALL_SECONDS = 30
PAUSES = (1, 4, 10)
PASSING = {"uniqueness_error", "server_error", "service_error", "unavailable", "locked", 500, 503}

T = TypeVar("T")


def create() -> None:
    """Have the job's server run and join, or raise ProvisioningError."""
    job_id, agent_id, place = wanted()
    public_key, _ = ssh_public_key(), agent_image()
    hetzner, tailscale, name = client(), Tailscale(), hostname(job_id)

    def obtain() -> BoundServer:
        for server in servers(hetzner, job_id):
            if may_join(server) or tailscale.devices(name):
                return server
            delete_all([server])
        return order(hetzner, tailscale, name, place, public_key, labels)

    labels = {LABEL: job_id} | ({"milepost-agent": agent_id} if LABEL_VALUE.fullmatch(agent_id) else {})
    server = asked(lambda: persist(obtain))
    address = server.public_net.ipv4 if server.public_net else None
    output(server_id=server.id, server_ip=address.ip if address else "")
    print(f"Server {server.id} is there; waiting for it to join the network", flush=True)
    output(tailscale_ip=tailscale.address(name, float(setting("JOIN_SECONDS", "300"))))


def destroy() -> None:
    """Delete whatever the job has, and say what could not be deleted."""
    try:
        job_id, _, _ = wanted()
    except ProvisioningError:  # `create` refused it, too; a server that a former run made is not its own
        output(result="Nothing had been created.")
        return
    try:
        hetzner = client()
        gone = asked(lambda: persist(lambda: delete_all(servers(hetzner, job_id))))
    except ProvisioningError as problem:
        server = f"Server {setting('SERVER_ID', '')}".strip()
        output(result=f"{server} may be left behind: look for the label {LABEL}={job_id}.")
        raise ProvisioningError(f"the server could not be deleted: {problem}") from problem
    leave_network(job_id)  # last: a server that is still there can then be adopted by a re-run
    output(server_id="", result="The server was deleted." if gone else "No server was left behind.")


def leave_network(job_id: str) -> None:
    """Remove the job's device; one that stays is ephemeral, and Tailscale removes it later."""
    try:
        Tailscale().remove(hostname(job_id))
    except ProvisioningError as problem:
        print(f"::warning::The device was left to expire: {problem}", flush=True)


def wanted() -> tuple[str, str, str]:
    """Return job id, agent id and location, or raise ProvisioningError: nothing else gets further."""
    return job(), identifier("AGENT_ID"), location()


def job() -> str:
    """Return the job id where it can be a label: https://docs.hetzner.cloud/reference/cloud#labels."""
    job_id = identifier("JOB_ID")
    if not LABEL_VALUE.fullmatch(job_id):
        raise ProvisioningError(f"job_id must end in a letter or digit and have at most 63: {job_id!r}")
    return job_id


def location() -> str:
    """Return the Hetzner location of REGION, which may be empty."""
    region = setting("REGION", "eu-central")
    if region not in LOCATIONS:
        raise ProvisioningError(f"region is none of {', '.join(LOCATIONS)}: {region[:80]!r}")
    return LOCATIONS[region]


def hostname(job_id: str) -> str:
    """Return a name that Hetzner, DNS and Tailscale accept unchanged, for any job id."""
    return "agent-" + hashlib.sha256(job_id.encode()).hexdigest()[:12]


def ssh_public_key() -> str:
    """Return the public half of SSH_PRIVATE_KEY, which never touches a file here."""
    key = setting("SSH_PRIVATE_KEY").strip() + "\n"
    command = ["ssh-keygen", "-y", "-P", "", "-f", "/dev/stdin"]
    made = subprocess.run(command, input=key, capture_output=True, text=True, check=False)
    if made.returncode:
        raise ProvisioningError("SSH_PRIVATE_KEY is not a private key without a passphrase")
    return made.stdout.strip()


def client() -> Client:
    """Return Hetzner's client; it repeats by itself after 429, 502, 504 and time-outs."""
    endpoint = setting("HCLOUD_ENDPOINT", "https://api.hetzner.cloud/v1")
    return Client(setting("HCLOUD_TOKEN"), endpoint, "milepost", timeout=CALL_SECONDS)


def asked(call: Callable[[], T]) -> T:
    """Return what Hetzner answers; whatever goes wrong becomes one readable line."""
    try:
        return call()
    except HCloudException as refusal:
        raise ProvisioningError(f"Hetzner refused: {refusal}") from refusal
    except requests.RequestException as problem:
        raise ProvisioningError(f"Hetzner cannot be reached ({type(problem).__name__})") from problem


def persist(work: Callable[[], T]) -> T:
    """Repeat what a passing fault broke; `work` first looks at what a lost answer may have done."""
    for pause in PAUSES:
        try:
            return work()
        except APIException as fault:
            if fault.code not in PASSING:
                raise
        except requests.ConnectionError:
            pass
        time.sleep(pause)
    return work()


def servers(hetzner: Client, job_id: str) -> list[BoundServer]:
    """Return the job's servers."""
    return hetzner.servers.get_all(label_selector=f"{LABEL}={job_id}")


def may_join(server: BoundServer) -> bool:
    """Say whether the auth key that a server was born with can still be good."""
    age = datetime.now(UTC) - server.created if server.created else timedelta()
    return age < timedelta(seconds=KEY_SECONDS)


def order(
    hetzner: Client, tailscale: Tailscale, name: str, place: str, public_key: str, labels: dict[str, str]
) -> BoundServer:
    """Create the server; its id is handed on before anything can go wrong with it."""
    tailscale.remove(name)
    made = hetzner.servers.create(
        name=name,
        server_type=ServerType(name=setting("SERVER_TYPE", "cx23")),
        image=Image(name=IMAGE),
        location=Location(name=place),
        labels=labels,
        user_data=cloud_config(name, public_key, tailscale.auth_key()),
    )
    output(server_id=made.server.id)
    for action in [made.action, *made.next_actions]:
        action.wait_until_finished()
    return made.server


def delete_all(doomed: list[BoundServer]) -> int:
    """Delete servers, wait until they are gone, and return how many they were."""
    for server in doomed:
        output(server_id=server.id)
        try:
            server.delete().wait_until_finished()
        except APIException as refusal:
            if refusal.code != "not_found":
                raise
    return len(doomed)


def cloud_config(name: str, public_key: str, auth_key: str) -> str:
    """Return what the new server does at its first boot: let Ansible in, join the network.

    https://cloudinit.readthedocs.io/en/latest/reference/modules.html; JSON is YAML, too. A user
    of its own, since Hetzner lets root's password expire, which locks keys out as well.
    """
    up = ["tailscale", "up", f"--auth-key=file:{KEY_FILE}", f"--hostname={name}"]
    admin = {"name": ADMIN, "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL"}
    repository = {
        "source": "deb https://pkgs.tailscale.com/stable/debian bookworm main",
        "keyid": "2596A99EAAB33821893C0A79458CA832957F5868",
    }
    config = {
        "users": [admin | {"ssh_authorized_keys": [public_key]}],
        "ssh_pwauth": False,
        "apt": {"sources": {"tailscale.list": repository}},
        "packages": ["tailscale"],
        "write_files": [{"path": KEY_FILE, "permissions": "0600", "content": auth_key}],
        "runcmd": [up, ["rm", "-f", KEY_FILE]],
    }
    return "#cloud-config\n" + json.dumps(config)


if __name__ == "__main__":
    run({"create": ("Provision VM", create), "destroy": ("Delete the server", destroy)})
