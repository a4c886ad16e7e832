"""Find and remove what nobody needs any more.

python3 retire.py agent    deletes the servers of AGENT_ID, or of its JOB_ID alone, ready or not
python3 retire.py sweep    lists what no run has asked for in DAYS days; DELETE=true deletes the part of it
                           that no agent ever ran on
"""

import re
from datetime import UTC, datetime, timedelta

import hetzner
import inputs
from hcloud.servers import BoundServer
from runner import ProvisioningError, Step, doing, output, run, say, setting, summary
from tailscale import Tailscale

OUR_NAME = re.compile(r"agent-[0-9a-f]{12}")


def agent() -> None:
    """Delete an agent's servers and take their devices out of the network."""
    agent_id = inputs.identifier("AGENT_ID")
    job_id = inputs.identifier("JOB_ID") if setting("JOB_ID", "") else ""
    cloud = hetzner.client()

    def find() -> list[BoundServer]:
        found = hetzner.servers(cloud, hetzner.AGENT, agent_id)
        return [s for s in found if not job_id or (s.labels or {}).get(hetzner.JOB) == inputs.label(job_id)]

    doing(f"looking for the servers of {agent_id}")
    found = hetzner.asked(lambda: hetzner.persist(find, hetzner.ORDER_SECONDS))
    remove(found)
    said = f"Deleted: {hetzner.ids(found)}." if found else "There was no such server."
    output(result=said)
    say("notice", said)
    summary(said)


def remove(doomed: list[BoundServer]) -> None:
    """Delete servers and their devices."""
    if not doomed:
        return
    tailscale = Tailscale()
    doing(f"deleting server {hetzner.ids(doomed)}")
    hetzner.asked(lambda: hetzner.persist(lambda: hetzner.delete(doomed), float("inf")))
    for server in doomed:
        doing(f"removing the device of server {server.id} from the Tailscale network")
        tailscale.remove(str(server.name))


def sweep() -> None:
    """List servers and devices that seem forgotten; delete some of them where that is asked for."""
    cloud, tailscale, since = hetzner.client(), Tailscale(), datetime.now(UTC) - timedelta(days=days())
    everything = hetzner.asked(lambda: hetzner.persist(lambda: hetzner.servers(cloud, hetzner.JOB), 90))
    names = {str(server.name) for server in everything}
    old = [server for server in everything if hetzner.claimed_at(server) < since]
    never = [server for server in old if not hetzner.is_ready(server)]
    devices = [str(d.get("hostname")) for d in tailscale.all_devices()]
    devices = [name for name in devices if OUR_NAME.fullmatch(name) and name not in names]
    lines = [describe(server) for server in old]
    lines += [f"device {name}: its server is gone" for name in devices]
    for line in lines:
        say("warning", line)
    if setting("DELETE", "false") == "true":
        remove(never)
        for name in devices:
            tailscale.remove(name)
        lines.append(f"Deleted: {len(never)} servers that never became ready, {len(devices)} devices.")
    summary("\n".join(["### What no run has asked for", "", *(f"- {line}" for line in lines or ["nothing"])]))
    print("\n".join(lines[-1:] or ["Nothing is left over."]), flush=True)
    output(servers=len(old), unready=len(never), devices=len(devices))


def days() -> float:
    """Return DAYS, a week where it is not set."""
    try:
        return float(setting("DAYS", "7"))
    except ValueError:
        raise ProvisioningError("DAYS is not a number") from None


def describe(server: BoundServer) -> str:
    """Return one line about a server that seems forgotten."""
    labels = server.labels or {}
    state = "an agent ran on it" if hetzner.is_ready(server) else "it never became ready"
    return (
        f"server {server.id} of agent {labels.get(hetzner.AGENT, '?')}, job {labels.get(hetzner.JOB, '?')}: "
        f"{state}; asked for last on {hetzner.claimed_at(server):%Y-%m-%d}"
    )


if __name__ == "__main__":
    run({"agent": Step("Destroy the agent", agent, 540), "sweep": Step("The sweep", sweep, 540)})
