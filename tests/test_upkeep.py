"""Upkeep: what a backup brings back, what pruning spares, and what numbers that fall do not break."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
import requests

from tests.support import old_version
from tests.support.databases import Databases, execute, scalar
from tests.support.operator import signed_in
from tests.support.server import ROOT, Serve, Server, free_port, new_job_id, wait_until

pytestmark = pytest.mark.slow

MANY = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100)
INSERT INTO jobs (job_id, created_at, attempt, status) SELECT 'old-' || i, 1e9, 1, 'failed' FROM n;
INSERT INTO attempts (job_id, number, opened_at, pipeline, change, rank, "end", ended_at, heard_at,
  contradicted, times)
SELECT job_id, 1, 1e9, 'provision-agent', 1, 3, 'failed', 1e9, 1e9, 0, '{}' FROM jobs WHERE created_at = 1e9;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30)
INSERT INTO callbacks (job_id, number, arrived_at, body)
SELECT job_id, 1, 1e9, hex(zeroblob(500)) FROM jobs, n WHERE created_at = 1e9;
"""


@pytest.fixture
def own_sqlite() -> str:
    return Databases("sqlite").migrated()


def test_the_time_in_which_the_door_was_shut_is_no_silence(serve: Serve) -> None:
    server = serve()
    lives, lost = new_job_id(), new_job_id()
    for job_id in (lost, lives):
        server.report(job_id, "provisioning")
    server.stop()
    for job_id, seconds in ((lives, 1200), (lost, 2400)):
        execute(
            server.database_url,
            f"UPDATE attempts SET heard_at = heard_at - {seconds} WHERE job_id = '{job_id}'",
            f"UPDATE callbacks SET arrived_at = arrived_at - {seconds} WHERE job_id = '{job_id}'",
        )
    server.start()
    assert server.page(lives)["condition"] == "live"
    assert server.page(lost)["condition"] == "lost"


def test_the_first_start_is_recorded_too(serve: Serve) -> None:
    """Or all that has come since is walked over again and again, to learn that nothing came before."""
    server = serve()
    server.report(new_job_id(), "provisioning")
    assert scalar(server.database_url, "SELECT count(*) FROM closures") == 1


def test_pages_hear_of_what_comes_after_the_newest_rows_were_taken_away(serve: Serve) -> None:
    server, sibling = (first := serve()), serve(DATABASE_URL=first.database_url)
    old, newest = new_job_id(), new_job_id()
    server.report(old, "provisioning")
    for step in ("provisioning", "vm_created", "ansible_started", "running"):
        server.report(newest, step)
    page = server.link(newest)
    version = server.page(newest)["version"]
    with closing(server.events(old)) as here, closing(sibling.events(old)) as there:
        for events in (here, there):
            events.next()
        assert server.flask("prune", "--older-than", "0").stdout == "1 jobs pruned\n"
        assert requests.get(f"{page}/steps?after={version}", timeout=10).status_code == 404
        execute(
            server.database_url,
            "DELETE FROM departed",
            f"UPDATE attempts SET change = 1 WHERE job_id = '{old}'",
        )
        for told, step in ((server, "vm_created"), (sibling, "ansible_started")):
            told.report(old, step)
            newest_version = server.page(old)["version"]
            for events in (here, there):
                assert events.next()["id"] == newest_version


@pytest.mark.one_database
def test_what_somebody_changed_without_a_word_is_shown_before_long(serve: Serve, job_id: str) -> None:
    server = serve()
    server.stop()
    server.config = "python:tests.support.hasty"
    server.start()
    server.report(job_id, "provisioning")
    server.report(new_job_id(), "provisioning")  # the newest change, which stays so
    with closing(server.events(job_id)) as events:
        events.next()
        for subject in ("once", "once more"):
            which = f"WHERE job_id = '{job_id}'"
            execute(
                server.database_url, f"UPDATE attempts SET subject = '{subject}', change = change - 1 {which}"
            )
            assert f"<bdi>{subject}</bdi>" in events.next()["data"]


class Home(Server):
    """A copy of the code with an `instance/` of its own, as `make run` serves it."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder, f"sqlite:///{folder}/instance/milepost.db")
        self.port, self.url, self.root = port, f"http://127.0.0.1:{port}", folder / "home"
        self.environ = {name: self.environ[name] for name in ("PATH", "HOME", "DATABASE_URL")} | {
            "PORT": str(port)
        }
        for name in ("webapp", "templates", "static"):
            shutil.copytree(ROOT / name, self.root / name)
        shutil.copy(ROOT / "wsgi.py", self.root)

    def flask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flask", "--app", "wsgi", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=self.environ, check=check, capture_output=True, text=True
        )

    def secret(self, name: str) -> str:
        return (self.root / "instance" / name).read_text()

    def start(self, stderr: int | None = None, within: float = 30, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "webapp"],
                cwd=self.root,
                env=self.environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self.is_up, within)

    def report_step(self, job_id: str, step: str) -> requests.Response:
        body = json.dumps({"job_id": job_id, "status": "provisioning", "step": step}).encode()
        return self.post(body, self.secret("github_callback_secret"))


@pytest.mark.one_database
def test_a_backup_brought_back_elsewhere_goes_on_where_it_was(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "backup.tar.gz"
    (first, second, third) = (Home(tmp_path / name, port) for name in ("first", "second", "third"))
    first.start()
    try:
        links = [
            first.report_step(job_id, "vm_created").json()["progress_url"] for job_id in ("kept", "revoked")
        ]
        execute(first.database_url, "UPDATE jobs SET link = 1 WHERE job_id = 'revoked'")
        first.flask("backup", str(file))
        assert file.stat().st_mode & 0o777 == 0o600
        first.report_step("kept", "ansible_started")
    finally:
        first.stop()
    third.flask("db", "upgrade", check=False)
    (third.root / "instance").mkdir(exist_ok=True)
    (third.root / "instance" / "secret_key").write_text("another one that was made")
    refused = third.flask("restore", str(file), check=False)
    assert refused.returncode and "secret_key" in refused.stderr and "Traceback" not in refused.stderr
    second.flask("restore", str(file))
    second.start()
    try:
        assert [requests.get(link, timeout=10).status_code for link in links] == [200, 404]
        assert second.report_step("kept", "ansible_started").json()["duplicate"] is False
        assert second.report_step("kept", "vm_created").json()["duplicate"] is True
        again = second.flask("restore", str(file), check=False)
        assert again.returncode and "has jobs" in again.stderr
    finally:
        second.stop()


@pytest.mark.one_database
def test_what_is_no_backup_is_refused_in_a_sentence(tmp_path: Path) -> None:
    home, text, archive = Home(tmp_path, free_port()), tmp_path / "text", tmp_path / "archive"
    text.write_text("no archive")
    with tarfile.open(archive, "w:gz") as odd:
        odd.add(home.root, "milepost.db", recursive=False)  # a folder
    for file, cause in ((text, "cannot be read"), (archive, "is no backup of Milepost")):
        refused = home.flask("restore", str(file), check=False)
        assert refused.returncode and cause in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.one_database
def test_a_job_that_was_done_under_0_1_is_done_by_a_grown_built_in_file(tmp_path: Path) -> None:
    home = Home(tmp_path, free_port())
    (home.root / "instance").mkdir()
    home.environ["DATABASE_URL"] = home.database_url = f"sqlite:///{home.root}/instance/milepost.db"
    old_version.make(home.database_url)
    with (home.root / "webapp" / "rules" / "pipelines" / "provision-agent.toml").open("a") as built_in:
        built_in.write('\n[[steps]]\nid = "checked"\nlabel = "Checked"\n')
    home.start()
    try:
        link = home.flask("link", "a-job").stdout.strip()
        page = requests.get(link, headers={"Accept": "application/json"}, timeout=10).json()
        assert [step["state"] for step in page["steps"]] == ["completed"] * 6
        assert "All 6 steps are done" in requests.get(link, timeout=10).text
    finally:
        home.stop()


@pytest.mark.one_database
def test_the_printed_commands_bring_a_postgresql_back(serve: Serve, tmp_path: Path) -> None:
    databases, file = Databases("postgresql"), tmp_path / "a backup"
    server, empty = serve(DATABASE_URL=databases.migrated()), databases.new()
    for job_id in ("kept", "revoked"):
        server.report(job_id, "vm_created")
    links = [server.link(job_id) for job_id in ("kept", "revoked")]
    assert server.api("/api/jobs/revoked/revoke", method="POST").ok
    operator = signed_in(server)
    run_printed(server, "backup", file)
    assert file.stat().st_mode & 0o777 == 0o600
    server.stop()
    server.environ["DATABASE_URL"] = empty
    run_printed(server, "restore", file)
    server.flask("db", "upgrade")
    server.start()
    assert [requests.get(link, timeout=10).status_code for link in links] == [200, 404]
    assert [server.report("kept", step) for step in ("vm_created", "ansible_started")] == [True, False]
    assert operator.ask().status_code == 303, "no session is in a backup"
    with pytest.raises(subprocess.CalledProcessError):
        run_printed(server, "restore", file)
    assert server.states("kept")[3] == "active", "nothing is restored over a job"


def run_printed(server: Server, command: str, file: Path) -> None:
    """Run what a command says is to be run for PostgreSQL."""
    said = server.flask(command, str(file), check=False).stderr
    (line,) = re.findall(r"^Error: for PostgreSQL, run: (.*?)(?:; and \w+ .*)?$", said)
    subprocess.run(line, shell=True, env=server.environ, check=True)


def test_prune_spares_what_is_under_way_and_the_usual_times(serve: Serve) -> None:
    server = serve()
    for _ in range(5):
        job_id = new_job_id()
        for step in ("provisioning", "vm_created", "running"):
            server.report(job_id, step, workflow_run_id=7)
    live = new_job_id()
    server.report(live, "provisioning")
    assert server.flask("prune", "--older-than", "0", "--dry-run").stdout == "5 jobs would be pruned\n"
    assert server.flask("prune", "--older-than", "0").stdout == "5 jobs pruned\n"
    assert server.page(live)["condition"] == "live"
    assert server.api(f"/api/jobs/{job_id}").status_code == 404
    assert server.api("/api/jobs?run_id=7").json()["jobs"] == []
    fresh = new_job_id()
    server.report(fresh, "provisioning")
    assert server.page(fresh)["expected"]


@pytest.mark.one_database
def test_prune_gives_the_space_back_and_callbacks_go_on_beside_it(serve: Serve, own_sqlite: str) -> None:
    server = serve(DATABASE_URL=own_sqlite)
    live, file = new_job_id(), Path(own_sqlite.removeprefix("sqlite:///"))
    server.report(live, "provisioning")
    with closing(sqlite3.connect(file)) as other:
        other.executescript(MANY)
    full, taken, done = file.stat().st_size, [], Event()

    def report_on() -> None:
        while not done.is_set():
            began = time.monotonic()
            server.report(live, "heartbeat")
            taken.append(time.monotonic() - began)

    with running_beside(done, Thread(target=report_on)):
        wait_until(lambda: len(taken) >= 20)
        alone = sorted(taken)[-2]
        taken.clear()
        assert server.flask("prune", "--older-than", "1").stdout == "100 jobs pruned\n"
    assert len(taken) > 5 and sorted(taken)[len(taken) * 9 // 10] < 0.3 + 3 * alone  # a busy machine's
    wait_until(lambda: server.report(live, "heartbeat") is False and file.stat().st_size < full / 2)


@contextmanager
def running_beside(done: Event, thread: Thread) -> Iterator[None]:
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
