"""Whether a container image can be pulled without a login: https://distribution.github.io/distribution/spec/api/."""

import re
from ipaddress import ip_address
from typing import Any

import requests
from runner import ProvisioningError

CALL_SECONDS = 30
INDEXES = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
]
MANIFESTS = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
]


def architectures(image: str) -> set[str]:
    """Return the architectures that a reference has an image for, as `amd64`; raises ProvisioningError."""
    host, path, version = _parts(image)
    session = requests.Session()
    session.headers["Accept"] = ", ".join(INDEXES + MANIFESTS)
    base = f"{'http' if _is_loopback(host) else 'https'}://{host}/v2/{path}"
    manifest = _get(session, f"{base}/manifests/{version}", image)
    if entries := manifest.get("manifests"):
        platforms = [entry.get("platform") or {} for entry in entries]
        return {str(each["architecture"]) for each in platforms if each.get("os") == "linux"}
    config = _get(session, f"{base}/blobs/{(manifest.get('config') or {}).get('digest')}", image)
    return {str(config.get("architecture"))}


def _parts(image: str) -> tuple[str, str, str]:
    """Return registry, repository and tag or digest of a reference, completed as Docker completes them."""
    name, _, digest = image.partition("@")
    host, slash, rest = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, rest = "registry-1.docker.io", name if slash else f"library/{name}"
    path, _, tag = rest.partition(":")
    return ("registry-1.docker.io" if host == "docker.io" else host), path, digest or tag or "latest"


def _is_loopback(host: str) -> bool:
    """Docker speaks plain HTTP with registries on its own machine, and with no others."""
    name = host.rsplit(":", 1)[0]
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _get(session: requests.Session, url: str, image: str) -> dict[str, Any]:
    try:
        response = session.get(url, timeout=CALL_SECONDS)
        challenge = response.headers.get("WWW-Authenticate", "")
        if response.status_code == 401 and challenge.startswith("Bearer "):  # anybody gets a token to pull
            asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
            granted = session.get(asked.pop("realm", ""), params=asked, timeout=CALL_SECONDS).json()
            session.headers["Authorization"] = f"Bearer {granted.get('token') or granted.get('access_token')}"
            response = session.get(url, timeout=CALL_SECONDS)
        if response.ok:
            return dict(response.json())
    except (requests.RequestException, ValueError, AttributeError) as problem:
        raise ProvisioningError(
            f"AGENT_IMAGE {image} cannot be asked for ({type(problem).__name__})"
        ) from problem
    raise ProvisioningError(f"AGENT_IMAGE {image} cannot be pulled without a login ({response.status_code})")
