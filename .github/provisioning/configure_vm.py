"""Configure the server of a job with Ansible.

python3 configure_vm.py inventory    writes what Ansible needs into RUNNER_TEMP
python3 configure_vm.py run          runs the playbook; a failure names the task
"""

import ipaddress
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import inputs
from runner import LONGEST, ProvisioningError, Step, doing, run, seconds, setting

PLAYBOOK = Path(__file__).with_name("playbook.yml")
FAILURE = re.compile(r"(?:fatal|failed): \[.*?\].*?: (?:FAILED|UNREACHABLE)! => (.*)")
SHORTEST_SECRET = 6  # characters; a shorter value would hide half of the text
END_SECONDS = 5


def directory() -> Path:
    """Return where the run's secrets live until its end, readable by its user alone."""
    return Path(setting("RUNNER_TEMP")) / "milepost-provisioning"


def inventory() -> None:
    """Write key, environment file and inventory; all values are data, checked or never parsed."""
    named = {"AGENT_ID": inputs.identifier("AGENT_ID"), "JOB_ID": inputs.identifier("JOB_ID")}
    lines = [f"{name}={value}" for name, value in named.items()]
    host = {
        "ansible_host": address("TAILSCALE_IP"),
        "ansible_user": "provisioner",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(directory() / "key"),
        "ansible_ssh_common_args": "-o StrictHostKeyChecking=accept-new"
        f" -o UserKnownHostsFile={directory() / 'known_hosts'}",
        "agent_image": inputs.agent_image(),
        "agent_environment": str(directory() / "agent.env"),
        "agent_tailscale_site": urlsplit(inputs.packages_url()).hostname,
        "agent_watch_seconds": seconds("WATCH_SECONDS", 20),
    }
    key, lines = inputs.private_key(), lines + inputs.agent_environment()
    shutil.rmtree(directory(), ignore_errors=True)
    directory().mkdir(mode=0o700)
    write("key", key)
    write("agent.env", "\n".join(lines))
    write("inventory.json", json.dumps({"all": {"hosts": {"agent": host}}}))


def address(name: str) -> str:
    """Return a variable that is an IP address."""
    try:
        return str(ipaddress.ip_address(setting(name)))
    except ValueError as problem:
        raise ProvisioningError(f"{name}: {problem}") from problem


def write(name: str, content: str) -> None:
    """Write a file that nobody else can read at any moment."""
    descriptor = os.open(directory() / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(content.rstrip("\n") + "\n")


def configure() -> None:
    """Run the playbook, its output passed through, or raise ProvisioningError with task and reason."""
    command = ["ansible-playbook", "--inventory", str(directory() / "inventory.json"), str(PLAYBOOK)]
    quiet = os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1", "PYTHONUNBUFFERED": "1"}
    task, problem, last = "", "", ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=quiet
    ) as ansible:
        try:
            for line in ansible.stdout or ():
                if line.startswith(("TASK [", "RUNNING HANDLER [")):
                    task = line.split("[", 1)[1].rsplit("]", 1)[0]
                    doing(f"the task “{task}”")
                print(line, end="", flush=True)
                if failure := FAILURE.match(line):
                    problem = reason(failure[1])
                last = line.strip() or last
        except BaseException:
            end(ansible)
            raise
    if ansible.returncode:
        where = f"at “{task}”" if task else "before its first task"
        raise ProvisioningError(
            f"Ansible failed {where}: {without_secrets(problem or last or 'see the log')}"
        )


def end(ansible: "subprocess.Popen[str]") -> None:
    """Stop Ansible: a process that is left would hold the step's output open."""
    ansible.terminate()
    try:
        ansible.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        ansible.kill()


def reason(said: str) -> str:
    """Return why a task failed, as its module said it; what is no JSON is told as it is."""
    try:
        result: Any = json.loads(said)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        return said[:LONGEST]
    words = [result.get("msg"), result.get("stderr")]
    if words[0] == "non-zero return code":  # all that a command's result says of itself
        words.reverse()
    return str(words[0] or words[1] or "see the log").strip()[: LONGEST - 200]


def without_secrets(text: str) -> str:
    """Take the values of the agent's environment out: watchers read what an agent may have written."""
    try:
        lines = (directory() / "agent.env").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return text
    values = {line.partition("=")[2] for line in lines if not line.startswith(("#", "AGENT_ID=", "JOB_ID="))}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


if __name__ == "__main__":
    run(
        {
            "inventory": Step("Generate Ansible inventory", inventory, 60),
            "run": Step("Configure VM with Ansible", configure, 29 * 60),
        }
    )
