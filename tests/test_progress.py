"""The rules of progress, held against the contract's tables and against every order of arrival."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.rules.progress import RANKS, Attempt, Report, Run, condition, is_stale, place, receive, steps

STATES = {"p": "pending", "a": "active", "c": "completed", "e": "error", "x": "cancelled"}
MILESTONES = [*RANKS, "failed"]


def report(milestone: str | None, **said: object) -> Report:
    return replace(Report("job", milestone, arrived_at=100.0), **said)


def after(*reports: Report | str, attempt: Attempt | None = None) -> Attempt:
    """The attempt after reports, repeats left out as the callbacks table leaves them out."""
    attempt = attempt or Attempt("job", 1, opened_at=1.0)
    seen = set()
    for order, said in enumerate(reports):
        one = report(said, arrived_at=100.0 + order) if isinstance(said, str) else said
        if one.milestone is None or one.milestone not in seen:
            attempt = receive(attempt, one)
        seen.add(one.milestone)
    return attempt


def states(attempt: Attempt) -> str:
    letters = {state: letter for letter, state in STATES.items()}
    return "".join(letters[step.state] for step in steps(attempt))


@pytest.mark.parametrize(
    ("furthest", "shown", "status"),
    [
        (None, "apppp", "queued"),
        ("provisioning", "cappp", "provisioning"),
        ("vm_created", "ccapp", "provisioning"),
        ("network_configured", "ccapp", "provisioning"),
        ("ansible_started", "cccap", "provisioning"),
        ("ansible_complete", "cccca", "provisioning"),
        ("running", "ccccc", "running"),
    ],
)
def test_the_furthest_report_alone_gives_the_steps(furthest: str | None, shown: str, status: str) -> None:
    attempt = after(*([furthest] if furthest else []))
    assert (states(attempt), attempt.status) == (shown, status)


@pytest.mark.parametrize(
    ("furthest", "failed_step", "shown"),
    [
        (None, None, "ceppp"),
        (None, "provision", "ceppp"),
        (None, "configure", "cccep"),
        ("provisioning", "unknown", "ceppp"),
        ("provisioning", "configure_full", "cccep"),
        ("provisioning", "configured", "ceppp"),
        ("vm_created", "provision", "ccepp"),
        ("vm_created", None, "ccepp"),
        ("ansible_started", "provision", "cccep"),
        ("ansible_complete", "configure", "cccce"),
        ("ansible_complete", None, "cccce"),
        ("running", "configure", "cccce"),
        (None, "cancelled", "cxppp"),
        ("vm_created", "cancelled", "ccxpp"),
        ("ansible_complete", "timed_out", "ccccx"),
    ],
)
def test_a_failure_stands_on_its_step(furthest: str | None, failed_step: str | None, shown: str) -> None:
    failed = report("failed", failed_step=failed_step, arrived_at=200.0)
    attempt = after(*([furthest] if furthest else []), failed)
    assert (states(attempt), attempt.status) == (shown, "failed")


def test_a_dispatch_that_was_refused_stands_on_queued() -> None:
    attempt = Attempt("job", 1, opened_at=1.0, end="refused", ended_at=2.0)
    assert (states(attempt), attempt.status) == ("epppp", "failed")


def test_the_rank_is_frozen_at_the_end_and_a_late_milestone_only_fills_in_its_time() -> None:
    attempt = after("vm_created", "failed", report("ansible_started", sent_at=150.0))
    assert states(attempt) == "ccepp"
    assert steps(attempt)[3].started_at == 150.0
    assert attempt.last_signal_at == 101.0


@pytest.mark.parametrize(
    ("first", "then", "stands"),
    [
        (report("failed", sent_at=10.0), report("running", sent_at=20.0), "running"),
        (report("failed", sent_at=20.0), report("running", sent_at=10.0), "failed"),
        (report("failed", sent_at=20.0), report("running"), "running"),
        (report("running"), report("failed", sent_at=10.0), "failed"),
        (report("running", sent_at=20.0), report("failed", sent_at=10.0), "running"),
    ],
)
def test_of_two_ends_the_newer_stands_and_they_are_said_to_contradict(
    first: Report, then: Report, stands: str
) -> None:
    attempt = after(first, then)
    assert attempt.status == stands
    assert attempt.contradicted


def test_an_end_that_loses_moves_nothing() -> None:
    ended = after("vm_created", report("failed", sent_at=20.0, error="no"))
    attempt = after(report("running", sent_at=10.0, server_id="7"), attempt=ended)
    assert attempt._replace(contradicted=False) == ended


def test_a_heartbeat_moves_the_last_sign_of_life_alone_and_nothing_after_the_end() -> None:
    beating = after("vm_created", report(None, arrived_at=500.0))
    assert beating._replace(last_signal_at=100.0) == after("vm_created")
    ended = after("running")
    assert after(report(None, arrived_at=500.0), attempt=ended) == ended


def test_a_heartbeat_no_newer_than_the_last_is_stale() -> None:
    attempt = after(report(None, sent_at=50.0))
    assert is_stale(attempt, report(None, sent_at=50.0))
    assert is_stale(attempt, report(None, sent_at=49.0))
    assert not is_stale(attempt, report(None, sent_at=51.0))
    assert not is_stale(attempt, report(None))
    assert not is_stale(attempt, report("vm_created", sent_at=50.0))


def test_a_later_run_opens_an_attempt_and_an_older_one_does_not() -> None:
    first = Attempt("job", 1, 1.0, run_id="100", run_attempt="1")
    assert place([first], report("vm_created", run=Run("100", "1"))) is first
    assert place([first], report("vm_created")) is first
    assert place([first], report("vm_created", run=Run("100", "2"))).number == 2
    assert place([first], report("vm_created", run=Run("1000", "1"))).number == 2
    assert place([first], report("vm_created", run=Run("99", "9"))).number == 0


def test_the_first_run_named_is_the_attempt_that_had_named_none_unless_that_had_ended() -> None:
    unnamed = Attempt("job", 1, 1.0)
    named = place([unnamed], report("vm_created", run=Run("7", "1")))
    assert (named.number, named.run) == (1, Run("7", "1"))
    assert place([after("failed", attempt=unnamed)], report("vm_created", run=Run("7", "1"))).number == 2


def test_a_retry_does_not_take_the_callbacks_of_the_run_before_it() -> None:
    old = Attempt("job", 1, 1.0, run_id="100", run_attempt="1", end="failed")
    retry = Attempt("job", 2, 2.0)
    assert place([old, retry], report("vm_created", run=Run("100", "1"))) is old
    assert place([old, retry], report("vm_created", run=Run("99", "1"))).number == 0
    assert place([old, retry], report("vm_created", run=Run("101", "1"))).number == 2


@pytest.mark.parametrize(
    ("silence", "expected"), [(0, "live"), (150, "live"), (151, "quiet"), (900, "quiet"), (901, "lost")]
)
def test_silence_is_read_off_the_clock(silence: float, expected: str) -> None:
    assert condition(after("vm_created"), 100.0 + silence, 150, 900) == expected
    taken = Attempt("job", 1, 1.0, taken_at=100.0)
    assert condition(taken, 100.0 + silence, 150, 900) == expected


def test_who_was_never_heard_of_is_not_silent_and_who_ended_is_over() -> None:
    assert condition(Attempt("job", 1, 1.0), 1e9, 150, 900) == "live"
    assert condition(after("failed"), 1e9, 150, 900) == "over"


def test_durations_of_steps_come_from_the_milestones_times() -> None:
    attempt = after(*(report(name, sent_at=10.0 * rank) for rank, name in enumerate(RANKS, 1)))
    assert [(step.started_at, step.finished_at) for step in steps(attempt)] == [
        (1.0, 10.0),
        (10.0, 20.0),
        (20.0, 40.0),
        (40.0, 50.0),
        (50.0, 60.0),
    ]


some_milestones = st.lists(st.sampled_from([*MILESTONES, "step:odd"]), max_size=12)


def page(attempt: Attempt) -> tuple[object, ...]:
    return attempt.status, attempt.failed_step, attempt.error, steps(attempt)


@given(some_milestones)
def test_the_rank_never_falls(names: Sequence[str]) -> None:
    attempt, seen = Attempt("job", 1, 1.0), set()
    for name in names:
        moved = attempt if name in seen else receive(attempt, report(name))
        assert moved.rank >= attempt.rank
        attempt, _ = moved, seen.add(name)


@given(some_milestones, some_milestones, st.sampled_from(["running", "failed"]))
def test_the_end_always_wins(before: Sequence[str], later: Sequence[str], end: str) -> None:
    others = [name for name in [*before, end, *later] if name == end or name not in ("running", "failed")]
    assert after(*others).status == end


@given(st.sets(st.sampled_from([*RANKS, "step:odd"])).flatmap(lambda some: st.permutations(sorted(some))))
def test_any_order_of_the_same_callbacks_gives_the_same_page(names: Sequence[str]) -> None:
    sent = [report(name, sent_at=float(ord(name[0]) + len(name))) for name in names]
    assert page(after(*sent)) == page(after(*sorted(sent, key=lambda one: one.sent_at or 0)))


def test_any_order_of_what_follows_a_failure_gives_the_same_page() -> None:
    late = [report(name, sent_at=50.0 + rank) for name, rank in RANKS.items() if name != "running"]
    failed = report("failed", failed_step="configure", error="no")
    assert len({page(after("vm_created", failed, *order))[:3] for order in permutations(late)}) == 1
    assert len({str(page(after("vm_created", failed, *order))) for order in permutations(late)}) == 1


def test_a_step_that_failed_ends_with_the_failure_and_one_that_never_began_has_no_end() -> None:
    failed = report("failed", sent_at=90.0)
    attempt = after("vm_created", failed, report("ansible_started", sent_at=80.0), report("ansible_complete"))
    assert [step.finished_at for step in steps(attempt)] == [None, 100.0, 90.0, None, None]
    assert steps(after("vm_created"))[2].finished_at is None
