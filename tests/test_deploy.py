"""The files of .github/deploy: each is used, or held against what reads it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import yaml
from dotenv import dotenv_values
from requests.adapters import HTTPAdapter

from tests.support.databases import Databases
from tests.support.events import Events
from tests.support.proxies import DEPLOY, caddy, nginx
from tests.support.server import KEY, ROOT, Serve, Server, sign, wait_until
from webapp.config import NAMES, load

pytestmark = pytest.mark.slow

BELOW = "/milepost"
Proxy = Callable[[Path, int, int, str], AbstractContextManager[str]]


class From(HTTPAdapter):
    """Connects from another address of this machine than the proxy does."""

    def init_poolmanager(self, *args: object, **options: object) -> None:
        super().init_poolmanager(*args, source_address=("127.0.0.2", 0), **options)  # type: ignore


@pytest.fixture(scope="module", params=["", BELOW], ids=["whole-host", "below-a-path"])
def pair(request: pytest.FixtureRequest, _serve: Serve) -> tuple[Server, Server, str]:
    """Two servers of one database, for people and for machines, and the path that all is below."""
    settings = {"PUBLIC_URL": f"https://milepost.example{request.param}", "TRUSTED_PROXIES": "1"}
    pages = _serve(**settings)
    return pages, _serve(DATABASE_URL=pages.database_url, **settings), request.param


@pytest.mark.one_database
@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_the_proxies_files_serve_a_job_to_people_and_machines(
    pair: tuple[Server, Server, str], proxy: Proxy, tmp_path: Path, job_id: str
) -> None:
    pages, machines, below = pair
    session = requests.Session()
    session.trust_env = False  # which would name other certificates
    session.mount("https://", From())
    session.headers["X-Forwarded-For"] = "203.0.113.9"  # which nobody believes
    with proxy(tmp_path, pages.port, machines.port, below) as origin:
        session.verify = str(tmp_path / "certificate.pem")
        home = origin + below

        def report(status: str, **fields: object) -> str:
            body = json.dumps({"job_id": job_id, "status": status, **fields}).encode()
            headers = {"X-Signature": sign(body, KEY)}
            answer = session.post(f"{home}/api/webhooks/github", data=body, headers=headers, timeout=10)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["progress_url"])

        wait_until(lambda: answers(session, f"{home}/healthz"))
        link = origin + urlsplit(report("provisioning")).path
        assert link.startswith(f"{home}/p/")
        page = session.get(link, timeout=10)
        assert page.status_code == 200 and 'data-status="provisioning"' in page.text
        style = re.findall(r'href="(/[^"]+\.css[^"]*)"', page.text)[0]
        assert session.get(origin + style, timeout=10).status_code == 200

        stream = Events(f"{link}/events", verify=session.verify)
        assert 'data-status="provisioning"' in stream.next()["data"]
        stream.be_patient(5)  # a proxy that gathers would keep the next event back
        report("running", server_ip="192.0.2.7")
        assert 'data-status="running"' in stream.next()["data"]
        stream.close()

        cookie = session.get(f"{home}/sign-in", timeout=10).headers["Set-Cookie"]
        assert "; Secure" in cookie and f"Path={below or '/'}" in cookie
    callbacks = [line for line in lines(machines) if line.get("job") == job_id and "method" in line]
    assert len(callbacks) == 2 and {line["address"] for line in callbacks} == {"127.0.0.2"}
    assert not [line for line in lines(pages) if line.get("route") == "/api/webhooks/github"]


def test_a_sqlite_database_moves_to_another_with_all_it_has(
    serve: Serve, database: Databases, job_id: str
) -> None:
    old = serve(DATABASE_URL=Databases("sqlite").migrated())
    old.report(job_id, "provisioning", workflow_run_id=7)
    old.report(job_id, "vm_created", workflow_run_id=7)
    old.api(f"/api/jobs/{job_id}/revoke", method="POST")
    before, link = old.job(job_id), old.link(job_id)
    old.stop()
    target = database.migrated()
    copy = [sys.executable, str(DEPLOY / "copy_database.py"), old.database_url, target]
    subprocess.run(copy, check=True, capture_output=True)
    new = serve(DATABASE_URL=target, PUBLIC_URL=old.url)
    assert new.job(job_id) == before and new.link(job_id) == link
    assert new.report(job_id, "vm_created", workflow_run_id=7) is True
    assert new.report(job_id, "ansible_started", workflow_run_id=7) is False
    again = subprocess.run(copy, check=False, capture_output=True, text=True)
    assert again.returncode == 1 and "not empty" in again.stderr and "Traceback" not in again.stderr


def answers(session: requests.Session, url: str) -> bool:
    try:
        return session.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def lines(server: Server) -> list[dict[str, object]]:
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


CLOSED = """
NoNewPrivileges=yes CapabilityBoundingSet= ProtectSystem=strict ProtectHome=yes PrivateDevices=yes
PrivateTmp=yes PrivateUsers=yes RestrictNamespaces=yes SystemCallFilter=~@privileged UMask=0077
"""


def test_the_unit_exposes_little_as_systemd_counts_it() -> None:
    unit = DEPLOY / "milepost@.service"
    assert set(CLOSED.split()) <= set(unit.read_text().splitlines())
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-200:]


def test_the_units_commands_are_there() -> None:
    unit = (DEPLOY / "milepost@.service").read_text()
    commands = re.findall(r"^Exec\w+=-?(.*)$", unit, re.M)
    assert len(commands) == 4
    for command in commands:
        for word in command.replace("/opt/milepost/", "").split():
            assert not word.startswith(".venv/") or (ROOT / word).exists(), word


def test_the_env_file_has_every_setting_once_and_is_taken() -> None:
    text = (DEPLOY / "milepost.env.example").read_text()
    named = re.findall(r"^#?([A-Z_]+)=", text, re.M)
    assert sorted(named) == sorted(NAMES)
    secrets = {
        name: f"a secret that is long enough {name}" for name in re.findall(r"^([A-Z_]+)=$", text, re.M)
    }
    rest = {**secrets, "DATABASE_URL": "sqlite:///instance/milepost.db"}
    told = re.sub(r"^#(?=[A-Z_]+=)", "", text, flags=re.M)
    assert load(settings(text) | rest) == load(settings(told) | rest), "the defaults that it tells are so"


def settings(text: str) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(stream=StringIO(text)).items()}


def test_the_compose_files_settings_are_settings() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    for service in ("pages", "machines", "upgrade"):
        assert services[service]["environment"].keys() <= NAMES


def test_the_containers_steps_make_a_milepost_that_serves(tmp_path: Path) -> None:
    steps = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    root = tmp_path / "image"
    root.mkdir()
    for step, rest in re.findall(r"^([A-Z]+) (.*)$", steps, re.M):
        if step == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = root / target / Path(source).name if target in (".", "./") else root / target
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif step == "RUN":
            for shell in (["bash", "-n"], [str(ROOT / ".venv/bin/shellcheck"), "-s", "sh", "-"]):
                subprocess.run(shell, input=rest, text=True, check=True)
    (root / ".venv").symlink_to(ROOT / ".venv")
    (start,) = re.findall(r"^CMD (.*)$", steps, re.M)
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (.*)$", steps, re.M)
    server = Server(tmp_path, f"sqlite:///{tmp_path}/milepost.db")
    process = subprocess.Popen(
        json.loads(start), cwd=root, env=server.environ, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        wait_until(server.is_up, within=60)
        health = [word.replace("8000", str(server.port)) for word in json.loads(check)]
        subprocess.run(health, check=True)
        assert server.report("job", "provisioning") is False
        rehearsal = [".venv/bin/flask", *shlex.split("--app wsgi rehearse --pace 0")]
        subprocess.run(rehearsal, cwd=root, env=server.environ, check=True, capture_output=True)
    finally:
        process.terminate()
        process.wait(30)
