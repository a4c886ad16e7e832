"""The contract's rules by the doors: callbacks go in over HTTP, and the watcher's JSON is what is held to."""

import time
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import pytest

from tests.support.server import Serve, Server, wait_until

WORDS = {"p": "pending", "a": "active", "c": "completed", "e": "error", "x": "cancelled"}
LETTERS = {state: letter for letter, state in WORDS.items()}

Said = tuple[str, dict[str, object]]


@pytest.fixture(scope="module")
def impatient(_serve: Serve) -> Iterator[Server]:
    """Takes a moment's silence for a long one."""
    server = _serve(QUIET_AFTER="2", LOST_AFTER="4")
    yield server
    server.stop()


def shown(server: Server, job_id: str) -> str:
    """The states of the steps by their first letters; `x` is cancelled."""
    return "".join(LETTERS[state] for state in server.states(job_id))


def said(text: str) -> Said:
    """`failed@3 7/2` is the end three seconds from now, of the run 7 in its attempt 2."""
    milestone, _, rest = text.partition(" ")
    milestone, _, at = milestone.partition("@")
    run, _, attempt = rest.partition("/")
    fields: dict[str, object] = {"sent_at": time.time() + float(at)} if at else {}
    fields |= {"workflow_run_id": run} if run else {}
    return milestone, fields | ({"run_attempt": attempt} if attempt else {})


def tell(server: Server, job_id: str, *texts: str) -> list[bool]:
    """Send each; for each, whether it was a duplicate."""
    return [server.report(job_id, milestone, **fields) for milestone, fields in map(said, texts)]


# The table of steps


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("furthest", "status", "steps"),
    [
        ("provisioning", "provisioning", "cappp"),
        ("vm_created", "provisioning", "ccapp"),
        ("network_configured", "provisioning", "ccapp"),
        ("ansible_started", "provisioning", "cccap"),
        ("ansible_complete", "provisioning", "cccca"),
        ("running", "running", "ccccc"),
    ],
)
def test_the_furthest_report_implies_those_that_were_lost(
    server: Server, job_id: str, furthest: str, status: str, steps: str
) -> None:
    tell(server, job_id, furthest)
    page = server.page(job_id)
    assert (shown(server, job_id), page["status"]) == (steps, status)
    assert page["condition"] == ("over" if status == "running" else "live")


@pytest.mark.one_database
def test_a_job_that_was_only_created_is_queued(server: Server, job_id: str) -> None:
    assert server.api("/api/jobs", json={"agent_id": job_id, "job_id": job_id, "dispatch": False}).ok
    page = server.page(job_id)
    assert (shown(server, job_id), page["status"], page["condition"]) == ("apppp", "queued", "live")
    assert (page["last_signal_at"], page["attempt"]) == (None, 1)
    tell(server, job_id, "heartbeat")
    assert shown(server, job_id) == "apppp"


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("furthest", "failed_step", "steps"),
    [
        (None, None, "ceppp"),
        (None, "provision", "ceppp"),
        (None, "configure", "cccep"),
        (None, "cancelled", "cxppp"),
        ("provisioning", "configure_full", "cccep"),
        ("provisioning", "Configure", "ceppp"),
        ("vm_created", "provision", "ccepp"),
        ("vm_created", "unknown", "ccepp"),
        ("vm_created", "timed_out", "ccxpp"),
        ("ansible_started", "provision", "cccep"),
        ("ansible_complete", "configure", "cccce"),
        ("ansible_complete", "cancelled", "ccccx"),
        ("running", "provision", "cccce"),
    ],
)
def test_a_failure_stands_on_its_step(
    server: Server, job_id: str, furthest: str | None, failed_step: str | None, steps: str
) -> None:
    tell(server, job_id, *([furthest] if furthest else []))
    server.report(job_id, "failed", failed_step=failed_step, error="no <b>room</b>")
    page = server.page(job_id)
    assert (shown(server, job_id), page["status"], page["condition"]) == (steps, "failed", "over")
    assert (page["failed_step"], page["error"]) == (failed_step, "no <b>room</b>")


# Rules 1 and 2: once per attempt, and never back


def test_a_repeat_is_a_duplicate_and_not_even_a_sign_of_life(server: Server, job_id: str) -> None:
    tell(server, job_id, "provisioning", "vm_created@-2")
    before = server.job(job_id)
    assert tell(server, job_id, "vm_created@1", "vm_created", "provisioning@0") == [True] * 3
    assert server.report(job_id, "vm_created", server_id="9", error="x")
    assert server.job(job_id) == before
    tell(server, job_id, "running")
    ended = server.job(job_id)
    assert tell(server, job_id, "running", "running@5", "vm_created") == [True] * 3
    assert server.job(job_id) == ended


@pytest.mark.one_database
@pytest.mark.parametrize("order", list(permutations(["provisioning", "vm_created", "ansible_started"])))
def test_progress_never_goes_back_whatever_the_order(
    server: Server, job_id: str, order: tuple[str, ...]
) -> None:
    furthest, ranks = 0, {"provisioning": 1, "vm_created": 2, "ansible_started": 3}
    for milestone in order:
        furthest = max(furthest, ranks[milestone])
        assert tell(server, job_id, milestone) == [False]
        assert shown(server, job_id).index("a") == furthest


def test_a_milestones_time_is_its_sent_at_else_its_arrival(server: Server, job_id: str) -> None:
    tell(server, job_id, "provisioning@-100", "ansible_started@-40", "running")
    times = [(step["started_at"], step["finished_at"]) for step in server.page(job_id)["steps"]]
    (_, created), (creating, _), (installing, installed), (configuring, configured), (running, _) = times
    assert created == creating and creating < configuring
    assert (installing, installed, configured, running) == (None, configuring, None, None)
    assert server.page(job_id)["steps"][4]["finished_at"] > configuring


# Rule 3: the ends


@pytest.mark.parametrize(
    ("texts", "status", "steps"),
    [
        (["failed", "running"], "running", "ccccc"),
        (["running", "failed"], "failed", "cccce"),
        (["running@0", "failed@-50"], "running", "ccccc"),
        (["failed@0", "running@-50"], "failed", "ccepp"),
        (["failed@-50", "running@0"], "running", "ccccc"),
        (["running@0", "failed"], "failed", "cccce"),
        (["running", "failed@-50"], "failed", "cccce"),
    ],
)
def test_of_two_ends_the_newer_stands(
    server: Server, job_id: str, texts: list[str], status: str, steps: str
) -> None:
    assert tell(server, job_id, "vm_created", *texts) == [False] * 3
    page = server.page(job_id)
    assert (page["status"], page["condition"], shown(server, job_id)) == (status, "over", steps)


def test_an_end_that_loses_moves_nothing(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created", "failed@0")
    before = server.job(job_id)
    at = time.time() - 60
    assert not server.report(job_id, "running", sent_at=at, server_id="7", server_ip="192.0.2.7")
    after = server.job(job_id)
    assert after | {"version": None} == before | {"version": None}


def test_after_the_end_a_milestone_fills_in_its_time_and_no_more(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created", "failed@0")
    before = server.page(job_id)
    assert tell(server, job_id, "ansible_started@-30", "heartbeat", "provisioning") == [False] * 3
    after = server.page(job_id)
    assert shown(server, job_id) == "ccepp"
    assert after["last_signal_at"] == before["last_signal_at"]
    assert before["steps"][3]["started_at"] is None and after["steps"][3]["started_at"]
    assert after["version"] != before["version"]


# Rule 4: attempts


@pytest.mark.parametrize(
    ("texts", "attempt", "steps"),
    [
        (["vm_created 7", "provisioning 8"], 2, "cappp"),
        (["vm_created 7", "provisioning 7/2"], 2, "cappp"),
        (["vm_created 9/1", "provisioning 10/1"], 2, "cappp"),
        (["vm_created 7/9", "provisioning 7/10"], 2, "cappp"),
        (["failed 7", "provisioning 7/2"], 2, "cappp"),
        (["running 7", "heartbeat 8"], 2, "apppp"),
        (["vm_created 7", "running 6"], 1, "ccapp"),
        (["vm_created 7/2", "failed 7/1"], 1, "ccapp"),
        (["vm_created 10", "running 9"], 1, "ccapp"),
        (["provisioning 7", "provisioning 8", "running 7"], 2, "cappp"),
        (["vm_created 7", "ansible_started"], 1, "cccap"),
        (["vm_created 7", "provisioning 8", "vm_created"], 2, "ccapp"),
        (["vm_created", "ansible_started 7"], 1, "cccap"),
        (["heartbeat", "provisioning 7"], 1, "cappp"),
        (["vm_created", "ansible_started 7", "provisioning 6"], 1, "cccap"),
        (["vm_created", "failed", "provisioning 7"], 2, "cappp"),
        (["running", "heartbeat 7"], 2, "apppp"),
        (["vm_created 7", "vm_created 8", "vm_created 9", "vm_created 8"], 3, "ccapp"),
    ],
)
def test_a_callback_belongs_to_the_attempt_of_its_run(
    server: Server, job_id: str, texts: list[str], attempt: int, steps: str
) -> None:
    tell(server, job_id, *texts)
    assert (server.page(job_id)["attempt"], shown(server, job_id)) == (attempt, steps)


def test_a_milestone_counts_once_in_each_attempt(server: Server, job_id: str) -> None:
    texts = ["provisioning 7", "provisioning 8", "provisioning 7", "provisioning 8", "provisioning 6"]
    assert tell(server, job_id, *texts) == [False, False, True, True, False]
    assert tell(server, job_id, "provisioning 6", "provisioning") == [True, True]


def test_an_older_attempt_changes_nothing_shown(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created 7", "provisioning 8")
    before = server.job(job_id)
    assert not server.report(job_id, "failed", workflow_run_id=7, error="old", server_id="1")
    assert tell(server, job_id, "running 6", "heartbeat 7", "heartbeat@0 6") == [False] * 3
    assert server.job(job_id) == before


def test_a_new_attempt_begins_with_nothing_of_the_old_one(server: Server, job_id: str) -> None:
    server.report(job_id, "vm_created", workflow_run_id=7, server_id="1", server_ip="192.0.2.7")
    server.report(job_id, "failed", workflow_run_id=7, failed_step="configure", error="no")
    tell(server, job_id, "provisioning 8")
    job = server.job(job_id)
    names = ("failed_step", "error", "server_id", "server_ip", "tailscale_ip")
    assert [job[name] for name in names] == [None] * 5
    assert (job["status"], job["condition"], job["attempt"]) == ("provisioning", "live", 2)


# Rule 5: heartbeats and silence


def test_a_heartbeat_moves_only_the_last_sign_of_life(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created")
    before = server.page(job_id)
    assert tell(server, job_id, "heartbeat") == [False]
    after = server.page(job_id)
    assert after["last_signal_at"] > before["last_signal_at"]
    differ = {name for name in after if after[name] != before[name]}
    assert differ <= {"last_signal_at", "version"}


def test_a_heartbeat_no_newer_than_the_last_is_a_replay(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created")
    at = time.time()
    assert not server.report(job_id, "heartbeat", sent_at=at - 5)
    before = server.page(job_id)
    for replayed in (at - 5, at - 6, at - 200):
        assert server.report(job_id, "heartbeat", sent_at=replayed)
    assert server.page(job_id) == before
    assert not server.report(job_id, "heartbeat", sent_at=at - 4)
    assert not server.report(job_id, "heartbeat") and not server.report(job_id, "heartbeat")


def test_the_last_sign_of_life_is_a_time_of_arrival(server: Server, job_id: str) -> None:
    tell(server, job_id, "vm_created@200", "heartbeat@250")
    page = server.page(job_id)
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 60))
    assert page["last_signal_at"] < now < page["steps"][2]["started_at"]


def test_after_the_end_a_heartbeat_changes_nothing(server: Server, job_id: str) -> None:
    tell(server, job_id, "failed")
    before = server.job(job_id)
    assert tell(server, job_id, "heartbeat", "heartbeat@0") == [False, False]
    assert server.job(job_id) == before


@pytest.mark.one_database
@pytest.mark.slow
def test_silence_makes_a_job_quiet_then_lost_until_a_sign_of_life(impatient: Server, job_id: str) -> None:
    created, ended = f"{job_id}-created", f"{job_id}-ended"

    def condition(id: str = job_id) -> Any:
        return impatient.page(id)["condition"]

    assert impatient.api("/api/jobs", json={"agent_id": created, "job_id": created, "dispatch": False}).ok
    tell(impatient, ended, "failed")
    tell(impatient, job_id, "vm_created")
    before = impatient.page(job_id)
    assert before["condition"] == "live"
    wait_until(lambda: condition() == "quiet")
    assert tell(impatient, job_id, "vm_created") == [True]
    assert condition() != "live", "a duplicate is no sign of life"
    tell(impatient, job_id, "heartbeat")
    assert condition() == "live"
    wait_until(lambda: condition() == "lost")
    after = impatient.page(job_id)
    assert (after["status"], after["steps"]) == (before["status"], before["steps"])
    assert (condition(created), condition(ended)) == ("live", "over"), "never heard of is not silent"
    tell(impatient, job_id, "ansible_started")
    assert (condition(), shown(impatient, job_id)) == ("live", "cccap")
    tell(impatient, job_id, "running")
    assert condition() == "over"
