"""Look whether a run could work, without ordering anything: the input `dry_run` of the workflow.

python3 check_setup.py setup    one line each for what is well and what is not; fails where anything is not
"""

import os
from collections.abc import Callable

import hetzner
import inputs
from cloud_config import packages_key
from hcloud import APIException
from provision_vm import region_of
from registry import architectures
from runner import ProvisioningError, Step, doing, run, setting, summary
from tailscale import Tailscale

DOCKER_WORDS = {"x86": "amd64", "arm": "arm64"}
SHORTEST_KEY = 16  # characters, as Milepost wants them


def check() -> None:
    """Look at everything, and fail at the end where anything was wrong."""
    found = []
    for title, look in CHECKS.items():
        doing(f"looking at {title}")
        try:
            well, said = True, look()
        except ProvisioningError as problem:
            well, said = False, str(problem)
        print(f"{'well' if well else 'WRONG'}: {title}: {said}", flush=True)
        found.append((well, title, said))
    lines = [f"- {'✅' if well else '❌'} **{title}**: {said}" for well, title, said in found]
    summary("\n".join(["### What a run would find", "", *lines, "", "Nothing was ordered."]))
    if wrong := [f"{title}: {said}" for well, title, said in found if not well]:
        raise ProvisioningError("; ".join(wrong))


def identifiers() -> str:
    """Job, agent and region are names that Milepost takes, too."""
    return f"{inputs.identifier('JOB_ID')}, {inputs.identifier('AGENT_ID')}, {region_of()}"


def callback_key() -> str:
    """The key of the callbacks is there."""
    if len(os.environ.get("CALLBACK_SECRET", "")) < SHORTEST_KEY:
        raise ProvisioningError(f"GH_CALLBACK_SECRET is not set, or has less than {SHORTEST_KEY} characters")
    return (
        "set"
        if setting("CALLBACK_ORIGIN", "")
        else "set; CALLBACK_ORIGIN is not, so any receiver gets signatures"
    )


def ssh_key() -> str:
    """The private key can be read."""
    return inputs.public_key().split()[0]


def environment() -> str:
    """Docker takes the agent's environment."""
    lines = [line for line in inputs.agent_environment() if line and not line.startswith("#")]
    return f"{len(lines)} variables"


def hetzner_token() -> str:
    """The token may read and write; a request without any field cannot order anything."""
    cloud = hetzner.client()
    used = hetzner.asked(lambda: hetzner.servers(cloud, hetzner.JOB))
    try:
        cloud.request(method="POST", url="/servers", json={})
    except APIException as refusal:
        if refusal.code != "invalid_input":
            raise ProvisioningError(
                f"HCLOUD_TOKEN cannot order ({refusal.message}): it needs Read & Write"
            ) from refusal
    return f"may order; {len(used)} servers are there"


def server_types() -> str:
    """Something of the list can be ordered in the region now."""
    offers = hetzner.asked(lambda: hetzner.offers(hetzner.client(), region_of()))
    return f"{hetzner.image()}; now available: {', '.join(f'{kind} in {place}' for kind, place in offers)}"


def operating_system() -> str:
    """Hetzner has the image that a server is made of."""
    cloud, name = hetzner.client(), hetzner.image()
    if not hetzner.asked(lambda: cloud.images.get_all(name=name, status=["available"])):
        raise ProvisioningError(f"Hetzner has no image {name}")
    return name


def tailscale_client() -> str:
    """The OAuth client has both scopes, and may give both tags; the keys are deleted again, unused."""
    tailscale = Tailscale()
    for scope in ("auth_keys", "devices:core"):
        if tailscale.scopes and not {scope, scope.split(":")[0], "all"} & set(tailscale.scopes):
            raise ProvisioningError(f"the OAuth client lacks the scope {scope} (write)")
    tailscale.all_devices()
    tags = (setting("TAILSCALE_RUNNER_TAG", "tag:ci"), tailscale.tag)
    for tag in tags:
        key, _ = tailscale.auth_key(tag)
        tailscale.call("DELETE", f"/tailnet/-/keys/{key}")
    return f"may give {' and '.join(tags)}"


def tailscale_packages() -> str:
    """The key that signs the packages is the known one."""
    return f"{len(packages_key())} bytes, of the known fingerprint"


def agent_image() -> str:
    """The image can be pulled, and is for what would be ordered."""
    image = inputs.agent_image()
    has = architectures(image)
    cloud = hetzner.client()
    kind, _ = hetzner.asked(lambda: hetzner.offers(cloud, region_of()))[0]
    sort = hetzner.asked(lambda: cloud.server_types.get_by_name(kind))
    wanted = DOCKER_WORDS.get(str(sort and sort.architecture), "amd64")
    if wanted not in has:
        raise ProvisioningError(
            f"AGENT_IMAGE {image} is for {', '.join(sorted(has))}; a {kind} needs {wanted}"
        )
    return f"{image}, for {wanted}"


CHECKS: dict[str, Callable[[], str]] = {
    "inputs": identifiers,
    "callback key": callback_key,
    "SSH key": ssh_key,
    "agent's environment": environment,
    "Hetzner token": hetzner_token,
    "server types": server_types,
    "operating system": operating_system,
    "Tailscale client": tailscale_client,
    "Tailscale packages": tailscale_packages,
    "agent's image": agent_image,
}


if __name__ == "__main__":
    run({"setup": Step("The check", check, 240)})
