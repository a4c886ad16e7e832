"""What a run does at Hetzner Cloud: https://docs.hetzner.cloud/reference/cloud.

Labels carry what is known of a server: the job and the agent that it is for, the run that made it,
its node in the tailnet, since when it is ready, and when a run last asked for it.
"""

import os
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TypeVar

import requests
from hcloud import APIException, Client, HCloudException
from hcloud.images import Image
from hcloud.locations import Location
from hcloud.server_types import BoundServerType, ServerType
from hcloud.servers import BoundServer
from inputs import label
from runner import ProvisioningError, doing, output, remaining, seconds, setting

JOB, AGENT, RUN = "milepost-job", "milepost-agent", "milepost-run"
NODE, READY, CLAIMED = "milepost-node", "milepost-ready", "milepost-claimed"
REGIONS = Path(__file__).with_name("regions.toml")
CALL_SECONDS = 30
ORDER_SECONDS = 90.0  # how long a passing fault is waited out before a server is ordered
LONGEST_PAUSE = 10.0  # times the first one
RESERVE = 5.0  # seconds that a step keeps to say what became of it
PASSING: set[str | int] = {"uniqueness_error", "server_error", "service_error", "unavailable", "maintenance"}
PASSING |= {"locked", "conflict", "rate_limit_exceeded", 500, 503}
CODENAMES = {"debian-13": "trixie", "debian-12": "bookworm"}  # what the playbook is tested on
SOLD_OUT = {"resource_unavailable", "placement_error"}

T = TypeVar("T")
Offer = tuple[str, str]  # server type, location


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


def persist(work: Callable[[], T], limit: float) -> T:
    """Repeat what a passing fault broke, for `limit` seconds and no longer than the step has.

    `work` first looks at what a lost answer may have done.
    """
    pause = seconds("RETRY_PAUSE_SECONDS", 1)
    deadline, longest = time.monotonic() + min(limit, remaining() - RESERVE), LONGEST_PAUSE * pause
    while True:
        try:
            return work()
        except APIException as fault:
            if fault.code not in PASSING or time.monotonic() + pause > deadline:
                raise
            print(f"Hetzner says {fault.code}; again in {pause:g} s", flush=True)
        except requests.ConnectionError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, longest)


def servers(hetzner: Client, name: str, value: str = "") -> list[BoundServer]:
    """Return the servers with a label, and with that value of it where one is given."""
    return hetzner.servers.get_all(label_selector=f"{name}={label(value)}" if value else name)


def this_run() -> str:
    """Return what the label RUN says of a server that this very attempt of a run made."""
    return f"{os.environ.get('GITHUB_RUN_ID', '0')}-{os.environ.get('GITHUB_RUN_ATTEMPT', '1')}"


def is_ready(server: BoundServer) -> bool:
    """Say whether an agent ever ran on it; a server without RUN is from a version that did not tell."""
    labels = server.labels or {}
    return READY in labels or RUN not in labels


def mark(server: BoundServer, **labels: str) -> BoundServer:
    """Add labels to a server; the names are those of this module, in small letters."""
    named = {f"milepost-{name}": value for name, value in labels.items()}
    return server.update(labels=(server.labels or {}) | named)


def now() -> str:
    """Return the time as a label says it: Unix seconds."""
    return str(int(time.time()))


def claimed_at(server: BoundServer) -> datetime:
    """Return when a run last asked for this server."""
    text = (server.labels or {}).get(CLAIMED, "")
    if text.isdecimal():
        return datetime.fromtimestamp(int(text), UTC)
    return server.created or datetime.now(UTC)


def age(server: BoundServer) -> timedelta:
    """Return how long ago it was made."""
    return datetime.now(UTC) - server.created if server.created else timedelta()


def offers(hetzner: Client, region: str) -> list[Offer]:
    """Return what can be ordered now in a region, in the order of preference; raises ProvisioningError."""
    locations, types = _wished(hetzner, region)
    sold = {kind.name: kind for kind in hetzner.server_types.get_all()}
    wanted = [(name, place) for name in types for place in locations]
    free = [(name, place) for name, place in dict.fromkeys(wanted) if _is_free(sold.get(name), place)]
    if not free:
        raise ProvisioningError(
            f"Hetzner has none of {', '.join(types)} in {', '.join(locations)} now; SERVER_TYPE or "
            "another region may help"
        )
    return free


def _wished(hetzner: Client, region: str) -> tuple[list[str], list[str]]:
    """Return the locations and types of a region, of a location, or of a network zone of Hetzner's."""
    table = tomllib.loads(REGIONS.read_text(encoding="utf-8"))
    own = setting("SERVER_TYPE", "").replace(",", " ").split()
    known = table.get(region.lower())
    if known:
        return known["locations"], own or known["types"]
    places = hetzner.locations.get_all()
    found = [str(place.name) for place in places if region.lower() in (place.name, place.network_zone)]
    if not found:
        names = ", ".join([*table, *(str(place.name) for place in places)])
        raise ProvisioningError(f"region is none of {names}: {region!r}")
    near = [entry["types"] for entry in table.values() if set(found) & set(entry["locations"])]
    return found, own or list(chain(*(near or (entry["types"] for entry in table.values()))))


def _is_free(kind: BoundServerType | None, place: str) -> bool:
    for entry in (kind.locations if kind else None) or []:
        if entry.location.name == place:
            gone = entry.deprecation.unavailable_after if entry.deprecation else None
            return entry.available is not False and not (gone and gone < datetime.now(UTC))
    return False


def order(
    hetzner: Client, offers: list[Offer], name: str, user_data: str, labels: dict[str, str]
) -> BoundServer:
    """Create the server; its id is handed on before anything can go wrong with it."""
    refusals = []
    for kind, place in offers:
        doing(f"ordering a {kind} in {place}")
        try:
            made = hetzner.servers.create(
                name=name,
                server_type=ServerType(name=kind),
                image=Image(name=image()),
                location=Location(name=place),
                labels=labels,
                user_data=user_data,
            )
        except APIException as refusal:
            if refusal.code not in SOLD_OUT:
                raise
            refusals.append(f"{kind} in {place}: {refusal.message}")
            print(f"Not available: {refusals[-1]}", flush=True)
            continue
        output(server_id=made.server.id, taken=f"{kind} in {place}")
        for action in [made.action, *made.next_actions]:
            action.wait_until_finished()
        return made.server
    raise ProvisioningError(f"Hetzner has sold out: {'; '.join(refusals)}")


def image() -> str:
    """Return the name of the operating system of a new server."""
    name = setting("SERVER_IMAGE", "debian-13")
    if name not in CODENAMES:
        raise ProvisioningError(f"SERVER_IMAGE is neither of {', '.join(CODENAMES)}: {name[:80]!r}")
    return name


def delete(doomed: list[BoundServer]) -> None:
    """Delete servers and wait until they are gone."""
    for server in doomed:
        try:
            server.delete().wait_until_finished()
        except APIException as refusal:
            if refusal.code != "not_found":
                raise


def ids(some: list[BoundServer]) -> str:
    """Return the ids of servers, as text."""
    return ", ".join(str(server.id) for server in some)


def addresses(server: BoundServer) -> Iterator[str]:
    """Yield the server's public IPv4 address, if it has one."""
    if server.public_net and server.public_net.ipv4:
        yield str(server.public_net.ipv4.ip)
