"""What the scripts of a provisioning run share: settings in, outputs and errors out.

Everything comes from the environment; a GitHub expression never becomes part of a command.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]{0,254}")  # what a unit file takes without quoting


class ProvisioningError(Exception):
    """The run cannot go on; the message is one line that a person can act on."""


def setting(name: str, default: str | None = None) -> str:
    """Return a variable of the environment, or raise ProvisioningError without a value."""
    value = os.environ.get(name) or default
    if value is None:
        raise ProvisioningError(f"{name} is not set")
    return value


def identifier(name: str) -> str:
    """Return an input that is safe in a name, a label or a file: 1 to 64 of A-Z a-z 0-9 . _ -"""
    value = os.environ.get(name, "")
    if not IDENTIFIER.fullmatch(value):
        raise ProvisioningError(
            f"{name.lower()} is not 1 to 64 letters, digits, '.', '_' or '-': {value[:80]!r}"
        )
    return value


def agent_image() -> str:
    """Return AGENT_IMAGE, the reference of the container image that is the agent."""
    image = setting("AGENT_IMAGE")
    if not IMAGE.fullmatch(image):
        raise ProvisioningError(f"AGENT_IMAGE is not an image reference: {image[:80]!r}")
    return image


def output(**values: object) -> None:
    """Hand values to later steps, each on one line, as soon as they are known.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    with Path(setting("GITHUB_OUTPUT", os.devnull)).open("a", encoding="utf-8") as file:
        file.writelines(f"{name}={one_line(value)}\n" for name, value in values.items())


def one_line(value: object) -> str:
    """Return a text without line breaks or other control characters, at most 1000 characters."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", str(value)).strip()[:1000]


def run(steps: dict[str, tuple[str, Callable[[], None]]]) -> None:
    """Do the step that the first argument names, given as title and function.

    A problem becomes an error line in the log, the output `error` and exit code 1.
    """
    title, step = steps[sys.argv[1]]
    try:
        step()
    except ProvisioningError as problem:
        reason = f"{title} failed: {one_line(problem)}."
        output(error=reason)
        print("::error::" + reason.replace("%", "%25"), flush=True)
        sys.exit(1)
