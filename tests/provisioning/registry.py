"""A registry with one image on it: https://distribution.github.io/distribution/spec/api/."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.stand_in import StandIn, listening

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
UNKNOWN = b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@dataclass
class Registry:
    """What it holds, by path; `away` makes the image unknown; with `needs_token` it
    gives everybody a token first, as Docker Hub does."""

    image: str = ""
    away: bool = False
    needs_token: bool = False
    blobs: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def add(self, type: str, content: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        for kind in ("blobs", "manifests"):
            self.blobs[f"/v2/agent/{kind}/{digest}"] = type, content
        return {"mediaType": type, "size": len(content), "digest": digest}

    def get(self, path: str) -> tuple[str, bytes]:
        unknown = "application/json", UNKNOWN
        return unknown if self.away and "/manifests/" in path else self.blobs.get(path, unknown)

    def push(self, program: Path, tag: str = "1", command: list[str] | None = None) -> str:
        """An image that is one static program, which sleeps or does `command`; its reference."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.add(program, "busybox")
        unpacked = f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"
        does = ["/busybox", "sleep", "86400"] if command is None else command
        config: dict[str, object] = {"architecture": "amd64", "os": "linux", "config": {"Cmd": does}}
        config |= {"rootfs": {"type": "layers", "diff_ids": [unpacked]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add(CONFIG, json.dumps(config).encode()),
            "layers": [self.add(LAYER, gzip.compress(layer.getvalue()))],
        }
        self.add(MANIFEST, content := json.dumps(manifest).encode())
        self.blobs[f"/v2/agent/manifests/{tag}"] = MANIFEST, content
        self.blobs["/v2/"] = "application/json", b"{}"
        return f"{self.image.rpartition(':')[0]}:{tag}"


@contextmanager
def registry_on(address: str, busybox: Path) -> Iterator[Registry]:
    """Let it answer on an address."""
    registry = Registry()
    registry.push(busybox)

    class Handler(StandIn):
        def do_GET(self) -> None:
            if self.path.startswith("/token?service=registry&scope=pull"):
                self.send(200, "application/json", b'{"token": "anybody"}')
            elif registry.needs_token and self.headers.get("Authorization") != "Bearer anybody":
                self.send(401, "application/json", b"{}")
            else:
                type, content = registry.get(self.path)
                self.send(404 if content == UNKNOWN else 200, type, content)

        def send(self, status: int, type: str, content: bytes) -> None:
            self.send_response(status)
            realm = f"http://{registry.image.split('/')[0]}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="registry",scope="pull"')
            self.send_header("Content-Type", type)
            self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(content).hexdigest()}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

    with listening(Handler, address) as port:
        registry.image = f"{address}:{port}/agent:1"
        yield registry
