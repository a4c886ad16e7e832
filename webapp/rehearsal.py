"""A whole run, played to the running server through the sender that workflows use."""

import os
import subprocess
import sys
from collections.abc import Iterator
from secrets import token_hex
from time import sleep, time

import click
import requests
from flask.cli import with_appcontext

from webapp.config import CALLBACK_PATH, ROOT, Settings
from webapp.parts import parts
from webapp.rules.pipeline import BUILT_IN, Pipeline

SENDER = ROOT / ".github" / "actions" / "report-step" / "report_step.py"
TRY_EVERY, TRIES = 0.2, 150  # seconds; while a server starts
SERVER = {"SERVER_ID": "4711", "SERVER_IP": "192.0.2.7", "TAILSCALE_IP": "100.64.0.7"}


@click.command()
@click.option("--pace", default=3.0, show_default=True, type=click.FloatRange(0), metavar="SECONDS")
@click.option("--fail-at", metavar="FAILED_STEP", help="The step that fails, as a callback would name it.")
@click.option("--job-id", help="Of the job to rehearse; a new one otherwise.")
@click.option("--pipeline", "name", default=BUILT_IN, show_default=True, metavar="NAME")
@click.option("--wait", is_flag=True, help="For a server that is about to start.")
@with_appcontext
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
    headers = {"Authorization": f"Bearer {settings.operator_token}"}
    while True:
        try:
            answer = requests.post(url, json=job, headers=headers, timeout=10)
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
