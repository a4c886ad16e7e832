"""Hetzner Cloud's HTTP end, after its documents: https://docs.hetzner.cloud/reference/cloud.

Status codes, error bodies, actions that are polled, pages, label selectors; what is not sold in a location,
a label that breaks the rules, a token that may only read and a server that is locked are refused.
"""

import itertools
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

HCLOUD_TOKEN = "the Hetzner token of the tests"
READ_ONLY_TOKEN = "the Hetzner token that may only read"
PER_PAGE = 2
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?|")
ZONES = {"nbg1": "eu-central", "fsn1": "eu-central", "hel1": "eu-central"}
ZONES |= {"ash": "us-east", "hil": "us-west", "sin": "ap-southeast", "new1": "af-south"}
EUROPE, ELSEWHERE = ["nbg1", "fsn1", "hel1"], ["ash", "hil", "sin"]
IMAGES = ["debian-12", "debian-13"]

Json = dict[str, Any]
Answer = tuple[int, Json | None]


def hetzner_error(status: int, code: str, message: str) -> Answer:
    return status, {"error": {"code": code, "message": message, "details": None}}


@dataclass
class Hetzner:
    """What exists there. `sold` are the types that a location sells; `sold_out` are those it lacks just now,
    as its list says it, and `gone` those that it finds out only when they are ordered; `locked` is how often
    a server says that it is still busy."""

    boot: Callable[[Json, str], None]
    servers: dict[int, Json] = field(default_factory=dict)
    actions: dict[int, Json] = field(default_factory=dict)
    sold: dict[str, list[str]] = field(
        default_factory=lambda: {
            **{place: ["cx23", "cpx22", "cax11"] for place in EUROPE},
            **{place: ["cpx11", "cpx21"] for place in ELSEWHERE},
            "new1": ["cpx11"],
        }
    )
    sold_out: set[tuple[str, str]] = field(default_factory=set)
    gone: set[tuple[str, str]] = field(default_factory=set)
    locked: int = 0
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(4711))

    def answer(self, method: str, path: str, query: dict[str, str], body: Json, bearer: str) -> Answer:
        if bearer not in (HCLOUD_TOKEN, READ_ONLY_TOKEN):
            return hetzner_error(401, "unauthorized", "unable to authenticate")
        if bearer == READ_ONLY_TOKEN and method != "GET":
            return hetzner_error(403, "token_readonly", "token is only allowed to perform GET requests")
        match method, path.split("/"):
            case "GET", ["servers"]:
                return self.page("servers", [s for s in self.servers.values() if _selected(s, query)], query)
            case "POST", ["servers"]:
                return self.create(body)
            case "GET" | "PUT" | "DELETE", ["servers", number] if int(number) in self.servers:
                return self.one(method, int(number), body)
            case "GET", ["server_types"]:
                named = [kind for kind in self.types() if query.get("name") in (None, kind["name"])]
                return self.page("server_types", named, query)
            case "GET", ["locations"]:
                places = [
                    {"id": i, "name": n, "network_zone": z} for i, (n, z) in enumerate(ZONES.items(), 1)
                ]
                return self.page("locations", places, query)
            case "GET", ["images"]:
                named = [{"id": i, "name": n, "status": "available"} for i, n in enumerate(IMAGES, 1)]
                return self.page("images", [i for i in named if i["name"] == query.get("name")], query)
            case "GET", ["actions", action] if int(action) in self.actions:
                found = self.actions[int(action)]
                found |= {"status": found["outcome"], "progress": 100}
                return 200, {"action": found}
        return hetzner_error(404, "not_found", f"{path} not found")

    def page(self, name: str, found: list[Json], query: dict[str, str]) -> Answer:
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
        return 200, {name: some, "meta": {"pagination": pagination}}

    def types(self) -> list[Json]:
        def at(name: str) -> list[Json]:
            return [
                {
                    "id": i,
                    "name": place,
                    "deprecation": None,
                    "available": (name, place) not in self.sold_out,
                    "recommended": False,
                }
                for i, (place, names) in enumerate(self.sold.items(), 1)
                if name in names
            ]

        names = sorted({name for names in self.sold.values() for name in names})
        return [
            {
                "id": i,
                "name": name,
                "architecture": "arm" if name.startswith("cax") else "x86",
                "locations": at(name),
            }
            for i, name in enumerate(names, 1)
        ]

    def create(self, body: Json) -> Answer:
        kind, place = body.get("server_type"), str(body.get("location"))
        if not (body.get("name") and kind and body.get("image") in IMAGES):
            return hetzner_error(
                422, "invalid_input", "invalid input in fields 'name', 'server_type', 'image'"
            )
        if not all(LABEL.fullmatch(value) for value in body["labels"].values()):
            return hetzner_error(422, "invalid_input", "invalid input in field 'labels'")
        if any(server["name"] == body["name"] for server in self.servers.values()):
            return hetzner_error(409, "uniqueness_error", "server name is already used")
        if kind not in self.sold.get(place, []):
            return hetzner_error(422, "invalid_input", "unsupported location for server type")
        if {(kind, place)} & (self.sold_out | self.gone):
            return hetzner_error(412, "resource_unavailable", "error during placement")
        server = {
            "id": next(self.ids),
            "name": body["name"],
            "labels": body["labels"],
            "status": "initializing",
            "created": datetime.now(UTC).isoformat(),
            "server_type": {"id": 1, "name": kind},
            "public_net": {
                "ipv4": {"id": 1, "ip": "192.0.2.7", "blocked": False, "dns_ptr": "x.example"},
                "ipv6": None,
                "floating_ips": [],
                "firewalls": [],
            },
            "location": {"id": 1, "name": place},
        }
        self.servers[server["id"]] = server
        self.boot(server, body["user_data"])
        started = {"action": self.action("create_server"), "next_actions": [self.action("start_server")]}
        return 201, {"server": server, "root_password": secrets.token_hex(8)} | started

    def one(self, method: str, number: int, body: Json) -> Answer:
        server = self.servers[number]
        if method == "PUT":
            if not all(LABEL.fullmatch(value) for value in body["labels"].values()):
                return hetzner_error(422, "invalid_input", "invalid input in field 'labels'")
            server["labels"] = body["labels"]
        elif method == "DELETE":
            if self.locked:
                self.locked -= 1
                return hetzner_error(423, "locked", "server is locked")
            del self.servers[number]
            return 200, {"action": self.action("delete_server")}
        return 200, {"server": server}

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


def _selected(server: Json, query: dict[str, str]) -> bool:
    """https://docs.hetzner.cloud/reference/cloud#label-selector: `key` or `key=value`"""
    key, equals, value = query.get("label_selector", "").partition("=")
    has = server["labels"].get(key)
    return not key or (has == value if equals else has is not None)
