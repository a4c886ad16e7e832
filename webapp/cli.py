"""The terminal's door: the operator's verbs without a browser."""

import os
import secrets
import subprocess
import sys
from time import sleep, time

import click
import requests
from flask.cli import with_appcontext
from sqlalchemy import select

from webapp.config import CALLBACK_PATH, ROOT, Settings
from webapp.page.view import iso
from webapp.parts import parts
from webapp.routes.sign_in import sign_in_url
from webapp.storage.jobs import newest_jobs
from webapp.storage.tables import db, jobs

SENDER = ROOT / ".github" / "actions" / "report-step" / "report_step.py"
RUN = ("", "vm_created", "network_configured", "ansible_started", "ansible_complete")
STARTS_WITHIN = 30  # seconds


@click.command()
@click.argument("job_id")
@with_appcontext
def link(job_id: str) -> None:
    """Print the progress URL of a job."""
    number = db.session.scalar(select(jobs.c.link).where(jobs.c.job_id == job_id))
    if number is None:
        raise click.ClickException(f"no job has the id {job_id}")
    click.echo(parts().progress_url(job_id, number))


@click.command("sign-in")
@with_appcontext
def sign_in() -> None:
    """Print a fresh sign-in link: it works once, within ten minutes."""
    click.echo(sign_in_url(parts()))


@click.command("jobs")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@with_appcontext
def list_jobs(limit: int) -> None:
    """List the jobs, newest first."""
    connection = db.session.connection()
    rows, _ = newest_jobs(connection, limit)
    for row in rows:
        view = parts().views.of(row, connection)
        agent = view.agent_id or "-"
        click.echo(f"{iso(view.created_at)}  {view.status:12} {view.condition:6} {view.job_id}  {agent}")


@click.command()
@click.option("--older-than", "days", required=True, type=click.FloatRange(0), metavar="DAYS")
@with_appcontext
def prune(days: float) -> None:
    """Delete the jobs of which nothing was heard for DAYS, with their callbacks."""
    until, pruned = time() - days * 86_400, 0
    while ids := parts().writer.run(lambda transaction: transaction.prune(until)):
        pruned += ids
    click.echo(f"{pruned} jobs pruned")


@click.command()
@click.option("--pace", default=3.0, show_default=True, type=click.FloatRange(0), metavar="SECONDS")
@click.option("--fail-at", type=click.Choice(["provision", "configure"]))
@click.option("--job-id", help="Of the job to rehearse; a new one otherwise.")
@click.option("--wait", is_flag=True, help="For a server that is about to start.")
@with_appcontext
def rehearse(pace: float, fail_at: str | None, job_id: str | None, wait: bool) -> None:
    """Send a whole run to the running server, through the sender that workflows use."""
    settings = parts().settings
    job_id = job_id or f"rehearsal-{secrets.token_hex(4)}"
    server = _local(settings)
    if wait:
        _wait_for(server)
    _register(server, settings.operator_token, job_id)
    click.echo(f"Progress page: {parts().progress_url(job_id, 0)}")
    reports = [{"STATUS": "provisioning", "STEP": step} for step in RUN]
    end = {"STATUS": "running", "SERVER_ID": "4711", "SERVER_IP": "192.0.2.7", "TAILSCALE_IP": "100.64.0.7"}
    if fail_at:
        reports = reports[: 1 if fail_at == "provision" else 4]
        error = f"A rehearsed failure of the step {fail_at}. No server was left behind."
        end = {"STATUS": "failed", "FAILED_STEP": fail_at, "ERROR": error}
    environment = {
        **os.environ,
        "CALLBACK_URL": server + CALLBACK_PATH,
        "CALLBACK_SECRET": settings.callback_keys[0].decode(),
        "JOB_ID": job_id,
        "GITHUB_RUN_ID": str(int(time() * 1000)),
        "GITHUB_RUN_ATTEMPT": "1",
        "SUMMARY": "no",
        "no_proxy": "*",
    }
    for report in [*reports, end]:
        sleep(pace)
        _send(environment | report)


def _local(settings: Settings) -> str:
    """Where the server of this machine listens."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _wait_for(server: str) -> None:
    for _ in range(STARTS_WITHIN * 5):
        try:
            if requests.get(f"{server}/healthz", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        sleep(0.2)
    raise click.ClickException(f"no server answers at {server}")


def _register(server: str, token: str, job_id: str) -> None:
    job = {"job_id": job_id, "agent_id": job_id, "region": "rehearsal", "dispatch": False}
    headers = {"Authorization": f"Bearer {token}"}
    try:
        answer = requests.post(f"{server}/api/jobs", json=job, headers=headers, timeout=10)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise click.ClickException(f"the server at {server} did not take the job: {error}") from None


def _send(environment: dict[str, str]) -> None:
    said = subprocess.run(
        [sys.executable, SENDER], env=environment, capture_output=True, text=True, check=True
    )
    if "::warning" in said.stdout:
        raise click.ClickException(f"a callback was not delivered: {said.stdout}")


COMMANDS = (link, sign_in, list_jobs, prune, rehearse)
