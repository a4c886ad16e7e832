"""Make the server of a job ready for its configuration, or clean up after a run that failed.

    python3 provision_vm.py create     outputs server_id, server_ip, tailscale_ip, taken
    python3 provision_vm.py ready      marks the server: a run that fails later on keeps it
    python3 provision_vm.py cleanup    outputs result, a sentence; server_left, true, false or nothing

A label carries the job id: `create` adopts the server that a former run of the job left, and
`cleanup` finds it whether or not its id was ever handed on.
"""

from datetime import timedelta

import hetzner
import inputs
from cloud_config import cloud_config, packages_key
from hcloud import Client
from hcloud.servers import BoundServer
from runner import ProvisioningError, Step, StoppedError, doing, output, run, say, seconds, setting
from tailscale import KEY_SECONDS, OLDEST, Tailscale

MINUTE = 60.0


def create() -> None:
    """Have the job's server run and join, or raise ProvisioningError."""
    job_id, agent_id, region = inputs.identifier("JOB_ID"), inputs.identifier("AGENT_ID"), region_of()
    public_key = inputs.public_key()
    for check in (inputs.agent_image, inputs.agent_environment, hetzner.image):
        check()
    cloud, name = hetzner.client(), inputs.hostname(job_id)
    doing("asking Tailscale for access")
    tailscale = Tailscale()
    labels = {hetzner.JOB: inputs.label(job_id), hetzner.AGENT: inputs.label(agent_id)}

    def obtain() -> BoundServer:
        doing("looking for a server that the job already has")
        if server := adopt(cloud, tailscale, job_id):
            return server
        doing("asking Hetzner what is available")
        offers = hetzner.offers(cloud, region)
        doing("preparing the order")
        tailscale.remove(name)
        config = cloud_config(name, public_key, tailscale.auth_key()[1], packages_key())
        made = labels | {hetzner.RUN: hetzner.this_run(), hetzner.CLAIMED: hetzner.now()}
        return hetzner.order(cloud, offers, name, config, made)

    server = hetzner.asked(lambda: hetzner.persist(obtain, hetzner.ORDER_SECONDS))
    output(server_id=server.id, server_ip=next(hetzner.addresses(server), ""))
    join(cloud, tailscale, server, name)


def join(cloud: Client, tailscale: Tailscale, server: BoundServer, name: str) -> None:
    """Wait until the server is in the network, and note which node it is there."""
    doing(f"waiting for server {server.id} to join the Tailscale network")
    node = (server.labels or {}).get(hetzner.NODE, "")
    limit = seconds("JOIN_SECONDS", 300)
    node, address = tailscale.joined(name, server.created or OLDEST, node, limit)
    doing(f"marking server {server.id}")
    hetzner.asked(
        lambda: hetzner.persist(
            lambda: hetzner.mark(
                cloud.servers.get_by_id(int(server.id or 0)), node=node, claimed=hetzner.now()
            ),
            MINUTE,
        )
    )
    output(tailscale_ip=address)


def region_of() -> str:
    """Return REGION, which may be empty."""
    return inputs.identifier("REGION") if setting("REGION", "") else "eu-central"


def adopt(cloud: Client, tailscale: Tailscale, job_id: str) -> BoundServer | None:
    """Return the server that the job has already, if it can be used; delete one that cannot and never was."""
    name = inputs.hostname(job_id)
    for server in sorted(hetzner.servers(cloud, hetzner.JOB, job_id), key=hetzner.is_ready, reverse=True):
        node = (server.labels or {}).get(hetzner.NODE, "")
        if tailscale.devices(name, server.created or OLDEST, node):
            return server
        if hetzner.is_ready(server):
            raise ProvisioningError(
                f"server {server.id} was ready, but its device is no longer in the Tailscale network, so "
                "that SSH cannot reach it. Remove it with the workflow “Destroy agent”, then run this again"
            )
        if not node and hetzner.age(server) < timedelta(seconds=KEY_SECONDS):
            return server  # the key that it was born with may still be good
        doing(f"deleting server {server.id}, which never became ready")
        hetzner.delete([server])
    return None


def ready() -> None:
    """Mark the server; the agent runs, so nothing that goes wrong here may fail the run."""
    try:
        server = int(setting("SERVER_ID"))
        cloud = hetzner.client()
        hetzner.asked(
            lambda: hetzner.persist(
                lambda: hetzner.mark(cloud.servers.get_by_id(server), ready=hetzner.now()), MINUTE
            )
        )
    except (ProvisioningError, StoppedError, ValueError) as problem:
        say(
            "warning",
            f"The server could not be marked as ready; a later run that fails may delete it: {problem}",
        )


def cleanup() -> None:
    """Delete what this run made or what never became ready; keep the rest, and say which it was."""
    try:
        job_id = inputs.identifier("JOB_ID")
    except ProvisioningError:  # `create` refused it, too, as does Milepost
        output(result="No server was left behind.", server_left="false")
        return
    try:
        cloud = hetzner.client()
        gone, kept = hetzner.asked(
            lambda: hetzner.persist(lambda: delete_unready(cloud, job_id), float("inf"))
        )
    except (ProvisioningError, StoppedError) as problem:
        server = f"Server {setting('SERVER_ID', '')}".strip()
        place = f"look for the label {hetzner.JOB}={inputs.label(job_id)}"
        output(result=f"{server} may be left behind: {place}.")
        raise ProvisioningError(f"the server could not be deleted ({problem}): {place}") from problem
    if kept:
        output(
            server_id=hetzner.ids(kept),
            server_left="true",
            result=f"The server was kept, because an earlier run had it ready: {hetzner.ids(kept)}.",
        )
        return
    result = "The server was deleted." if gone else "No server was left behind."
    output(server_id="", server_left="false", result=result)
    leave_network(job_id, result)  # last: a server that is still there can then be adopted by a re-run


def delete_unready(cloud: Client, job_id: str) -> tuple[int, list[BoundServer]]:
    """Return how many of the job's servers were deleted, and those that are kept."""
    doing("looking for the job's servers")
    kept: list[BoundServer] = []
    doomed: list[BoundServer] = []
    for server in hetzner.servers(cloud, hetzner.JOB, job_id):
        is_mine = (server.labels or {}).get(hetzner.RUN) == hetzner.this_run()
        (kept if hetzner.is_ready(server) and not is_mine else doomed).append(server)
    if doomed:
        output(server_id=hetzner.ids(doomed))
        doing(f"deleting server {hetzner.ids(doomed)}")
    hetzner.delete(doomed)
    return len(doomed), kept


def leave_network(job_id: str, result: str) -> None:
    """Remove the job's device; it does not go by itself."""
    doing("removing the device from the Tailscale network")
    try:
        Tailscale().remove(inputs.hostname(job_id))
    except (ProvisioningError, StoppedError) as problem:
        left = f"{result} Its device {inputs.hostname(job_id)} may be left in the Tailscale network."
        output(result=left)
        say("warning", f"{left} {problem}")


if __name__ == "__main__":
    run(
        {
            "create": Step("Provision VM", create, 14 * MINUTE),
            "ready": Step("Mark the server", ready, 1.5 * MINUTE),
            "cleanup": Step("Delete the server", cleanup, 3.5 * MINUTE),
        }
    )
