"""The terminal's door: the operator's verbs without a browser."""

import json
import sys
import tomllib
from types import TracebackType

import click
from flask.cli import with_appcontext
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from webapp import check, notify, rehearsal, upkeep
from webapp.config import ROOT
from webapp.page.view import iso
from webapp.parts import parts
from webapp.routes.sign_in import sign_in_url
from webapp.rules.pipeline import BUILT_IN
from webapp.storage.database import reason
from webapp.storage.jobs import link_of, newest_jobs
from webapp.storage.tables import db

as_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@click.command()
@click.argument("job_id")
@as_json
@with_appcontext
def link(job_id: str, as_json: bool) -> None:
    """Print the progress URL of a job."""
    _tell_database()
    number = link_of(db.session.connection(), job_id)
    if number is None:
        raise click.ClickException(f"no job has the id {job_id}")
    url = parts().progress_url(job_id, number)
    click.echo(json.dumps({"job_id": job_id, "progress_url": url}) if as_json else url)


@click.command("sign-in")
@as_json
@with_appcontext
def sign_in(as_json: bool) -> None:
    """Print a fresh sign-in link: it works once, within ten minutes."""
    url = sign_in_url(parts())
    click.echo(json.dumps({"sign_in_url": url}) if as_json else url)


@click.command("jobs")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@as_json
@with_appcontext
def list_jobs(limit: int, as_json: bool) -> None:
    """List the jobs, newest first."""
    _tell_database()
    connection = db.session.connection()
    rows, _ = newest_jobs(connection, limit)
    views = [parts().views.of(row, connection) for row in rows]
    if as_json:
        click.echo(json.dumps({"jobs": [view.as_json() | {"error": view.attempt.error} for view in views]}))
        return
    for view in views:
        agent = view.agent_id or "-"
        click.echo(f"{iso(view.created_at)}  {view.status:12} {view.condition:7} {view.job_id}  {agent}")


def _tell_database() -> None:
    """On stderr: a terminal without the server's settings would answer from another database."""
    url = make_url(parts().settings.database_url).render_as_string()
    click.echo(f"Database: {url}", err=True)


@click.command()
@click.option("--pace", default=3.0, show_default=True, type=click.FloatRange(0), metavar="SECONDS")
@click.option("--fail-at", metavar="FAILED_STEP", help="The step that fails, as a callback would name it.")
@click.option("--job-id", help="Of the job to rehearse; a new one otherwise.")
@click.option("--pipeline", default=BUILT_IN, show_default=True, metavar="NAME")
@click.option("--wait", is_flag=True, help="For a server that is about to start.")
@with_appcontext
def rehearse(pace: float, fail_at: str | None, job_id: str | None, pipeline: str, wait: bool) -> None:
    """Send a whole run to the running server, through the sender that workflows use."""
    known, settings = parts().pipelines, parts().settings
    if pipeline not in known:
        raise click.ClickException(f"no pipeline is called {pipeline}; there are {', '.join(sorted(known))}")
    if wait:
        rehearsal.wait_for(settings)
    rehearsal.play(settings, known[pipeline], pace, fail_at, job_id)


@click.command()
def version() -> None:
    """Print the version of Milepost."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    click.echo(f"{project['name']} {project['version']}")


@click.command("check")
@with_appcontext
def look() -> None:
    """Say what is wrong with this installation (exit code 1), and what is unwise."""
    ours = parts()
    problems = list(dict.fromkeys(check.wrong(ours.settings, ours.pipelines, db.engine)))
    for problem in problems:
        click.echo(f"wrong: {problem}")
    for advice in check.unwise(ours.settings):
        click.echo(f"unwise: {advice}")
    if problems:
        raise click.exceptions.Exit(1)
    click.echo(f"Nothing is wrong. Pipelines: {', '.join(sorted(ours.pipelines))}.")


@click.command("notify-test")
@with_appcontext
def notify_test() -> None:
    """Send a message to each of NOTIFY_URLS, and say whether that worked."""
    if not parts().settings.notify_urls:
        raise click.ClickException("NOTIFY_URLS is not set")
    outcome = notify.test(parts())
    for name, problem in outcome.items():
        click.echo(f"{name}: {problem or 'told'}")
    if any(outcome.values()):
        raise click.ClickException("not everybody could be told")


def tell_fault(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Have a command that the database fails say so in a sentence; for `sys.excepthook`."""
    if isinstance(fault, SQLAlchemyError):
        click.echo(f"Error: DATABASE_URL cannot be used: {reason(fault)}", err=True)
    else:
        sys.__excepthook__(kind, fault, trace)


COMMANDS = (link, sign_in, list_jobs, *upkeep.COMMANDS, rehearse, version, look, notify_test)
