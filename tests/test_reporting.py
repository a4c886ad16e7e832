"""The action, and every way of reporting that reporting.md shows, run as it stands there."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.act import BIN, Repository
from tests.support.receiver import KEY, LINK, Receiver, receiving, snippet
from tests.support.server import CALLBACKS, ROOT, Serve, Server, wait_until
from tests.support.server import KEY as MILEPOST_KEY

DOCS = ROOT / ".github/docs"
SITE = "https://site.example/"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def repository(receiver: Receiver, tmp_path: Path) -> Repository:
    repository = Repository(
        tmp_path, {"GH_CALLBACK_SECRET": KEY}, {"CALLBACK_URL": receiver.url}, {"page_url": SITE}
    )
    for script in ("build", "publish"):
        repository.write(f"{script}.sh", "#!/bin/sh\necho ok")
    return repository


def milestones(receiver: Receiver) -> list[str]:
    """What was reported, in order, heartbeats left out."""
    bodies = [body for body in receiver.bodies() if "status" in body]
    return [body["step"] if body["status"] == "provisioning" else body["status"] for body in bodies]


def end(receiver: Receiver) -> dict[str, Any]:
    return next(body for body in reversed(receiver.bodies()) if "status" in body)


def test_two_lines_report_a_milestone(receiver: Receiver, repository: Repository) -> None:
    run = repository.start(snippet("name: Deploy\n"))
    assert run.finish()
    assert milestones(receiver) == ["building", "publishing", "running"]
    assert {(body["job_id"], body["pipeline"]) for body in receiver.bodies()} == {("site", "deploy-site")}
    log = run.log.read_text()
    assert log.count(f"::notice title=Milepost::Live progress: {LINK}\n") == 1
    assert f"Summary - Live progress: <{LINK}>" in log
    assert [log.count(f"Reported {what}\n") for what in milestones(receiver)] == [1, 1, 1]


def test_a_failure_is_reported_at_the_last_step(receiver: Receiver, repository: Repository) -> None:
    repository.write("publish.sh", "#!/bin/sh\nexit 1")
    assert not repository.start(snippet("name: Deploy\n")).finish()
    assert milestones(receiver) == ["building", "publishing", "failed"]
    assert end(receiver)["failed_step"] == "publishing"


def test_a_cancelled_run_is_reported_as_cancelled(
    receiver: Receiver, repository: Repository, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    repository.write("build.sh", f"#!/bin/sh\ntouch {begun}\nexec sleep 600")
    run = repository.start(snippet("name: Deploy\n"))
    wait_until(begun.exists)
    run.cancel()
    assert not run.finish()
    assert milestones(receiver) == ["building", "failed"]
    assert end(receiver)["failed_step"] == "cancelled"


def test_a_public_repository_hears_no_link(receiver: Receiver, repository: Repository) -> None:
    repository.event["repository"] = {"visibility": "public", "private": False}
    run = repository.start(snippet("name: Deploy\n"))
    assert run.finish()
    assert milestones(receiver) == ["building", "publishing", "running"]
    log = run.log.read_text()
    assert "notice" not in log and "Summary" not in log


def test_what_runs_in_parallel_is_ended_by_a_last_job(receiver: Receiver, repository: Repository) -> None:
    run = repository.start(snippet("name: Build everywhere\n"))
    assert run.finish()
    assert milestones(receiver) == ["building", "running"]
    assert run.log.read_text().count("::notice title=Milepost") == 1


def test_one_failure_in_a_matrix_is_the_end(receiver: Receiver, repository: Repository) -> None:
    repository.write("build.sh", '#!/bin/sh\ntest "$1" = amd64')
    assert not repository.start(snippet("name: Build everywhere\n")).finish()
    assert milestones(receiver) == ["building", "failed"]
    assert end(receiver)["failed_step"] == "building"


REPORT = """
on: workflow_dispatch
jobs:
  report:
    runs-on: ubuntu-latest
    env: { CALLBACK_SECRET: "${{ secrets.GH_CALLBACK_SECRET }}" }
    steps:
      - uses: actions/checkout@v6
      - id: long
        run: python3 -c "print('error=' + 'x' * 200_000)" >>"$GITHUB_OUTPUT"
      - id: report
        uses: ./.github/actions/report-step
        env: { PATH: "${{ vars.LATER_PATH }}" }
        with:
          callback-url: ${{ vars.CALLBACK_URL }}
          job-id: site
          status: failure
          error: ${{ steps.long.outputs.error }}
      - run: echo "the link is ${{ steps.report.outputs.progress-url }}"
"""


def test_an_error_of_200_kb_does_not_keep_the_end_back(receiver: Receiver, repository: Repository) -> None:
    repository.variables["LATER_PATH"] = os.environ["PATH"]
    run = repository.start(REPORT)
    assert run.finish()
    assert end(receiver)["error"] == "The error is too long to be handed over; the log of the run has it."
    assert f"the link is {LINK}" in run.log.read_text()


def test_a_runner_without_python_says_so(receiver: Receiver, repository: Repository, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "bash").symlink_to("/bin/bash")
    old = programs / "python3"
    old.write_text("#!/bin/bash\nexit 1 # as an older one does, asked for its version")
    old.chmod(0o755)
    repository.variables["LATER_PATH"] = str(programs)
    run = repository.start(REPORT)
    assert run.finish()
    assert "this runner has no Python 3.8 or newer" in run.log.read_text()
    assert receiver.got.empty()


@pytest.fixture
def milepost(serve: Serve, repository: Repository) -> Server:
    """A Milepost that has the example's pipeline, and the repository of a site that knows its key."""
    repository.secrets["GH_CALLBACK_SECRET"] = MILEPOST_KEY
    repository.write("site/index.html", '<a href="other.html">')
    return serve(PIPELINES=str(DOCS / "examples"))


@pytest.mark.one_database
def test_the_example_is_a_page_with_an_end_of_its_own(milepost: Server, repository: Repository) -> None:
    example, url = (DOCS / "examples/deploy-site.yml").read_text(), milepost.url + CALLBACKS
    assert not repository.start(example, callback_url=url, job_id="site").finish()
    page = milepost.page("site")
    assert (page["status"], page["failed_step"]) == ("failed", "checking")
    assert page["error"] == "other.html is linked, and is not there"
    assert milepost.states("site") == ["completed", "completed", "error", "pending", "pending"]

    repository.write("site/other.html", "<p>")
    again = {"GITHUB_RUN_ATTEMPT": "2"}
    run = repository.start(example, again, callback_url=url, job_id="site")
    assert run.finish()
    page = milepost.page("site")
    assert (page["attempt"], page["status"]) == (2, "running")
    assert (page["subject"], page["result_url"]) == ("Documentation", SITE)
    assert [step["label"] for step in page["steps"]][2] == "Checking Links"
    assert milepost.states("site") == ["completed"] * 5
    assert run.log.read_text().count(f"Live progress: {milepost.link('site')}\n") == 1
    assert "The documentation is published" in requests.get(milepost.link("site"), timeout=30).text


@pytest.mark.parametrize("beginning", ["name: Deploy\n", "name: Build everywhere\n"])
def test_the_documented_workflows_are_what_github_takes(beginning: str) -> None:
    command = [str(BIN / "actionlint"), f"-shellcheck={BIN / 'shellcheck'}", "-"]
    done = subprocess.run(command, input=snippet(beginning), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
