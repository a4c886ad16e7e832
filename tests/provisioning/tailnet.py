"""Tailscale's API, after its documents: https://tailscale.com/api and .../docs/features/oauth-clients.

An OAuth client has scopes and tags. A key that it makes has all of its tags, or tags that these own in the
access policy; everything else is refused, as are unknown tags, a token or a key that has expired, and a key
that was used.
"""

import itertools
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

OAUTH = {"client_id": "the OAuth client of the tests", "client_secret": "the OAuth secret of the tests"}

Json = dict[str, Any]
Answer = tuple[int, Json | None]
FORBIDDEN: Answer = (
    403,
    {"message": "calling actor does not have enough permissions to perform this function"},
)


@dataclass
class Tailnet:
    """`owners` is the access policy: which tags, besides people, own a tag."""

    tags: list[str] = field(default_factory=lambda: ["tag:ci"])
    scopes: list[str] = field(default_factory=lambda: ["auth_keys", "devices:core"])
    owners: dict[str, list[str]] = field(default_factory=lambda: {"tag:ci": [], "tag:agent": ["tag:ci"]})
    token_seconds: float = 3600
    devices: dict[str, Json] = field(default_factory=dict)
    keys: dict[str, Json] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    issued: set[str] = field(default_factory=set)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def answer(self, method: str, path: str, body: Json, bearer: str) -> Answer:
        if (method, path) == ("POST", "oauth/token"):
            return self.token(body)
        if self.tokens.get(bearer, 0) < time.monotonic():
            return 401, {"message": "API token invalid"}
        parts = path.split("/")
        needed = "auth_keys" if "keys" in parts else "devices:core"
        reads = method == "GET" and f"{needed}:read" in self.scopes
        if not (reads or needed in self.scopes):
            return FORBIDDEN
        match method, parts:
            case "POST", ["tailnet", "-", "keys"]:
                return self.key(body)
            case "DELETE", ["tailnet", "-", "keys", id]:
                found = [secret for secret, key in self.keys.items() if key["id"] == id]
                for secret in found:
                    del self.keys[secret]
                return (200, None) if found else (404, {"message": "key not found"})
            case "GET", ["tailnet", "-", "devices"]:
                return 200, {"devices": list(self.devices.values())}
            case "DELETE", ["device", node]:
                gone = [number for number, d in self.devices.items() if node in (d.get("nodeId"), d["id"])]
                for number in gone:
                    del self.devices[number]
                return (200, None) if gone else (404, {"message": "device not found"})
        return 404, {"message": "not found"}

    def token(self, body: Json) -> Answer:
        if {name: body.get(name) for name in OAUTH} != OAUTH:
            return 401, {"message": "API token invalid"}
        token = secrets.token_hex(8)
        self.tokens[token] = time.monotonic() + self.token_seconds
        said = {"access_token": token, "token_type": "Bearer", "expires_in": int(self.token_seconds)}
        return 200, said | {"scope": " ".join(self.scopes), "tags": " ".join(self.tags)}

    def key(self, body: Json) -> Answer:
        asked = body["capabilities"]["devices"]["create"]
        tags = asked.get("tags") or []
        owned = all(set(self.owners.get(tag, [])) & set(self.tags) for tag in tags)
        if not tags or not set(tags) <= self.owners.keys() or not (set(tags) == set(self.tags) or owned):
            return 400, {"message": f"requested tags [{' '.join(tags)}] are invalid or not permitted"}
        seconds = body.get("expirySeconds", 7_776_000)
        if not 0 < seconds <= 7_776_000:
            return 400, {"message": "expirySeconds out of range"}
        secret, id = f"tskey-auth-{secrets.token_hex(8)}", f"k{next(self.ids)}CNTRL"
        self.issued.add(secret)
        self.keys[secret] = asked | {"id": id, "until": time.monotonic() + seconds}
        return 200, {"id": id, "key": secret}

    def join(self, secret: str, hostname: str, addresses: list[str], server: int) -> None:
        """What `tailscale up` does with a key; nothing, where the key is not good any more."""
        key = self.keys.pop(secret) if not self.keys[secret]["reusable"] else self.keys[secret]
        if key["until"] < time.monotonic() or not key["preauthorized"]:
            return
        assert not key["ephemeral"], "an outage would remove the only way in"
        self.add(hostname, addresses, tags=key["tags"], server=server)

    def add(self, hostname: str, addresses: list[str], **more: Any) -> Json:
        """A device, as somebody's; `age` in seconds."""
        number = str(next(self.ids) + 4000)
        created = datetime.now(UTC) - timedelta(seconds=more.pop("age", 0))
        device = {
            "id": number,
            "nodeId": f"n{number}CNTRL",
            "hostname": hostname,
            "name": f"{hostname}.example.ts.net",
            "addresses": ["fd7a:115c:a1e0::7", *addresses],
            "created": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **more,
        }
        self.devices[number] = device
        return device
