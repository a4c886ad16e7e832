"""The terminal's door: the operator's verbs without a browser, and the installation's upkeep."""

import json
import os
import shlex
import sqlite3
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from time import sleep, time
from types import TracebackType

import click
import flask_migrate
import requests
from flask import Blueprint
from sqlalchemy.exc import SQLAlchemyError

from webapp import check
from webapp.config import CALLBACK_PATH, MADE, ROOT, Settings, keep_secret, made_secret
from webapp.notify import send
from webapp.page.view import iso
from webapp.parts import parts
from webapp.rules.pipeline import BUILT_IN, Pipeline
from webapp.storage import backup, pruning
from webapp.storage.database import reason
from webapp.storage.jobs import count, find, newest_jobs
from webapp.storage.tables import db

# Of these a sentence is told, not a traceback.
FAILURES = (click.ClickException, OSError, EOFError, sqlite3.Error, tarfile.TarError)
TELL_EVERY = 1000  # pruned jobs
SENDER = ROOT / ".github" / "actions" / "report-step" / "report_step.py"
TRY_EVERY, TRIES = 0.2, 150  # seconds; while a server starts
SERVER = {"SERVER_ID": "4711", "SERVER_IP": "192.0.2.7", "TAILSCALE_IP": "100.64.0.7"}

bp = Blueprint("cli", __name__, cli_group=None)
as_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def _print(as_json: bool, members: dict[str, object], *lines: str) -> None:
    for line in [json.dumps(members)] if as_json else lines:
        click.echo(line)


def _tell_database() -> None:
    """On stderr: a terminal without the server's settings would answer from another database."""
    click.echo(f"Database: {db.engine.url.render_as_string()}", err=True)


@bp.cli.command()
@click.argument("job_id")
@as_json
def link(job_id: str, as_json: bool) -> None:
    """Print the progress URL of a job."""
    _tell_database()
    row = find(db.session.connection(), job_id)
    if row is None:
        raise click.ClickException(f"no job has the id {job_id}")
    url = parts().links.page(job_id, row.link)
    _print(as_json, {"job_id": job_id, "progress_url": url}, url)


@bp.cli.command()
@as_json
def sign_in(as_json: bool) -> None:
    """Print a fresh sign-in link: it works once, within ten minutes."""
    url = parts().links.sign_in()
    _print(as_json, {"sign_in_url": url}, url)


@bp.cli.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000_000))
@as_json
def jobs(limit: int, as_json: bool) -> None:
    """List the jobs, newest first."""
    _tell_database()
    connection = db.session.connection()
    rows, _ = newest_jobs(connection, limit)
    views = [parts().views.of(row, connection) for row in rows]
    lines = [
        f"{iso(view.created_at)}  {view.status:12} {view.condition:7} {view.job_id}  {view.agent_id or '-'}"
        for view in views
    ]
    _print(as_json, {"jobs": [view.as_json() | {"error": view.attempt.error} for view in views]}, *lines)


@bp.cli.command()
def version() -> None:
    """Print the version of Milepost."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    click.echo(f"{project['name']} {project['version']}")


@bp.cli.command("check")
def look() -> None:
    """Say what is wrong with this installation (exit code 1), and what is unwise."""
    settings = parts().settings
    problems = list(dict.fromkeys(check.wrong(settings, db.engine)))
    for problem in problems:
        click.echo(f"wrong: {problem}")
    for advice in check.unwise(settings):
        click.echo(f"unwise: {advice}")
    if problems:
        raise click.exceptions.Exit(1)
    click.echo(f"Nothing is wrong. Pipelines: {', '.join(sorted(settings.pipelines))}.")


@bp.cli.command()
def notify_test() -> None:
    """Send a message to each of NOTIFY_URLS, and say whether that worked."""
    settings = parts().settings
    if not settings.services:
        raise click.ClickException("NOTIFY_URLS is not set")
    text = f"Milepost at {settings.public_url} can reach you here."
    told = send(settings.services, "Test", text, "info", only=())
    for name, problem in told.items():
        click.echo(f"{name}: {problem or 'told'}")
    if any(told.values()):
        raise click.ClickException("not everybody could be told")


@bp.cli.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def back_up(file: Path) -> None:
    """Copy the database and the made secrets into FILE (mode 0600), beside a running server."""
    # Without the sessions: who signed out since stays signed out.
    command = "(umask 077; pg_dump --format=custom --exclude-table-data=sessions --file={0} {1})"
    backup.back_up(_sqlite(command, file, "keep a copy of"), MADE, file)
    made = [name for name in MADE if made_secret(name)]
    click.echo(f"{file}: the database and {len(made)} made secrets: keep it as secret as they are")


@bp.cli.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(file: Path) -> None:
    """Bring a backup back, where there is no job yet and no other secret was made."""
    # All or nothing: nothing is added to tables that are there.
    command = "pg_restore --single-transaction --no-owner --dbname={1} {0}"
    database = _sqlite(command, file, "put back your copy of")
    found = backup.read_secrets(file, list(MADE))
    for name, secret in found.items():
        if made_secret(name) not in ("", secret):
            raise click.ClickException(f"{MADE[name]} differs from the backup's: nothing is restored")
    backup.restore(file, database)
    for name, secret in found.items():
        keep_secret(name, secret)
    flask_migrate.upgrade()
    click.echo(f"restored from {file}")


def _sqlite(command: str, file: Path, with_secrets: str) -> Path:
    """The path of the database; PostgreSQL has programs of its own for this."""
    if db.engine.dialect.name == "sqlite":
        return Path(db.engine.url.database or "")
    made = " ".join(str(path) for path in MADE.values() if path.exists())
    too = f"; and {with_secrets} {made}" if made else ""
    run = command.format(shlex.quote(str(file)), '"${DATABASE_URL:?}"')
    raise click.ClickException(f"for PostgreSQL, run: {run}{too}")


@bp.cli.command()
@click.option("--older-than", "days", required=True, type=click.FloatRange(0), metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
def prune(days: float, dry_run: bool) -> None:
    """Delete the jobs that are over or lost, of which nothing was heard for DAYS, with their callbacks."""
    connection = db.session.connection()
    which = pruning.prunable(time() - days * 86_400, parts().views.clock(connection))
    if dry_run:
        click.echo(f"{count(connection, which)} jobs would be pruned")
        return
    db.session.remove()
    pruned = 0
    for removed in pruning.prune(parts().writer, which):
        if pruned // TELL_EVERY < (pruned + removed) // TELL_EVERY:
            click.echo(f"{pruned + removed} jobs pruned so far", err=True)
        pruned += removed
    if not pruning.give_back(db.engine):
        click.echo("the file keeps its size: its space is used again", err=True)
    click.echo(f"{pruned} jobs pruned")


@bp.cli.command()
@click.option("--pace", default=3.0, show_default=True, type=click.FloatRange(0), metavar="SECONDS")
@click.option("--fail-at", metavar="FAILED_STEP", help="The step that fails, as a callback would name it.")
@click.option("--job-id", help="Of the job to rehearse; a new one otherwise.")
@click.option("--pipeline", "name", default=BUILT_IN, show_default=True, metavar="NAME")
@click.option("--wait", is_flag=True, help="For a server that is about to start.")
def rehearse(pace: float, fail_at: str | None, job_id: str | None, name: str, wait: bool) -> None:
    """Send a whole run to the running server, through the sender that workflows use."""
    settings, job_id = parts().settings, job_id or f"rehearsal-{token_hex(4)}"
    known = settings.pipelines
    if name not in known:
        raise click.ClickException(f"no pipeline is called {name}; there are {', '.join(sorted(known))}")
    click.echo(f"Progress page: {_register(settings, job_id, name, TRIES if wait else 1)}")
    environment = os.environ | {
        "CALLBACK_URL": f"http://{settings.address}{CALLBACK_PATH}",
        "CALLBACK_SECRET": settings.callback_keys[0].decode(),
        "JOB_ID": job_id,
        "GITHUB_RUN_ID": str(int(time() * 1000)),
        "GITHUB_RUN_ATTEMPT": "1",
        "SUMMARY": "no",
        "no_proxy": "*",
    }
    for report in _reports(settings, known[name], fail_at):
        sleep(pace)
        said = subprocess.run(
            [sys.executable, SENDER], env=environment | report, capture_output=True, text=True, check=True
        )
        if "::warning" in said.stdout:
            raise click.ClickException(f"a callback was not delivered: {said.stdout}")


def _register(settings: Settings, job_id: str, pipeline: str, tries: int) -> str:
    """The progress URL of the job, which the server knows from now on."""
    url = f"http://{settings.address}/api/jobs"
    job: dict[str, object] = {"job_id": job_id, "agent_id": job_id, "region": "rehearsal"}
    job |= {"pipeline": pipeline, "dispatch": False}
    headers = {"Authorization": f"Bearer {settings.operator_token}".encode()}
    session = requests.Session()
    session.trust_env = False  # or the token would go to a proxy
    while True:
        try:
            answer = session.post(url, json=job, headers=headers, timeout=10)
            answer.raise_for_status()
            return str(answer.json()["progress_url"])
        except (requests.RequestException, ValueError, KeyError) as error:
            if (tries := tries - 1) <= 0:
                raise click.ClickException(f"{url} did not take the job: {error}") from None
        sleep(TRY_EVERY)


def _reports(settings: Settings, pipeline: Pipeline, fail_at: str | None) -> Iterator[dict[str, str]]:
    """What each callback says, as the sender's environment; with `fail_at` up to the step that fails."""
    last = pipeline.failed_at(fail_at, 0) if fail_at else len(pipeline.steps)
    yield {"STATUS": "provisioning"}
    for step in pipeline.steps[1 : last + 1]:
        for milestone in step.reached_by:
            if milestone != "provisioning":
                yield {"STATUS": "provisioning", "STEP": milestone}
    if fail_at:
        error = f"This is a rehearsal: the step {fail_at} was made to fail."
        left = {"SERVER_LEFT": "false"} if pipeline.leaves else {}
        yield {"STATUS": "failed", "FAILED_STEP": fail_at, "ERROR": error, **left}
    else:
        result = {"RESULT_URL": settings.public_url} if pipeline.result else {}
        yield {"STATUS": "running", **(SERVER if pipeline.leaves == "server" else {}), **result}


def tell_fault(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Have a command or a start that fails say why in a sentence; for `sys.excepthook`."""
    if isinstance(fault, SQLAlchemyError):
        click.echo(f"Error: DATABASE_URL cannot be used: {reason(fault)}", err=True)
    elif isinstance(fault, FAILURES):
        click.echo(f"Error: {fault}", err=True)
    else:
        sys.__excepthook__(kind, fault, trace)
