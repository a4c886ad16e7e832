"""The new server: a debootstrap tree with a systemd, sshd, Docker and network of its own.

It lives in namespaces, so nothing that is done to it is done to this machine. Of its two network
interfaces one is called tailscale0, as on a real server, and the other one is what the public sees.
What a test cannot have is said here: Debian's packages come from a folder on it, filled before it boots, and
Tailscale's, which it gets as a real one does, from a signed repository, only notes how it was called.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.provisioning.packages import describe
from tests.support.server import wait_until

IMAGE = ["openssh-server", "python3", "python3-apt", "sudo", "dbus", "systemd-sysv"]
IMAGE += ["cloud-init", "iproute2", "busybox-static"]
PLAYBOOK = ["docker.io", "nftables", "unattended-upgrades", "needrestart"]
NEWER = {"trixie": ["docker-cli"]}  # which Debian 12 has in docker.io itself
# Of the range for measuring networks, https://www.rfc-editor.org/rfc/rfc2544: nobody has a route to it.
HERE, PRIVATE, OUTSIDE, PUBLIC = "198.18.77.1", "198.18.77.2", "198.18.77.5", "198.18.77.6"
STORE = "var/local/packages"
CLOUD_INIT = """datasource_list: [NoCloud]
apt: {preserve_sources_list: true}
network: {config: disabled}
locale: false
"""


def missing() -> str:
    """Say what this machine lacks to build one, "" for nothing."""
    if os.geteuid():
        return "tests/provisioning --chroot has to run as root"
    lacking = [
        name
        for name in ("debootstrap", "ip", "unshare", "nsenter", "dpkg-deb", "gpg")
        if not shutil.which(name)
    ]
    return f"tests/provisioning --chroot needs {', '.join(lacking)}" if lacking else ""


class Machine:
    """One such server."""

    def __init__(self, root: Path, suite: str) -> None:
        self.root, self.suite, self.name = root, suite, f"mp{secrets.token_hex(3)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._build()
        self._wire()

    def _build(self) -> None:
        """Everything that an image of Hetzner's brings, and a store of packages."""
        mirror = os.environ.get("DEBOOTSTRAP_MIRROR", "http://deb.debian.org/debian")
        _run("debootstrap", "--variant=minbase", self.suite, self.root, mirror)
        self.write("etc/dpkg/dpkg.cfg.d/test", "force-unsafe-io\n")  # it lives for minutes
        install = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qq", "-y"]
        install += ["--no-install-recommends"]
        _run("chroot", self.root, "apt-get", "update", "-qq")
        self.write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)  # start nothing before it boots
        _run("chroot", self.root, *install, *IMAGE)
        (self.root / "usr/sbin/policy-rc.d").unlink()
        needed = [*PLAYBOOK, *NEWER.get(self.suite, [])]
        _run("chroot", self.root, *install, "--download-only", *needed)
        self._keep_packages()
        self.write("etc/docker/daemon.json", json.dumps({"insecure-registries": [f"{HERE}/32"]}))
        self.write("etc/cloud/cloud.cfg.d/99_test.cfg", CLOUD_INIT)

    def _keep_packages(self) -> None:
        """Make what was downloaded a repository of its own: the machine has no other way to Debian."""
        store, described = self.root / STORE, []
        store.mkdir(parents=True)
        for package in (self.root / "var/cache/apt/archives").glob("*.deb"):
            shutil.move(package, store / package.name)
            described.append(describe(store / package.name, f"./{package.name}"))
        (store / "Packages").write_text("\n".join(described))
        self.write("etc/apt/sources.list", f"deb [trusted=yes] file:/{STORE} ./\n")
        _run("chroot", self.root, "apt-get", "update", "-qq")

    def _wire(self) -> None:
        """Two lines between this machine and the network namespace of the other."""
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        for end, here, there in (("tailscale0", HERE, PRIVATE), ("eth0", OUTSIDE, PUBLIC)):
            outer = f"{self.name}{end[0]}"
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", end, "netns", self.name)
            _run("ip", "address", "add", f"{here}/30", "dev", outer)
            _run("ip", "link", "set", outer, "up")
            _run("ip", "-n", self.name, "address", "add", f"{there}/30", "dev", end)
            _run("ip", "-n", self.name, "link", "set", end, "up")

    def boot(self, user_data: dict[str, Any]) -> None:
        """Start it for the first time as far as cloud-init can tell."""
        self.stop()
        self.write("var/lib/cloud/seed/nocloud/user-data", "#cloud-config\n" + json.dumps(user_data))
        self.write("var/lib/cloud/seed/nocloud/meta-data", json.dumps({"instance-id": secrets.token_hex(4)}))
        self.write("whole", "#cloud-config\n" + json.dumps(user_data))
        own = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
        command: list[str | Path] = [
            "ip",
            "netns",
            "exec",
            self.name,
            *own,
            "bash",
            Path(__file__).with_name("boot.sh"),
        ]
        self._process = subprocess.Popen([*command, self.root], stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        _run("ip", "netns", "delete", self.name)
        wait_until(self._is_removed)  # the kernel ends its processes in its own time

    def _is_removed(self) -> bool:
        shutil.rmtree(self.root, ignore_errors=True)
        return not self.root.exists()

    def write(self, path: str, content: str, mode: int = 0o644) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(mode)

    def run(self, *command: str) -> str:
        """Run a command there as root, which has to succeed; its output."""
        return _run(*self._inside(), *command)

    def fails(self, *command: str) -> str:
        """Run a command there as root, which must not succeed; its output."""
        done = subprocess.run([*self._inside(), *command], capture_output=True, text=True)
        assert done.returncode, done.stdout
        return done.stdout + done.stderr

    def _inside(self) -> list[str]:
        assert self._process
        pid = self._process.pid
        (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return ["nsenter", "-t", first, "-m", "-p", "-n", "-u", "-i", "-C", "-r"]

    def lets_in(self, address: str) -> bool:
        """Say whether its sshd answers there."""
        try:
            with socket.create_connection((address, 22), timeout=2) as line:
                return line.recv(4) == b"SSH-"
        except OSError:
            return False


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
