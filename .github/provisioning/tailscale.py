"""The few calls to Tailscale's API that a run needs: https://tailscale.com/api."""

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from runner import ProvisioningError, setting
from urllib3.util import Retry

KEY_SECONDS = 900
CALL_SECONDS = 30
POLL_SECONDS = 3
SKEW = timedelta(seconds=60)  # between Hetzner's clock and Tailscale's
OLDEST = datetime(2000, 1, 1, tzinfo=UTC)

Device = dict[str, Any]


class Tailscale:
    """One tailnet, as an OAuth client with the scopes `auth_keys` and `devices:core` sees it.

    A client may make keys with all of its own tags, or with tags that its tags own; so it has
    tag:ci, which owns tag:agent. https://tailscale.com/docs/features/oauth-clients
    """

    def __init__(self) -> None:
        self.tag = setting("TAILSCALE_TAG", "tag:agent")
        self.base = setting("TAILSCALE_BASE_URL", "https://api.tailscale.com") + "/api/v2"
        self.session = requests.Session()
        # Every call here may be repeated: a key that was made twice expires unused.
        again = Retry(4, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        self.session.mount(self.base, HTTPAdapter(max_retries=again))
        client = {
            "client_id": setting("TAILSCALE_OAUTH_CLIENT_ID"),
            "client_secret": setting("TAILSCALE_OAUTH_SECRET"),
            "grant_type": "client_credentials",
        }
        answer = self.call("POST", "/oauth/token", "access_token", data=client)
        self.scopes = str(answer.get("scope", "")).split()
        self.session.headers["Authorization"] = f"Bearer {answer['access_token']}"

    def call(self, method: str, path: str, field: str = "", **request: Any) -> dict[str, Any]:
        """Return the answer, which has that field, or raise ProvisioningError with Tailscale's reason."""
        try:
            response = self.session.request(method, self.base + path, timeout=CALL_SECONDS, **request)
        except requests.RequestException as problem:
            raise ProvisioningError(f"Tailscale cannot be reached ({type(problem).__name__})") from problem
        try:
            answer = json.loads(response.text or "{}")
        except ValueError:
            answer = None
        answer = answer if isinstance(answer, dict) else {}
        if not response.ok or (field and field not in answer):
            said = answer.get("message") or "its answer is not what its documents say"
            raise ProvisioningError(f"Tailscale refused: {said} ({response.status_code}){_advice(str(said))}")
        return answer

    def auth_key(self, tag: str = "") -> tuple[str, str]:
        """Return id and text of a new key with which one machine may join, once and soon.

        The device is not ephemeral: Tailscale would remove it after an outage, and it is the only way in.
        """
        may = {"reusable": False, "ephemeral": False, "preauthorized": True, "tags": [tag or self.tag]}
        asked = {"capabilities": {"devices": {"create": may}}, "expirySeconds": KEY_SECONDS}
        made = self.call("POST", "/tailnet/-/keys", "key", json=asked)
        return str(made.get("id", "")), str(made["key"])

    def all_devices(self) -> list[Device]:
        """Return the devices with the server's tag, which only our keys give."""
        listed = self.call("GET", "/tailnet/-/devices", "devices")["devices"]
        return [device for device in listed if self.tag in (device.get("tags") or [])]

    def devices(self, hostname: str, since: datetime = OLDEST, node: str = "") -> list[Device]:
        """Return the devices that can be the server of this name.

        A name is what a machine says of itself, so anybody in the tailnet may bear it: the tag, the
        time of joining and, once it is known, the node's id have to fit as well.
        """
        return [
            device
            for device in self.all_devices()
            if device.get("hostname") == hostname
            and _created(device) >= since - SKEW
            and node in ("", device.get("nodeId"))
        ]

    def remove(self, hostname: str) -> None:
        """Take the devices of this name out of the network; none is fine."""
        for device in self.devices(hostname):
            self.call("DELETE", f"/device/{device.get('nodeId') or device.get('id')}")

    def joined(self, hostname: str, since: datetime, node: str, limit: float) -> tuple[str, str]:
        """Return node id and IPv4 address of a device once it has joined, within `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            match self.devices(hostname, since, node):
                case [device] if found := [a for a in device.get("addresses") or [] if "." in a]:
                    return str(device.get("nodeId", "")), str(found[0])
                case [_, _, *_]:
                    raise ProvisioningError(
                        f"several devices with {self.tag} call themselves {hostname}: none of them is trusted"
                    )
            if time.monotonic() > deadline:
                raise ProvisioningError(f"the server did not join the Tailscale network in {limit:.0f} s")
            time.sleep(POLL_SECONDS)


def _created(device: Device) -> datetime:
    try:
        created = datetime.fromisoformat(device.get("created") or "")
    except (TypeError, ValueError):
        return OLDEST
    return created if created.tzinfo else created.replace(tzinfo=UTC)


def _advice(said: str) -> str:
    if "not permitted" in said:
        return (
            ". The OAuth client needs exactly the runner's tag (tag:ci), and in the access policy "
            "that tag has to own the server's (tag:agent)"
        )
    if "permission" in said or "access" in said:
        return ". The OAuth client needs the scopes auth_keys and devices:core, both with write"
    return ""
