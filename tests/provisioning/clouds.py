"""Stand-ins on loopback for Hetzner Cloud and Tailscale, in one world: a server that boots uses its key."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.provisioning.hetzner import Answer, Hetzner, Json
from tests.provisioning.tailnet import Tailnet
from tests.support.stand_in import StandIn, listening

PACKAGES = "/packages"


@dataclass
class Clouds:
    """`faults` are answers given instead, per request line, until used up; `keyring` is what signs
    Tailscale's packages, and `fingerprint` is its own."""

    url: str = ""
    keyring: bytes = b""
    fingerprint: str = ""
    tailnet: Tailnet = field(default_factory=Tailnet)
    faults: dict[str, list[Answer]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    joins: bool = True
    address: str = "127.77.0.7"
    booted: Callable[[Json], None] = lambda _: None

    def __post_init__(self) -> None:
        self.hetzner = Hetzner(self.boot)

    @property
    def servers(self) -> dict[int, Json]:
        return self.hetzner.servers

    @property
    def devices(self) -> dict[str, Json]:
        return self.tailnet.devices

    @property
    def is_empty(self) -> bool:
        """Nothing is left there that costs money or lets anybody in."""
        return not (self.servers or self.devices)

    def boot(self, server: Json, user_data: str) -> None:
        """The server itself, as far as cloud-init goes."""
        assert user_data.startswith("#cloud-config\n") and len(user_data.encode()) <= 32768
        config = yaml.safe_load(user_data)
        up = next(command for command in config["runcmd"] if command[:2] == ["tailscale", "up"])
        options = dict(option.split("=", 1) for option in up[2:])
        file = options["--auth-key"].removeprefix("file:")
        (written,) = (entry for entry in config["write_files"] if entry["path"] == file)
        assert written["permissions"] == "0600"
        self.booted(config)
        if self.joins:
            self.tailnet.join(written["content"], options["--hostname"], [self.address], server["id"])

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
            status, answer = self.hetzner.answer(method, parts.path[4:], query, body, bearer)
            if line in self.lost:
                self.lost.remove(line)
                status = 0
            return status, answer
        form = {name: values[0] for name, values in parse_qs(content.decode()).items()}
        body = json.loads(content) if content.startswith(b"{") else form
        return self.tailnet.answer(method, parts.path.removeprefix("/api/v2/"), body, bearer)


@contextmanager
def serving(clouds: Clouds) -> Iterator[Clouds]:
    """Let them answer on loopback."""
    lock = threading.Lock()

    class Handler(StandIn):
        def handle_any(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.startswith(PACKAGES):
                known = self.path in (f"{PACKAGES}/bookworm.noarmor.gpg", f"{PACKAGES}/trixie.noarmor.gpg")
                self.send(200 if known else 404, clouds.keyring if known else b"")
                return
            bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
            with lock:
                status, body = clouds.answer(self.command, self.path, content, bearer)
            if status:  # else the answer is lost on its way
                self.send(status, json.dumps(body).encode())

        def send(self, status: int, content: bytes) -> None:
            with suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # the names that http.server calls

    with listening(Handler) as port:
        clouds.url = f"http://127.0.0.1:{port}"
        yield clouds
