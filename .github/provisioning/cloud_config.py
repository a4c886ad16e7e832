"""What a new server does at its first boot: let Ansible in, join the network.

https://cloudinit.readthedocs.io/en/latest/reference/modules.html; JSON is YAML, too.
"""

import base64
import json
import os
import subprocess
from itertools import pairwise
from tempfile import TemporaryDirectory

import requests
from hetzner import CODENAMES, image
from inputs import packages_url
from runner import ProvisioningError, setting

ADMIN = "provisioner"  # not root, whose password Hetzner lets expire, which locks keys out as well
AUTH_KEY = "/run/tailscale-auth-key"
KEYRING = "/etc/apt/keyrings/tailscale.gpg"
FINGERPRINT = "2596A99EAAB33821893C0A79458CA832957F5868"  # https://pkgs.tailscale.com/stable/
CALL_SECONDS = 30


def packages_key() -> bytes:
    """Return the key that signs Tailscale's packages, from their own server and of the known fingerprint.

    The runner fetches it: an image may lack the programs with which cloud-init would ask a key server.
    """
    url = f"{packages_url()}/{CODENAMES[image()]}.noarmor.gpg"
    try:
        response = requests.get(url, timeout=CALL_SECONDS)
        response.raise_for_status()
    except requests.RequestException as problem:
        raise ProvisioningError(f"the key of Tailscale's packages is not at {url} ({problem})") from problem
    expected = setting("TAILSCALE_PACKAGES_FINGERPRINT", FINGERPRINT)
    if (found := _fingerprints(response.content)) != [expected]:
        raise ProvisioningError(
            f"the key at {url} has not the fingerprint {expected}, but {', '.join(found) or 'none'}: "
            "its packages are not trusted"
        )
    return response.content


def _fingerprints(key: bytes) -> list[str]:
    """Return the fingerprints of all primary keys in a keyring."""
    with TemporaryDirectory() as home:
        command = ["gpg", "--homedir", home, "--batch", "--show-keys", "--with-colons"]
        try:
            shown = subprocess.run(
                command, input=key, capture_output=True, check=False, env={"PATH": os.environ["PATH"]}
            )
        except FileNotFoundError:
            raise ProvisioningError(
                "the runner has no gpg, which checks the key of Tailscale's packages"
            ) from None
    rows = [row.split(":") for row in shown.stdout.decode(errors="replace").splitlines()]
    return [line[9] for before, line in pairwise(rows) if (before[0], line[0]) == ("pub", "fpr")]


def cloud_config(name: str, public_key: str, auth_key: str, signing_key: bytes) -> str:
    """Return the user data of a server."""
    base = packages_url()
    source = f"deb [signed-by={KEYRING}] {base} {CODENAMES[image()]} main"
    up = ["tailscale", "up", f"--auth-key=file:{AUTH_KEY}", f"--hostname={name}"]
    admin = {"name": ADMIN, "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL"}
    keyring = {"encoding": "b64", "content": base64.b64encode(signing_key).decode()}
    config = {
        "users": [admin | {"ssh_authorized_keys": [public_key]}],
        "ssh_pwauth": False,
        # cloud-init writes files before it looks at apt
        "write_files": [
            {"path": KEYRING, "permissions": "0644", **keyring},
            {"path": AUTH_KEY, "permissions": "0600", "content": auth_key},
        ],
        "apt": {"sources": {"tailscale.list": {"source": source}}},
        "packages": ["tailscale"],
        "runcmd": [up, ["rm", "-f", AUTH_KEY]],
    }
    return "#cloud-config\n" + json.dumps(config)
