"""What the scripts of a provisioning run share: settings in, outputs and errors out.

Everything comes from the environment; a GitHub expression never becomes part of a command.
"""

import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

LONGEST = 1500  # characters of an error; Milepost keeps 2,000


class ProvisioningError(Exception):
    """The run cannot go on; the message is text that a person can act on."""


class StoppedError(BaseException):
    """A signal ended the step: somebody cancelled it, or its time is over. Nobody may retry it."""


@dataclass(frozen=True)
class Step:
    """One command of a script: what the workflow calls it, what it does, its time in seconds.

    The time is shorter than the step's `timeout-minutes`, so that the script itself can still tell
    what was running. STEP_SECONDS overrides it.
    """

    title: str
    work: Callable[[], None]
    seconds: float


_doing = "it started"
_deadline = float("inf")


def doing(what: str) -> None:
    """Say in the log what begins now; an error names it as what was running."""
    global _doing
    _doing = what
    print(f"{what[:1].upper()}{what[1:]}", flush=True)


def remaining() -> float:
    """Return how many seconds the step still has."""
    return _deadline - time.monotonic()


def setting(name: str, default: str | None = None) -> str:
    """Return a variable of the environment, or raise ProvisioningError without a value."""
    value = os.environ.get(name) or default
    if value is None:
        raise ProvisioningError(f"{name} is not set")
    return value


def seconds(name: str, default: float) -> float:
    """Return a variable that is a number of seconds."""
    try:
        return float(setting(name, str(default)))
    except ValueError:
        raise ProvisioningError(f"{name} is not a number of seconds") from None


def output(**values: object) -> None:
    """Hand values to later steps as soon as they are known; a value may have several lines.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    with Path(setting("GITHUB_OUTPUT", os.devnull)).open("a", encoding="utf-8") as file:
        for name, value in values.items():
            text = clean(value)
            mark = f"end-{secrets.token_hex(8)}"  # no value can guess it
            file.write(f"{name}<<{mark}\n{text}\n{mark}\n" if "\n" in text else f"{name}={text}\n")


def summary(markdown: str) -> None:
    """Add to what GitHub shows on the page of the run."""
    with Path(setting("GITHUB_STEP_SUMMARY", os.devnull)).open("a", encoding="utf-8") as file:
        file.write(markdown + "\n")


def clean(value: object) -> str:
    """Return a text without control characters but line feeds, of at most LONGEST characters: its end."""
    text = re.sub(r"\r\n?", "\n", str(value))
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u2029]+", " ", text).strip()[-LONGEST:]


def say(level: str, message: str) -> None:
    """Print a message that GitHub shows as `error`, `warning` or `notice`, whatever is in it.

    https://github.com/actions/toolkit/blob/main/packages/core/src/command.ts
    """
    text = clean(message).replace("%", "%25").replace("\n", "%0A")
    print(f"::{level}::{text}", flush=True)


def run(steps: dict[str, Step]) -> None:
    """Do the step that the first argument names.

    Whatever goes wrong becomes an error in the log, the output `error` and exit code 1.
    """
    global _deadline
    step = steps[sys.argv[1]]
    try:
        limit = seconds("STEP_SECONDS", step.seconds)
        _deadline = time.monotonic() + limit
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, _stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
        step.work()
    except ProvisioningError as problem:
        _fail(f"{step.title} failed: {problem}")
    except StoppedError as stop:
        _fail(f"{step.title} {stop}; what was running: {_doing}")
    except Exception as bug:
        traceback.print_exc()
        _fail(f"{step.title} failed; what was running: {_doing} ({type(bug).__name__}: {bug})")


def _fail(reason: str) -> NoReturn:
    reason = clean(reason)
    reason += "" if reason.endswith((".", "!")) else "."
    output(error=reason)
    say("error", reason)
    sys.exit(1)


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(each, signal.SIG_IGN)  # the end is told once
    raise StoppedError("ran out of time" if number == signal.SIGALRM else "was stopped by a signal")
