"""Stand-ins on loopback for the HTTP ends of Hetzner Cloud and Tailscale, after their documents.

https://docs.hetzner.cloud/reference/cloud and https://tailscale.com/api: status codes, error
bodies, actions that are polled, pages, label selectors, one-use keys. Both share one world, since
a server that boots uses its Tailscale key.
"""

import itertools
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.stand_in import StandIn, listening

HCLOUD_TOKEN = "the Hetzner token of the tests"
OAUTH = {"client_id": "the OAuth client of the tests", "client_secret": "the OAuth secret of the tests"}
PER_PAGE = 2

Json = dict[str, Any]
Answer = tuple[int, Json | None]


def hetzner_error(status: int, code: str, message: str) -> Answer:
    return status, {"error": {"code": code, "message": message, "details": None}}


@dataclass
class Clouds:
    """What exists there; `faults` are answers given instead, per request line, until used up."""

    url: str = ""
    servers: dict[int, Json] = field(default_factory=dict)
    devices: dict[str, Json] = field(default_factory=dict)
    keys: dict[str, Json] = field(default_factory=dict)
    actions: dict[int, Json] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    issued: set[str] = field(default_factory=set)
    faults: dict[str, list[Answer]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    joins: bool = True
    address: str = "127.77.0.7"
    booted: Callable[[Json], None] = lambda _: None
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(4711))

    # Hetzner Cloud

    def hetzner(self, method: str, path: str, query: dict[str, str], body: Json, bearer: str) -> Answer:
        if bearer != HCLOUD_TOKEN:
            return hetzner_error(401, "unauthorized", "unable to authenticate")
        match method, path.split("/"):
            case "GET", ["servers"]:
                return self.page(query)
            case "POST", ["servers"]:
                return self.create(body)
            case "DELETE", ["servers", server] if int(server) in self.servers:
                self.devices = {k: v for k, v in self.devices.items() if v["server"] != int(server)}
                del self.servers[int(server)]
                return 200, {"action": self.action("delete_server")}
            case "GET", ["actions", action] if int(action) in self.actions:
                found = self.actions[int(action)]
                found |= {"status": found["outcome"], "progress": 100}
                return 200, {"action": found}
        return hetzner_error(404, "not_found", f"{path} not found")

    def page(self, query: dict[str, str]) -> Answer:
        key, _, value = query.get("label_selector", "").partition("=")
        found = [s for s in self.servers.values() if not key or s["labels"].get(key) == value]
        number, last = int(query.get("page", 1)), max(1, -(-len(found) // PER_PAGE))
        pagination = {
            "page": number,
            "per_page": PER_PAGE,
            "previous_page": number - 1 or None,
            "next_page": number + 1 if number < last else None,
            "last_page": last,
            "total_entries": len(found),
        }
        some = found[(number - 1) * PER_PAGE : number * PER_PAGE]
        return 200, {"servers": some, "meta": {"pagination": pagination}}

    def create(self, body: Json) -> Answer:
        if any(server["name"] == body["name"] for server in self.servers.values()):
            return hetzner_error(409, "uniqueness_error", "server name is already used")
        server = {
            "id": next(self.ids),
            "name": body["name"],
            "labels": body["labels"],
            "status": "initializing",
            "created": datetime.now(UTC).isoformat(),
            "public_net": {
                "ipv4": {"id": 1, "ip": "192.0.2.7", "blocked": False, "dns_ptr": "x.example"},
                "ipv6": None,
                "floating_ips": [],
                "firewalls": [],
            },
            "location": {"id": 1, "name": body["location"]},
        }
        self.servers[server["id"]] = server
        self.boot(server, body["user_data"])
        started = {"action": self.action("create_server"), "next_actions": [self.action("start_server")]}
        return 201, {"server": server, "root_password": secrets.token_hex(8)} | started

    def action(self, command: str) -> Json:
        action: Json = {
            "id": next(self.ids),
            "command": command,
            "status": "running",
            "progress": 0,
            "started": datetime.now(UTC).isoformat(),
            "finished": None,
            "resources": [],
            "error": None,
            "outcome": "success",
        }
        self.actions[action["id"]] = action
        return action

    # The server itself, as far as cloud-init goes

    def boot(self, server: Json, user_data: str) -> None:
        assert user_data.startswith("#cloud-config\n")
        config = yaml.safe_load(user_data)
        up = next(command for command in config["runcmd"] if command[:2] == ["tailscale", "up"])
        options = dict(option.split("=", 1) for option in up[2:])
        file = options["--auth-key"].removeprefix("file:")
        (written,) = (entry for entry in config["write_files"] if entry["path"] == file)
        assert written["permissions"] == "0600"
        key = self.keys.pop(written["content"])  # one use
        assert key["ephemeral"] and key["preauthorized"] and not key["reusable"] and key["tags"]
        self.booted(config)
        if self.joins:
            number = str(next(self.ids))
            self.devices[number] = {
                "id": number,
                "nodeId": f"n{number}CNTRL",
                "hostname": options["--hostname"],
                "addresses": ["fd7a:115c:a1e0::7", self.address],
                "tags": key["tags"],
                "server": server["id"],
            }

    # Tailscale

    def tailscale(self, method: str, path: str, body: Json, bearer: str) -> Answer:
        if (method, path) == ("POST", "oauth/token"):
            if {name: body.get(name) for name in OAUTH} != OAUTH:
                return 401, {"message": "API token invalid"}
            self.tokens.add(token := secrets.token_hex(8))
            return 200, {"access_token": token, "token_type": "Bearer", "expires_in": 3600}
        if bearer not in self.tokens:
            return 401, {"message": "API token invalid"}
        match method, path.split("/"):
            case "POST", ["tailnet", "-", "keys"]:
                assert 0 < body["expirySeconds"] <= 3600
                secret = f"tskey-auth-{secrets.token_hex(8)}"
                self.issued.add(secret)
                self.keys[secret] = body["capabilities"]["devices"]["create"]
                return 200, {"id": "k1", "key": secret}
            case "GET", ["tailnet", "-", "devices"]:
                return 200, {"devices": list(self.devices.values())}
            case "DELETE", ["device", node]:
                gone = [number for number, device in self.devices.items() if device["nodeId"] == node]
                for number in gone:
                    del self.devices[number]
                return (200, None) if gone else (404, {"message": "device not found"})
        return 404, {"message": "not found"}

    def lose_next_answer_to(self, line: str) -> None:
        """Do what is asked, once, and hang up."""
        self.lost.add(line)

    def answer(self, method: str, url: str, content: bytes, bearer: str) -> Answer:
        parts = urlsplit(url)
        line = f"{method} {re.sub('/[0-9]+$', '/ID', parts.path.split('/', 2)[2])}"
        self.requests.append(line)
        if faults := self.faults.get(line):
            return faults.pop(0)
        if parts.path.startswith("/v1/"):
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            body = json.loads(content or b"{}")
            status, answer = self.hetzner(method, parts.path[4:], query, body, bearer)
            if line in self.lost:
                self.lost.remove(line)
                status = 0
            return status, answer
        form = {name: values[0] for name, values in parse_qs(content.decode()).items()}
        body = json.loads(content) if content.startswith(b"{") else form
        return self.tailscale(method, parts.path.removeprefix("/api/v2/"), body, bearer)


@contextmanager
def serving(clouds: Clouds) -> Iterator[Clouds]:
    """Let them answer on loopback."""
    lock = threading.Lock()

    class Handler(StandIn):
        def handle_any(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
            with lock:
                status, body = clouds.answer(self.command, self.path, content, bearer)
            with suppress(OSError):
                if status == 0:  # the answer is lost on its way
                    return
                sent = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

        do_GET = do_POST = do_DELETE = handle_any  # the names that http.server calls

    with listening(Handler) as port:
        clouds.url = f"http://127.0.0.1:{port}"
        yield clouds
