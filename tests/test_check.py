"""`flask check` and every start that cannot be: what is wrong is said in a sentence."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.support.databases import Databases
from tests.support.github import GitHub
from tests.support.preloaded import Preloads
from tests.support.server import Server, free_port, wait_until
from tests.support.stand_in import StandIn, listening

pytestmark = pytest.mark.one_database
OURS = ("-m", "webapp")
GUNICORN = ("-m", "gunicorn", "-c", "python:webapp.serving", "wsgi:app")
Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(database: Databases, preloaded: Preloads, tmp_path: Path) -> Check:
    """`flask check` with these settings, on a database of its own: exit code and what was said."""

    def check(**settings: str) -> tuple[int, str]:
        url = settings.pop("DATABASE_URL", "") or database.migrated()
        done = Server(tmp_path, url, preloaded, **settings).flask("check", check=False)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    return check


def test_check_finds_nothing_wrong_with_a_sound_installation(check: Check, at_github: GitHub) -> None:
    code, said = check(
        REQUIRE_SENT_AT="yes",
        OPERATOR_CONTACT="the operator",
        GITHUB_WEBHOOK_SECRET="a key that is long enough",
        **at_github.settings,
    )
    assert code == 0 and "Nothing is wrong" in said and "provision-agent" in said


def test_check_tells_what_is_unwise_and_that_it_works(check: Check) -> None:
    code, said = check(PUBLIC_URL="http://ci.example", CALLBACK_MAX_SKEW="0", DISPATCH_TOKN="x")
    assert code == 0
    for advice in ("PUBLIC_URL", "REQUIRE_SENT_AT", "CALLBACK_MAX_SKEW", "OPERATOR_CONTACT"):
        assert f"unwise: {advice} " in said
    assert "DISPATCH_TOKN in the environment is not a setting: is DISPATCH_TOKEN meant?" in said


def test_check_asks_github_for_the_token_and_the_workflow(check: Check, at_github: GitHub) -> None:
    code, said = check(**at_github.settings | {"DISPATCH_TOKEN": "a wrong one"})
    assert code == 1 and "wrong: " in said and "a wrong one" not in said
    code, said = check(DISPATCH_WORKFLOW="unknown.yml", **at_github.settings)
    assert code == 1 and re.search("wrong: .*unknown.yml", said)
    at_github.state = "disabled_manually"
    code, said = check(**at_github.settings)
    at_github.state = "active"
    assert code == 1 and "provision-agent.yml cannot be started: at GitHub it is disabled_manually" in said


@pytest.mark.parametrize(
    ("revision", "said"), [("0001", "flask db upgrade"), ("9999", "newer"), (None, "no tables")]
)
def test_check_tells_a_schema_that_is_not_ours(
    check: Check, database: Databases, revision: str | None, said: str
) -> None:
    url = database.migrated()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM alembic_version"))
        if revision:
            connection.execute(text("INSERT INTO alembic_version VALUES (:is)"), {"is": revision})
    engine.dispose()
    code, output = check(DATABASE_URL=url)
    assert code == 1 and said in output.partition("\n")[0]


def test_check_tells_a_database_that_is_away_and_no_password(check: Check) -> None:
    code, said = check(DATABASE_URL=f"postgresql://user:secret-word@127.0.0.1:{free_port()}/x")
    assert code == 1 and re.search("wrong: DATABASE_URL .*Connection refused", said)
    assert "secret-word" not in said


def test_server_and_terminal_read_milepost_env_and_the_environment_wins(fresh_copy: Path) -> None:
    file = fresh_copy / "milepost.env"
    settings = {"DATABASE_URL": f"sqlite:///{fresh_copy}/elsewhere/m.db", "DISPATCH_TOKN": "x"}
    settings |= {name: f"a secret of the file {name}" for name in SECRETS} | {"QUIET_AFTER": "soon"}
    file.write_text("".join(f'{name}="{value}"\n' for name, value in settings.items()))
    fresh_copy.chmod(0o755)
    file.chmod(0o644)
    for command in (("-m", "flask", "--app", "wsgi", "jobs"), GUNICORN):
        code, said = run(fresh_copy, command, {})
        assert code == 1 and "QUIET_AFTER must be a number" in said
    environ = {"QUIET_AFTER": "60"}
    assert run(fresh_copy, ("-m", "flask", "--app", "wsgi", "db", "upgrade"), environ)[0] == 0
    assert (fresh_copy / "elsewhere" / "m.db").exists()
    code, said = run(fresh_copy, ("-m", "flask", "--app", "wsgi", "check"), environ)
    assert code == 1 and f"chmod go= {file}" in said
    assert "wrong: DISPATCH_TOKN in milepost.env is not a setting: is DISPATCH_TOKEN meant?" in said


SECRETS = ("GITHUB_CALLBACK_SECRET", "SECRET_KEY", "OPERATOR_TOKEN")


def run(folder: Path, command: tuple[str, ...], settings: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a command that ends by itself and leaves no process behind."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PORT": str(free_port()), **settings}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = process.communicate(timeout=60)[0]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY must be"),
        ({"DATABASE_URL": "sqlite:////proc/milepost/m.db"}, "DATABASE_URL .*/proc/milepost"),
        ({"DATABASE_URL": "postgresql://user:secret-word@127.0.0.1:9/x"}, "DATABASE_URL .*refused"),
        ({"HOST": "192.0.2.1"}, "HOST and PORT: 192.0.2.1.*assign"),
        ({"PIPELINES": "FOLDER"}, "PIPELINES .*/bad.toml: not TOML"),
        ({"milepost.env": "\xff"}, "milepost.env cannot be read"),
        ({"milepost.env": "A=1\nno setting\n"}, "milepost.env, line 2: must be NAME=value"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_start_that_cannot_be_says_so_in_one_line(
    fresh_copy: Path, settings: dict[str, str], sentence: str
) -> None:
    if text := settings.get("milepost.env"):
        (fresh_copy / "milepost.env").write_bytes(text.encode("latin-1"))
    (fresh_copy / "bad.toml").write_text("no pipeline")
    settings = {name: value.replace("FOLDER", str(fresh_copy)) for name, value in settings.items()}
    code, said = run(fresh_copy, OURS, settings)
    assert code == 1 and re.match(f"Error: .*{sentence}", said), said
    assert said.count("\n") == 1 and "secret-word" not in said


@pytest.mark.parametrize("command", [OURS, GUNICORN], ids=["make-run", "gunicorn"])
def test_a_port_in_use_is_said_and_no_process_stays(fresh_copy: Path, command: tuple[str, ...]) -> None:
    with listening(StandIn) as port:
        environ = dict.fromkeys(SECRETS, "a secret that is long enough")
        code, said = run(fresh_copy, command, {"PORT": str(port), **environ})
    assert code == 1 and re.search("(?i)in use", said)
    assert said.count("\n") <= 20 and "Traceback" not in said


def test_a_bad_pipeline_stops_gunicorn_with_a_sentence(fresh_copy: Path) -> None:
    (fresh_copy / "bad.toml").write_text("no pipeline")
    environ = dict.fromkeys(SECRETS, "a secret that is long enough")
    code, said = run(fresh_copy, GUNICORN, {"PIPELINES": str(fresh_copy), **environ})
    assert code == 1 and said.startswith("Error: PIPELINES ") and said.count("\n") == 1


@pytest.mark.parametrize("command", ["jobs", "db upgrade", "prune --older-than 1"])
def test_a_command_says_in_one_line_that_the_database_is_away(
    preloaded: Preloads, tmp_path: Path, command: str
) -> None:
    url = f"postgresql://user:secret-word@127.0.0.1:{free_port()}/x"
    done = Server(tmp_path, url, preloaded).flask(*command.split(), check=False)
    said = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and re.match("Error: DATABASE_URL cannot be used: .*refused", said), said
    assert done.stderr.count("\n") <= 2 and "secret-word" not in done.stderr


@pytest.mark.parametrize("after", ["", "Sign in: ", "/api/webhooks/github"])
def test_ctrl_c_is_silent(fresh_copy: Path, after: str) -> None:
    log = fresh_copy / "output"
    environ = {"PATH": os.environ["PATH"], "HOME": str(fresh_copy), "PORT": str(free_port())}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *OURS],
            cwd=fresh_copy,
            env=environ,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    wait_until(lambda: (fresh_copy / "instance").exists() and after in log.read_text(), within=60)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    wait_until(lambda: is_gone(process.pid))
    said = log.read_text()
    assert "Traceback" not in said and "KeyboardInterrupt" not in said, said
    assert all(line.startswith(("{", "Sign in: ", "Progress page: ")) for line in said.splitlines()), said


def is_gone(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return False
    return True
