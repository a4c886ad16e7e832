"""The few calls to Tailscale's API that a run needs: https://tailscale.com/api."""

import json
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from runner import ProvisioningError, setting
from urllib3.util import Retry

KEY_SECONDS = 900
CALL_SECONDS = 30
POLL_SECONDS = 3


class Tailscale:
    """One tailnet, as an OAuth client with the scopes `auth_keys` and `devices:core` sees it."""

    def __init__(self) -> None:
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
        token = self.call("POST", "/oauth/token", "access_token", data=client)
        self.session.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, field: str = "", **request: Any) -> Any:
        """Return a field of the answer, or raise ProvisioningError with Tailscale's reason."""
        try:
            response = self.session.request(method, self.base + path, timeout=CALL_SECONDS, **request)
            answer = json.loads(response.text or "{}") or {}
        except ValueError:
            answer = {}
        except requests.RequestException as problem:
            raise ProvisioningError(f"Tailscale cannot be reached ({type(problem).__name__})") from problem
        if not response.ok or (field and field not in answer):
            raise ProvisioningError(
                f"Tailscale refused: {answer.get('message', '')} ({response.status_code})"
            )
        return answer.get(field)

    def auth_key(self) -> str:
        """Return a new key with which one machine may join, once and soon, as an ephemeral device."""
        may = {
            "reusable": False,
            "ephemeral": True,
            "preauthorized": True,
            "tags": [setting("TAILSCALE_TAG", "tag:agent")],
        }
        asked = {"capabilities": {"devices": {"create": may}}, "expirySeconds": KEY_SECONDS}
        return str(self.call("POST", "/tailnet/-/keys", "key", json=asked))

    def devices(self, hostname: str) -> list[dict[str, Any]]:
        """Return the devices that gave this name when they joined."""
        everything = self.call("GET", "/tailnet/-/devices", "devices")
        return [device for device in everything if device["hostname"] == hostname]

    def remove(self, hostname: str) -> None:
        """Take the devices of this name out of the network; none is fine."""
        for device in self.devices(hostname):
            self.call("DELETE", f"/device/{device['nodeId']}")

    def address(self, hostname: str, limit: float) -> str:
        """Return the IPv4 address of a device once it has joined, within `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            for device in self.devices(hostname):
                for address in device["addresses"]:
                    if "." in address:
                        return str(address)
            if time.monotonic() > deadline:
                raise ProvisioningError(f"the server did not join the Tailscale network in {limit:.0f} s")
            time.sleep(POLL_SECONDS)
