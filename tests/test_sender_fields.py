"""What the sender makes of its environment, of an answer, and of what it said before."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.receiver import LINK, SENDER, Receiver, answer, receiving, send
from tests.support.server import CALLBACKS, Server
from tests.support.server import KEY as MILEPOST_KEY


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def job(receiver: Receiver, tmp_path: Path) -> dict[str, str]:
    """The environment of one job on GitHub's runner, in a private repository."""
    event = tmp_path / "event.json"
    event.write_text(json.dumps({"repository": {"visibility": "private", "private": True}}))
    return {
        "CALLBACK_URL": receiver.url,
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_ACTIONS": "true",
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_EVENT_PATH": str(event),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }


def test_a_step_alone_is_in_progress(receiver: Receiver) -> None:
    assert send(CALLBACK_URL=receiver.url, STEP="cloned") == "Reported cloned\n"
    (body,) = receiver.bodies()
    assert (body["status"], body["step"]) == ("provisioning", "cloned")


@pytest.mark.parametrize(
    ("word", "status", "failed_step"),
    [
        ("success", "running", None),
        ("failure", "failed", "built"),
        ("cancelled", "failed", "cancelled"),
        ("failed", "failed", "built"),
        ("canceled", "failed", "cancelled"),
        ("ABORTED", "failed", "cancelled"),
    ],
)
def test_the_jobs_status_ends_it_at_the_last_step(
    receiver: Receiver, job: dict[str, str], word: str, status: str, failed_step: str | None
) -> None:
    for step in ("cloned", "built"):
        send(**job, STEP=step)
    send(**job, STATUS=word)
    end = receiver.bodies()[-1]
    assert (end["status"], end.get("failed_step")) == (status, failed_step)


def test_another_job_of_the_same_runner_has_steps_of_its_own(receiver: Receiver, job: dict[str, str]) -> None:
    send(**job, STEP="cloned")
    send(**job, JOB_ID="job-2", STATUS="failure")
    assert "failed_step" not in receiver.bodies()[-1]


def test_sends_the_fields_that_a_pipeline_needs(receiver: Receiver, job: dict[str, str]) -> None:
    fields = {"PIPELINE": "deploy-site", "SUBJECT": "The site", "NOTE": "5 of 8 built"}
    send(**job, **fields, STATUS="success", RESULT_URL="https://site.example/", SERVER_LEFT="true")
    send(**job, **fields, STATUS="failure", SERVER_LEFT="false", RESULT_URL="https://site.example/")
    done, failed = receiver.bodies()
    shared = {"pipeline": "deploy-site", "subject": "The site", "note": "5 of 8 built"}
    shared |= {"repository": "owner/name", "workflow_run_id": "7001"}
    assert done.items() >= (shared | {"result_url": "https://site.example/"}).items()
    assert "server_left" not in done, "it is about failures"
    assert failed.items() >= (shared | {"server_left": False}).items()


def test_a_note_needs_no_milestone(receiver: Receiver) -> None:
    send(CALLBACK_URL=receiver.url, NOTE="5 of 8 built")
    (body,) = receiver.bodies()
    assert (body["type"], body["note"]) == ("heartbeat", "5 of 8 built")


def test_shortens_every_text_to_what_the_door_takes(receiver: Receiver) -> None:
    long = dict.fromkeys(("FAILED_STEP", "SUBJECT", "NOTE", "SERVER_ID", "ERROR"), "x" * 5000)
    send(CALLBACK_URL=receiver.url, STATUS="failed", STEP="y" * 5000, **long)
    send(CALLBACK_URL=receiver.url, STATUS="running", RESULT_URL="https://x.example/" + "x" * 5000)
    failed, done = receiver.bodies()
    lengths = {name: len(str(failed[name])) for name in (*map(str.lower, long), "step")}
    assert lengths == {
        "failed_step": 64,
        "subject": 100,
        "note": 200,
        "server_id": 255,
        "error": 2000,
        "step": 64,
    }
    assert "result_url" not in done, "half an address leads nowhere"


def test_the_end_of_a_log_is_the_error(receiver: Receiver, tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    log.write_bytes(b"no\n" * 100_000 + b"\x1b[31mld: \xff no space\0 left\x1b[0m\r\n")
    send(CALLBACK_URL=receiver.url, STATUS="failure", ERROR_FILE=str(log))
    (body,) = receiver.bodies()
    assert body["error"].endswith("no\nld: \ufffd no space left")
    assert len(body["error"]) <= 2000


def test_an_error_file_without_an_error_keeps_no_end_back(receiver: Receiver) -> None:
    for file in ("/nowhere", "/"):
        send(CALLBACK_URL=receiver.url, STATUS="failure", ERROR_FILE=file)
    missing, folder = receiver.bodies()
    assert "error" not in missing
    assert "could not be read" in folder["error"]


@pytest.mark.parametrize(
    ("variables", "run"),
    [
        ({"CI_PIPELINE_ID": "55"}, ("55", None)),
        ({"CI_PIPELINE_ID": "55", "RUN_ATTEMPT": "3"}, ("55", "3")),
        ({"BUILD_NUMBER": "12"}, ("12", None)),
        ({"BUILD_NUMBER": "v1.2"}, (None, None)),
        ({"WORKFLOW_RUN_ID": "9", "RUN_ATTEMPT": "2", "GITHUB_RUN_ID": "7001"}, ("9", "2")),
    ],
)
def test_other_systems_name_their_run(
    receiver: Receiver, variables: dict[str, str], run: tuple[str | None, str | None]
) -> None:
    cleared = {"GITHUB_RUN_ID": "", "GITHUB_REPOSITORY": "owner/name"}
    send(**(cleared | {"CALLBACK_URL": receiver.url, "STEP": "cloned"} | variables))
    (body,) = receiver.bodies()
    assert (body.get("workflow_run_id"), body.get("run_attempt")) == run
    assert "repository" not in body, "the run is none of GitHub's"


def test_the_link_is_told_once(receiver: Receiver, job: dict[str, str], tmp_path: Path) -> None:
    first, second = send(**job, STEP="cloned"), send(**job, STEP="built")
    assert first.splitlines() == ["Reported cloned", f"::notice title=Milepost::Live progress: {LINK}"]
    assert second == "Reported built\n"
    assert (tmp_path / "summary").read_text() == f"Live progress: <{LINK}>\n"
    assert (tmp_path / "output").read_text() == f"progress-url={LINK}\n" * 2


@pytest.mark.parametrize(
    "event", [{"repository": {"visibility": "public"}}, {"repository": {"private": False}}]
)
def test_a_public_repository_hears_no_link(
    receiver: Receiver, job: dict[str, str], tmp_path: Path, event: dict[str, object]
) -> None:
    (tmp_path / "event.json").write_text(json.dumps(event))
    assert send(**job, STEP="cloned", SUMMARY="yes") == f"Reported cloned\n::add-mask::{LINK}\n"
    assert not (tmp_path / "summary").exists()
    assert LINK in (tmp_path / "output").read_text(), "which the runner masks"


def test_a_public_project_elsewhere_hears_no_link(receiver: Receiver) -> None:
    gitlab = {"CI_PROJECT_VISIBILITY": "public", "SUMMARY": "yes", "CALLBACK_URL": receiver.url}
    assert send(**gitlab, STEP="cloned") == "Reported cloned\n"
    assert LINK in send(**gitlab | {"CI_PROJECT_VISIBILITY": "internal"}, STEP="cloned")


@pytest.mark.parametrize("summary", ["no", "false"])
def test_the_link_is_kept_back_on_request(
    receiver: Receiver, job: dict[str, str], tmp_path: Path, summary: str
) -> None:
    assert send(**job, STEP="cloned", SUMMARY=summary) == "Reported cloned\n"
    assert not (tmp_path / "summary").exists()


@pytest.mark.parametrize("link", ["javascript:alert(1)", "https://x/\n::error::x", "https://x/<b>", 7, None])
def test_an_answer_puts_nothing_but_an_address_into_the_run(
    receiver: Receiver, job: dict[str, str], tmp_path: Path, link: object
) -> None:
    receiver.answers[:] = [answer(200, json.dumps({"received": True, "progress_url": link}).encode())]
    assert send(**job, STEP="cloned") == "Reported cloned\n"
    assert not (tmp_path / "summary").exists()
    assert not (tmp_path / "output").exists()


STRANGERS = [b"<html>Sign in</html>", b"{}", b'{"received": "true"}', b"[" * 50_000, b""]


@pytest.mark.parametrize("body", STRANGERS)
def test_a_stranger_who_answers_200_costs_a_warning(receiver: Receiver, body: bytes) -> None:
    receiver.answers[:] = [answer(200, body)]
    log = send(CALLBACK_URL=receiver.url, STEP="cloned")
    assert log.startswith("::warning") and "not as Milepost does" in log
    assert len(receiver.bodies()) == 1


@pytest.mark.parametrize("status", ["success", "failure", "cancelled", "running", "failed"])
def test_an_end_is_tried_again_after_a_stranger(receiver: Receiver, status: str) -> None:
    receiver.answers.insert(0, answer(200, b"<html>Sign in</html>"))
    assert send(CALLBACK_URL=receiver.url, STATUS=status).startswith("Reported")
    assert len(receiver.bodies()) == 2


def test_a_proxy_gets_what_curl_would_give_it(receiver: Receiver) -> None:
    log = send(CALLBACK_URL="http://milepost.example/hook", STEP="cloned", http_proxy=receiver.url)
    assert (log, receiver.asked) == ("Reported cloned\n", ["http://milepost.example/hook"])


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_https_goes_through_a_tunnel(receiver: Receiver, name: str) -> None:
    proxy = {
        name: receiver.url.removesuffix("/api/webhooks/github"),
        "RETRY_SECONDS": "2",
        "PAUSE_SECONDS": "2",
    }
    log = send(CALLBACK_URL="https://milepost.example/hook", STEP="cloned", **proxy)
    assert receiver.asked == ["milepost.example:443"]
    assert "403" in log


@pytest.mark.parametrize("value", ["127.0.0.1", "x.example, 127.0.0.0/8", "*"])
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_is_honoured(receiver: Receiver, name: str, value: str) -> None:
    away = {"http_proxy": "http://127.0.0.1:9", name: value}
    assert send(CALLBACK_URL=receiver.url, STEP="cloned", **away) == "Reported cloned\n"


def test_an_upper_case_http_proxy_is_nobodys(receiver: Receiver) -> None:
    """A CGI request could have set it; curl has ignored it ever since."""
    assert send(CALLBACK_URL=receiver.url, STEP="cloned", HTTP_PROXY="http://127.0.0.1:9").startswith("Rep")


def test_no_folder_to_note_in_keeps_nothing_back(receiver: Receiver) -> None:
    nowhere = dict.fromkeys(("RUNNER_TEMP", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"), "/nowhere/at/all")
    log = send(CALLBACK_URL=receiver.url, STEP="cloned", SUMMARY="yes", **nowhere)
    assert log == f"Reported cloned\nLive progress: {LINK}\n"


def test_a_log_that_knows_ascii_alone_is_no_obstacle(receiver: Receiver) -> None:
    send(CALLBACK_URL=receiver.url, STEP="é" * 99, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="POSIX")
    assert receiver.bodies()[0]["step"] == "é" * 63 + "…"


def test_nothing_to_report_is_said(receiver: Receiver) -> None:
    assert "no STATUS, no STEP and no NOTE" in send(CALLBACK_URL=receiver.url)
    assert receiver.got.empty()


def test_it_is_python_3_8() -> None:
    ast.parse(SENDER.read_text(), feature_version=(3, 8))


@pytest.mark.one_database
def test_the_door_takes_whatever_the_sender_made_of_it(server: Server, job_id: str, tmp_path: Path) -> None:
    hostile = "\udcff\x01\x1b[0m😀\u2028\u200f\n" * 5000
    names = ["STEP", "FAILED_STEP", "ERROR", "SUBJECT", "NOTE", "SERVER_ID", "SERVER_IP", "TAILSCALE_IP"]
    texts = dict.fromkeys([*names, "RESULT_URL", "SERVER_LEFT"], hostile)
    door = {"CALLBACK_URL": server.url + CALLBACKS, "CALLBACK_SECRET": MILEPOST_KEY, "JOB_ID": job_id}
    for status in ("", "in_progress", "failure", "cancelled", "success"):
        assert send(**door, **texts, STATUS=status).startswith("Reported ")
    assert len(server.page(job_id)["subject"]) <= 100
