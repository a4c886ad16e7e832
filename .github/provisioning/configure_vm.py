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

from runner import ProvisioningError, agent_image, identifier, run, setting

PLAYBOOK = Path(__file__).with_name("playbook.yml")
FAILURE = re.compile(r"(?:fatal|failed): \[.*?\].*?: (?:FAILED|UNREACHABLE)! => (\{.*\})")


def directory() -> Path:
    """Return where the run's secrets live until its end, readable by its user alone."""
    return Path(setting("RUNNER_TEMP")) / "milepost-provisioning"


def inventory() -> None:
    """Write key, environment file and inventory; all values are data, checked or never parsed."""
    named = {"AGENT_ID": identifier("AGENT_ID"), "JOB_ID": identifier("JOB_ID")}
    lines = [f"{name}={value}" for name, value in named.items()]
    host = {
        "ansible_host": address("TAILSCALE_IP"),
        "ansible_user": "provisioner",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": str(directory() / "key"),
        "ansible_ssh_common_args": "-o StrictHostKeyChecking=accept-new"
        f" -o UserKnownHostsFile={directory() / 'known_hosts'}",
        "agent_image": agent_image(),
        "agent_environment": str(directory() / "agent.env"),
    }
    shutil.rmtree(directory(), ignore_errors=True)
    directory().mkdir(mode=0o700)
    write("key", setting("SSH_PRIVATE_KEY").strip())
    write("agent.env", "\n".join([*lines, os.environ.get("AGENT_ENVIRONMENT", "").strip()]))
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
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content.replace("\r", "").rstrip("\n") + "\n")


def configure() -> None:
    """Run the playbook, its output passed through, or raise ProvisioningError with task and reason."""
    command = ["ansible-playbook", "--inventory", str(directory() / "inventory.json"), str(PLAYBOOK)]
    quiet = os.environ | {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"}
    task, problem = "", "see the log"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as ansible:
        for line in ansible.stdout or ():
            print(line, end="", flush=True)
            if line.startswith(("TASK [", "RUNNING HANDLER [")):
                task = line.split("[", 1)[1].split("]", 1)[0]
            elif failure := FAILURE.match(line):
                problem = reason(json.loads(failure[1]))
    if ansible.returncode:
        raise ProvisioningError(f"Ansible failed at “{task}”: {problem}")


def reason(result: dict[str, Any]) -> str:
    """Return why a task failed, as its module said it."""
    said = [result.get("msg"), result.get("stderr")]
    if said[0] == "non-zero return code":  # all that a command's result says of itself
        said.reverse()
    return str(said[0] or said[1] or "see the log")[:500]


if __name__ == "__main__":
    run(
        {
            "inventory": ("Generate Ansible inventory", inventory),
            "run": ("Configure VM with Ansible", configure),
        }
    )
