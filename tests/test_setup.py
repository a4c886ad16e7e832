"""The start: settings that name themselves, `/healthz`, and `make run` in a fresh copy."""

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.support import old_version
from tests.support.preloaded import Preloads
from tests.support.server import OPERATOR_TOKEN, ROOT, Serve, Server, free_port, wait_until
from webapp.config import BadSetting, load

pytestmark = pytest.mark.one_database

GUNICORN = ("gunicorn", "-c", "python:webapp.serving", "wsgi:app")
SHORT = "fifteen letters"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GITHUB_CALLBACK_SECRET", f"one that is long enough,{SHORT}"),
        ("SECRET_KEY", SHORT),
        ("OPERATOR_TOKEN", SHORT),
        ("GITHUB_WEBHOOK_SECRET", SHORT),
        ("PORT", "80a"),
        ("DATABASE_URL", "mysql://localhost/milepost"),
        ("PUBLIC_URL", "milepost.example"),
        ("PUBLIC_URL", "https://mil\u00e9post.example"),
        ("PUBLIC_URL", "https://someone@milepost.example"),
        ("PUBLIC_URL", "https://milepost.example/jobs/x"),
        ("PUBLIC_URL", "https://milepost.example/a;b"),
        ("PUBLIC_URL", "https://milepost.example/."),
        ("DISPATCH_TOKEN", "t\u00f6ken"),
        ("DISPATCH_REPOSITORY", "milepost"),
        ("DISPATCH_API_URL", "ftp://api.github.example"),
        ("EMBED_ORIGINS", "https://wiki.example/page"),
        ("EMBED_ORIGINS", "https://b\u00fccher.example"),
        ("EMBED_ORIGINS", "https://*.example"),
        ("EMBED_ORIGINS", "https://wiki.example;script-src"),
        ("QUIET_AFTER", "soon"),
        ("LOST_AFTER", "149"),
        ("CALLBACK_MAX_SKEW", "-1"),
        ("TRUSTED_PROXIES", "-1"),
    ],
)
def test_a_bad_setting_names_itself_and_keeps_its_value_to_itself(
    tmp_path: Path, name: str, value: str
) -> None:
    environ = Server(tmp_path, f"sqlite:///{tmp_path}/milepost.db", **{name: value}).environ
    with pytest.raises(BadSetting) as refused:
        load(environ)
    assert refused.value.message.startswith(f"{name} ") and SHORT not in refused.value.message


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("flask", "--app", "wsgi", "jobs"), "GITHUB_CALLBACK_SECRET"),
        (("flask", "--app", "wsgi", "run"), "OPERATOR_TOKEN"),
        (GUNICORN, "SECRET_KEY"),
    ],
    ids=["terminal", "flask", "gunicorn"],
)
@pytest.mark.slow
def test_nothing_starts_without_its_secrets(tmp_path: Path, command: tuple[str, ...], name: str) -> None:
    server = Server(tmp_path, f"sqlite:///{tmp_path}/milepost.db")
    del server.environ[name]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=server.environ,
        capture_output=True,
        text=True,
        timeout=60,  # and it does not start workers for ever
        check=False,
    )
    check_refused(done, name)


def check_refused(done: subprocess.CompletedProcess[str], name: str) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {name} ") or done.stderr.startswith(f"\nError: {name} ")
    assert done.stderr.count("\n") <= 2 and SHORT not in done.stderr


@pytest.mark.slow
def test_a_server_waits_for_no_schema_it_says_what_helps(
    new_database: Callable[[], str], preloaded: Preloads, tmp_path: Path
) -> None:
    server = Server(tmp_path, new_database(), preloaded)
    command = [sys.executable, "-m", *GUNICORN]
    done = subprocess.run(
        command, cwd=ROOT, env=server.environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode and "flask db upgrade" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 20
    server.flask("db", "upgrade")
    with running(command, ROOT, server.environ, server.log):
        wait_until(lambda: status(f"{server.url}/healthz") == 200, within=60)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_database_of_0_1_is_brought_to_the_schema_that_a_new_one_has(
    new_database: Callable[[], str], preloaded: Preloads, serve: Serve, tmp_path: Path
) -> None:
    old, new = (Server(tmp_path, new_database(), preloaded) for _ in range(2))
    old_version.make(old.database_url)
    for server in (old, new):
        for command in ("upgrade", "check"):  # the second compares with the tables in the code
            server.flask("db", command)
    old = serve(DATABASE_URL=old.database_url)
    assert old.job("a-job")["status"] == "running" and old.job("a-job")["attempt"] == 1
    assert old.report("a-job", "running", workflow_run_id=42) is True
    assert old.report("a-job", "provisioning", workflow_run_id=43) is False
    assert old.job("a-job")["attempt"] == 2


def status(url: str) -> int | None:
    try:
        return requests.get(url, timeout=30).status_code
    except requests.ConnectionError:
        return None


@contextmanager
def running(command: list[str], folder: Path, environ: dict[str, str], log: Path) -> Iterator[None]:
    """A command and all that it starts."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_make_run_sets_itself_up_shows_a_rehearsal_and_keeps_its_secrets(
    fresh_copy: Path, new_database: Callable[[], str], tmp_path: Path
) -> None:
    url, database = f"http://127.0.0.1:{(port := free_port())}", new_database()
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PORT": str(port)}
    if database.startswith("postgresql"):  # SQLite is where nothing is said
        environ["DATABASE_URL"] = database
    seen = []
    for start in ("first", "second"):
        log = tmp_path / start
        with running(["make", "run"], fresh_copy, environ, log):
            wait_until(lambda: status(f"{url}/healthz") == 200, within=60)
            sign_in = wait_until(lambda log=log: re.search(r"Sign in: (\S+)", log.read_text()))[1]
            assert sign_in.startswith(url) and requests.get(sign_in, timeout=30).ok
            if start == "first":
                link = wait_until(lambda log=log: re.search(r"Progress page: (\S+)", log.read_text()))[1]
            answer = requests.get(link, headers={"Accept": "application/json"}, timeout=30)
            assert answer.json()["region"] == "rehearsal"
        assert "Traceback" not in log.read_text()
        files = sorted((fresh_copy / "instance").iterdir())
        secrets = {file.name: file.read_text() for file in files if not file.name.startswith("milepost.db")}
        assert secrets.keys() == {"github_callback_secret", "secret_key", "operator_token"}
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files if file.name in secrets)
        assert not any(secret in log.read_text() for secret in secrets.values())
        seen.append(secrets)
    assert seen[0] == seen[1]
    assert "Progress page" not in (tmp_path / "second").read_text(), "a rehearsal on an empty database alone"


def test_make_run_names_a_bad_setting(fresh_copy: Path, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OPERATOR_TOKEN": OPERATOR_TOKEN[:15]}
    done = subprocess.run(
        ["make", "run"],
        cwd=fresh_copy,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode and "OPERATOR_TOKEN must be set, to at least 24 characters" in done.stderr
    assert "Traceback" not in done.stderr and OPERATOR_TOKEN[:15] not in done.stderr
