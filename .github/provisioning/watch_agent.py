"""Run on the server: see the agent run for a while, or tell how it ended.

    python3 watch_agent.py SECONDS

Well is: the unit is active, and one and the same container runs all the time. A moment proves nothing: a
unit is active as soon as its client has forked, even one that is started again and again.
Otherwise the last lines that the agent wrote are the error.
"""

import subprocess
import sys
import time

FIRST_SECONDS = 30  # until there is a container at all
LINES, LONGEST = 12, 1000  # the newest lines, and their last characters


def said(*command: str) -> str:
    """Return what a command prints, "" where it fails."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False
    ).stdout.strip()


def container() -> str:
    """Return which container runs and since when, "" for none."""
    seen = said("docker", "inspect", "--format", "{{.State.Running}} {{.Id}} {{.State.StartedAt}}", "agent")
    return seen if seen.startswith("true ") else ""


def unit(name: str) -> str:
    """Return a property of the agent's unit."""
    return said("systemctl", "show", "agent", "--value", f"--property={name}")


def problem(seconds: float) -> str:
    """Return what is wrong with the agent, "" for nothing."""
    until, restarts = time.monotonic() + FIRST_SECONDS, unit("NRestarts")
    while not (first := container()):
        if time.monotonic() > until or unit("NRestarts") != restarts:
            return "The agent does not start."
        time.sleep(0.2)
    start = time.monotonic()
    while (lasted := time.monotonic() - start) < seconds:
        if container() != first:
            return f"The agent ended after {lasted:.0f} s of {seconds:.0f}."
        time.sleep(0.5)
    if (unit("NRestarts"), unit("ActiveState")) != (restarts, "active"):
        return f"The agent's service is {unit('ActiveState')}, after {unit('NRestarts')} restarts."
    return ""


def log(since: str) -> str:
    """Return the last lines of the agent and of the client that starts it; older ones are of older agents."""
    asked = ["--identifier=agent", f"--since={since or 'today'}", f"--lines={LINES}"]
    lines = said("journalctl", *asked, "--output=cat", "--no-pager").splitlines()
    return "\n".join(lines)[-LONGEST:] or "It wrote nothing."


if __name__ == "__main__":
    started = unit("ExecMainStartTimestamp")
    if wrong := problem(float(sys.argv[1])):
        sys.exit(f"{wrong} Its last lines:\n{log(started)}")
