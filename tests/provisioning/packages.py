"""Tailscale's packages: a signed repository with one package, whose program only notes how it was called.

https://wiki.debian.org/DebianRepository/Format. The key is made with the gpg of this machine.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.stand_in import StandIn, listening

PROGRAM = """#!/bin/sh
stat --format %a /run/tailscale-auth-key >/var/log/tailscale
echo "$@" >>/var/log/tailscale
"""


class Signer:
    """A key pair; `keyring` is its public half, as a package repository offers it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o700)
        self._gpg("--passphrase", "", "--quick-gen-key", "Packages of the tests", "ed25519", "sign", "never")
        self.keyring = self._gpg("--export")
        rows = [row.split(":") for row in self._gpg("--list-keys", "--with-colons").decode().splitlines()]
        self.fingerprint = next(row[9] for row in rows if row[0] == "fpr")

    def clear_sign(self, text: bytes) -> bytes:
        """The text with its signature, as a repository's InRelease is."""
        return self._gpg("--clear-sign", text=text)

    def close(self) -> None:
        """End the agent that gpg leaves behind."""
        subprocess.run(["gpgconf", "--homedir", self.folder, "--kill", "gpg-agent"], check=True)

    def _gpg(self, *arguments: str, text: bytes = b"") -> bytes:
        command: list[str | Path] = ["gpg", "--homedir", self.folder, "--batch", "--quiet"]
        done = subprocess.run(
            [*command, "--pinentry-mode", "loopback", *arguments],
            input=text,
            capture_output=True,
            env={"PATH": os.environ["PATH"]},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@dataclass
class Packages:
    """What the repository of a suite holds, by path."""

    suite: str
    folder: Path
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)

    def publish(self, version: str, signer: Signer) -> None:
        """Have this version, signed by this key; the key itself stays what it was."""
        tree = self.folder / version
        (tree / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: tailscale\nVersion: {version}\nArchitecture: all\nMaintainer: tests <t@example.org>\n"
        )
        (tree / "DEBIAN/control").write_text(control + "Description: a stand-in\n")
        program = tree / "usr/bin/tailscale"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
        package = self.folder / f"tailscale_{version}_all.deb"
        build: list[str | Path] = ["dpkg-deb", "--build", "--root-owner-group", tree, package]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        index = describe(package, f"pool/{package.name}").encode()
        inside = f"dists/{self.suite}"
        names = ["main/binary-amd64/Packages", "main/binary-all/Packages"]
        sums = "".join(f" {hashlib.sha256(index).hexdigest()} {len(index)} {name}\n" for name in names)
        release = f"Codename: {self.suite}\nSuite: stable\nComponents: main\nArchitectures: amd64 all\n"
        release += f"Date: Wed, 01 Jan 2025 00:00:00 UTC\nSHA256:\n{sums}"
        self.files |= {f"{inside}/{name}": index for name in names}
        self.files[f"{inside}/InRelease"] = signer.clear_sign(release.encode())
        self.files[f"pool/{package.name}"] = package.read_bytes()


def describe(package: Path, place: str) -> str:
    """What an index says of a package."""
    shown = subprocess.run(["dpkg-deb", "--field", package], check=True, capture_output=True, text=True)
    content = package.read_bytes()
    return (
        f"{shown.stdout.strip()}\nFilename: {place}\nSize: {len(content)}\n"
        f"SHA256: {hashlib.sha256(content).hexdigest()}\n"
    )


@contextmanager
def packages_on(address: str, suite: str, folder: Path, signer: Signer) -> Iterator[Packages]:
    """Let the repository answer on an address."""
    packages = Packages(suite, folder)
    packages.files[f"{suite}.noarmor.gpg"] = signer.keyring
    packages.publish("1.0", signer)

    class Handler(StandIn):
        def do_GET(self) -> None:
            content = packages.files.get(self.path.lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

    with listening(Handler, address) as port:
        packages.url = f"http://{address}:{port}"
        yield packages
