"""The browser of the tests: Debian's headless shell, or one that is here already.

`python -m tests.support.browser` sees to it.
"""

import os
import shutil
import subprocess
import sys
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
HINT = (
    "The browser tests need Chromium. Install Debian's chromium-headless-shell (apt-get install"
    " chromium-headless-shell), or any chromium or google-chrome that is then on PATH."
)


def find() -> str | None:
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launch_options() -> dict[str, Any]:
    """For Playwright's `chromium.launch`."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's does not work for root
    return {"executable_path": find(), "args": [*sandbox, "--disable-background-networking"]}


def main() -> None:
    """Install the browser where root and apt are at hand and there is none; say what to do otherwise."""
    if not find() and os.geteuid() == 0 and shutil.which("apt-get"):
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", NAMES[0], "fonts-dejavu-core"],
        ):
            subprocess.run(command, env=environ, check=False, stdout=subprocess.DEVNULL)
    if not find():
        sys.exit(HINT)


if __name__ == "__main__":
    main()
