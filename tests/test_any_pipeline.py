"""Pipelines of the operator's own, from file to screen; each job keeps the steps it was opened with."""

from pathlib import Path

import pytest
import requests

from tests.support.server import Serve, Server

DEPLOY = """
title = "Deploy the site"
done = "The site is live"
result = "Open the site"
inputs = ["job_id", "callback_url"]

[[steps]]
id = "queued"
label = "Queued"

[[steps]]
id = "building"
label = "Building"
reached_by = ["cloned", "building"]
failed_by = ["build", "build_*"]
now = "Building the site"

[[steps]]
id = "uploading"
label = "Uploading"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "deploy.toml").write_text(DEPLOY)
    return folder


@pytest.fixture(scope="module")
def deployer(_serve: Serve, folder: Path) -> Server:
    return _serve(PIPELINES=str(folder))


def shown(server: Server, job_id: str) -> list[tuple[str, str]]:
    return [(step["id"], step["state"]) for step in server.page(job_id)["steps"]]


def test_a_callback_registers_a_job_of_any_pipeline(deployer: Server, job_id: str) -> None:
    deployer.report(job_id, "provisioning", pipeline="deploy", subject="docs · v2")
    assert shown(deployer, job_id) == [
        ("queued", "completed"),
        ("building", "active"),
        ("uploading", "pending"),
    ]
    deployer.report(job_id, "uploading", pipeline="ignored later")
    deployer.report(job_id, "vm_created")  # unknown here: a sign of life that moves nothing
    assert shown(deployer, job_id)[2] == ("uploading", "active")
    deployer.report(job_id, "running", result_url="https://docs.example/")
    page = requests.get(deployer.link(job_id), timeout=30).text
    for words in ("The site is live", "docs · v2", 'href="https://docs.example/"', "Open the site"):
        assert words in page
    for words in ("server", "agent"):
        assert words not in page.partition("<body")[2].lower().replace("the server cannot be reached", "")


def test_a_failure_stands_where_the_file_says(deployer: Server, job_id: str) -> None:
    deployer.report(job_id, "uploading", pipeline="deploy")
    deployer.report(job_id, "failed", failed_step="build_assets", error="no room")
    assert shown(deployer, job_id)[2] == ("uploading", "error")
    other = f"{job_id}-2"
    deployer.report(other, "failed", pipeline="deploy", failed_step="build_assets")
    assert shown(deployer, other)[1] == ("building", "error")


@pytest.mark.one_database
def test_an_unknown_pipeline_is_named_and_nothing_is_stored(deployer: Server, job_id: str) -> None:
    body = f'{{"job_id": "{job_id}", "status": "provisioning", "pipeline": "nope"}}'.encode()
    answer = deployer.post(body)
    assert (answer.status_code, "nope" in answer.json()["error"]) == (400, True)
    assert deployer.api(f"/api/jobs/{job_id}").status_code == 404
    answer = deployer.create(job_id, pipeline="nope", dispatch=False)
    assert (answer.status_code, "nope" in answer.json()["error"]) == (400, True)


def test_the_api_starts_and_lists_jobs_by_pipeline(deployer: Server, job_id: str) -> None:
    assert deployer.create(job_id, pipeline="deploy", dispatch=False).json()["pipeline"] == "deploy"
    deployer.report(f"{job_id}-2", "provisioning")
    listed = deployer.api("/api/jobs?pipeline=deploy&limit=200").json()["jobs"]
    assert job_id in [job["job_id"] for job in listed]
    assert {job["pipeline"] for job in listed} == {"deploy"}


def test_a_job_keeps_its_steps_whatever_becomes_of_the_file(
    serve: Serve, deployer: Server, tmp_path: Path, job_id: str
) -> None:
    deployer.report(job_id, "uploading", pipeline="deploy", workflow_run_id=1)
    (tmp_path / "deploy.toml").write_text(DEPLOY.replace("Uploading", "Shipping"))
    other = serve(PIPELINES=str(tmp_path), DATABASE_URL=deployer.database_url)
    without = serve(DATABASE_URL=deployer.database_url)
    for server in (other, without, deployer):
        assert server.page(job_id)["steps"][2]["label"] == "Uploading"
        assert server.page(job_id)["version"] == deployer.page(job_id)["version"]
    without.report(job_id, "building", workflow_run_id=2)  # the file is gone there: the steps before
    assert without.page(job_id)["steps"][2]["label"] == "Uploading"
    other.report(job_id, "building", workflow_run_id=3)
    assert deployer.page(job_id)["steps"][2]["label"] == "Shipping"


@pytest.mark.one_database
@pytest.mark.parametrize("fail_at", ["", "build_assets"])
@pytest.mark.slow
def test_any_pipeline_is_rehearsed(deployer: Server, job_id: str, fail_at: str) -> None:
    options = ["--fail-at", fail_at] if fail_at else []
    deployer.flask("rehearse", "--pace", "0", "--pipeline", "deploy", "--job-id", job_id, *options)
    states = [state for _, state in shown(deployer, job_id)]
    assert states == (["completed", "error", "pending"] if fail_at else ["completed"] * 3)


@pytest.mark.one_database
def test_a_broken_file_stops_the_start_with_one_sentence(deployer: Server, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("steps = 3")
    environ = dict(deployer.environ)
    deployer.environ["PIPELINES"] = str(tmp_path)
    try:
        done = deployer.flask("jobs", check=False)
    finally:
        deployer.environ = environ
    assert done.returncode
    assert f"{tmp_path}/broken.toml: steps: not 2 to 12" in done.stderr
    assert "Traceback" not in done.stderr
