"""The rules of progress, held against the contract's tables and against every order of arrival."""

from collections.abc import Sequence
from itertools import chain, pairwise, permutations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.rules import progress
from webapp.rules.attempt import Attempt, Report, Run, Step, Word, clock
from webapp.rules.pipeline import BUILT_IN, load
from webapp.rules.progress import close, is_stale, receive

BUILT = load(None)[BUILT_IN]
RANKS = BUILT.ranks
STATES = {"p": "pending", "a": "active", "c": "completed", "e": "error", "x": "cancelled"}
MILESTONES = [*RANKS, "failed"]


def report(milestone: str | None, arrived_at: float = 100.0, **said: Any) -> Report:
    fields = {name: said.pop(name) for name in ("sent_at", "run") if name in said}
    return Report("job", milestone, arrived_at, said=said, **fields)


def steps(attempt: Attempt) -> list[Step]:
    return progress.steps(attempt, BUILT)


def place(attempts: Sequence[Attempt], report: Report) -> Attempt:
    return progress.place(attempts, report.run, report.sent_at, report.arrived_at)


def after(*reports: Report | str, attempt: Attempt | None = None) -> Attempt:
    """The attempt after reports, repeats left out as the callbacks table leaves them out."""
    attempt = attempt or Attempt("job", 1, opened_at=1.0)
    seen = set()
    for order, said in enumerate(reports):
        one = report(said, arrived_at=100.0 + order) if isinstance(said, str) else said
        if one.milestone is None or one.milestone not in seen:
            attempt = receive(attempt, one, BUILT)
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


def test_at_the_end_the_rank_is_frozen_and_a_late_milestone_has_its_time() -> None:
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
    assert attempt._replace(contradicted=False, first_sent_at=20.0) == ended


def test_a_heartbeat_is_a_sign_of_life_alone_and_nothing_after_the_end() -> None:
    beating = after("vm_created", report(None, arrived_at=500.0))
    heard: dict[str, Any] = dict.fromkeys(("last_callback_at", "last_signal_at", "heard_at"), 100.0)
    assert beating._replace(**heard) == after("vm_created")
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
    assert place([first], report("vm_created", run=Run("99", "1"))).number == 0
    assert place([first], report("vm_created", run=Run("99", "9"))).number == 0


def test_the_first_run_named_is_the_unfinished_attempt_that_named_none() -> None:
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


def condition_at(attempt: Attempt, now: float, *closures: tuple[float, float]) -> str:
    return attempt.condition(clock(now, 150, 900, closures))


@pytest.mark.parametrize(
    ("silence", "expected"), [(0, "live"), (150, "live"), (151, "quiet"), (900, "quiet"), (901, "lost")]
)
def test_silence_is_read_off_the_clock(silence: float, expected: str) -> None:
    assert condition_at(after("vm_created"), 100.0 + silence) == expected
    taken = Attempt("job", 1, 1.0, taken_at=100.0, heard_at=100.0)
    assert condition_at(taken, 100.0 + silence) == expected


def test_an_attempt_never_heard_of_is_not_silent_and_an_ended_one_is_over() -> None:
    assert condition_at(Attempt("job", 1, 1.0), 1e9) == "live"
    assert condition_at(after("failed"), 1e9) == "over"


def test_the_time_in_which_the_door_was_shut_is_no_silence() -> None:
    attempt = after("vm_created")
    down = (100.0, 1300.0)
    assert condition_at(attempt, 1301.0, down) == "live"
    assert condition_at(attempt, 1300.0 + 151, down) == "quiet"
    assert condition_at(attempt, 1300.0 + 901, down) == "lost"
    assert condition_at(attempt, 1301.0, down, (100.0, 1200.0)) == "live"  # the same time twice
    assert condition_at(attempt, 1500.0, (100.0, 600.0), (650.0, 1300.0)) == "quiet"


def test_a_job_that_was_lost_before_the_door_shut_stays_lost() -> None:
    assert condition_at(after("vm_created"), 3000.0, (1200.0, 2900.0)) == "lost"


@given(
    st.floats(0, 5000),
    st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 2000)), max_size=4),
    st.floats(0, 900),
)
def test_the_clock_is_silence_without_the_closures(
    heard: float, spans: list[tuple[float, float]], seconds: float
) -> None:
    now, closures = 8000.0, [(began, began + lasted) for began, lasted in spans]
    edges = sorted({heard, *chain.from_iterable(closures)})
    shut = sum(
        ended - began
        for began, ended in pairwise(edges)
        if began >= heard and any(since <= began and ended <= until for since, until in closures)
    )
    silent_for = now - heard - shut
    if abs(silent_for - seconds) > 1e-6 and not any(began < heard < ended for began, ended in closures):
        assert (heard < clock(now, seconds, seconds, closures).quiet_before) == (silent_for > seconds)


def word(state: str, at: float = 200.0, **said: Any) -> Word:
    return Word(Run("7", "1"), state, at, arrived_at=max(at, 200.0))._replace(**said)


def heard(attempt: Attempt, *words: Word) -> Attempt:
    for each in words:
        attempt = progress.testify(attempt, each, BUILT)
    return attempt


@pytest.mark.parametrize(
    ("state", "reason"),
    [("waiting", "approval"), ("pending", "run"), ("queued", "runner"), ("requested", "runner")],
)
def test_a_run_that_waits_is_not_silent(state: str, reason: str) -> None:
    attempt = heard(after("provisioning"), word(state))
    assert (attempt.waiting_for, condition_at(attempt, 1e6)) == (reason, "waiting")
    going = heard(attempt, word("in_progress", 5000.0))
    assert condition_at(going, 5001.0) == "live"  # silence does not count from before the wait
    assert condition_at(after(report("vm_created", arrived_at=6000.0), attempt=attempt), 6001.0) == "live"


def test_a_word_older_than_the_last_callback_or_word_is_no_wait() -> None:
    assert heard(after(report("provisioning", arrived_at=300.5)), word("queued", 299.0)).waiting_for is None
    assert heard(after(report("provisioning", arrived_at=300.5)), word("waiting", 300.0)).waiting_for
    assert heard(after(report("provisioning", arrived_at=300.5)), word("queued", 300.0)).waiting_for is None
    assert heard(after("provisioning"), word("in_progress", 400.0), word("queued", 399.0)).waiting_for is None
    assert heard(after("provisioning"), word("in_progress", 400.0), word("waiting", 400.0)).waiting_for


def test_a_completion_ends_what_callbacks_left_open_and_no_more() -> None:
    done = word("completed: success", 300.0, end="running")
    assert states(heard(after("vm_created"), done)) == "ccccc"
    ended = after(report("failed", error="no", sent_at=90.0))
    assert heard(ended, done)._replace(run_state=None, run_state_at=None) == ended
    died = word("completed: failure", 300.0, end="failed", error="GitHub says …")
    assert states(heard(after("vm_created"), died)) == "ccepp"
    assert heard(heard(after("vm_created"), died), word("in_progress", 400.0)).status == "failed"


def test_a_closed_job_is_cancelled_until_a_callback_takes_that_back() -> None:
    closed = close(after("vm_created"), 500.0)
    assert (closed.status, closed.failed_step, states(closed)) == ("failed", "cancelled", "ccxpp")
    for later in (report("ansible_started"), report(None)):
        back = after(later, attempt=closed)
        assert (back.end, back.failed_step, back.status) == (None, None, "provisioning")


def test_a_closed_job_that_never_started_is_the_run_that_begins_later() -> None:
    closed = close(Attempt("job", 1, 1.0), 500.0)
    target = place([closed], report("provisioning", run=Run("7", "1")))
    assert (target.number, target.run) == (1, Run("7", "1"))


def test_a_clock_set_forth_and_back_leaves_nobody_alive() -> None:
    attempt = after(report(None, arrived_at=5000.0), report(None, arrived_at=1400.0))
    assert attempt.last_signal_at == 1400.0
    assert condition_at(attempt, 1400.0 + 901) == "lost"


def test_a_note_stands_until_the_next_milestone_or_note() -> None:
    noted = after(report("provisioning", note="1 of 8"), report(None, note="5 of 8"), report(None))
    assert noted.note == "5 of 8"
    assert after("vm_created", attempt=noted).note is None
    assert after(report("vm_created", note="new"), attempt=noted).note == "new"
    assert after("failed", attempt=noted).note is None
    assert after(report("step odd"), attempt=noted).note == "5 of 8"


def test_durations_of_steps_come_from_the_milestones_times() -> None:
    attempt = after(*(report(name, sent_at=10.0 * rank) for rank, name in enumerate(RANKS, 1)))
    assert [(step.started_at, step.finished_at) for step in steps(attempt)] == [
        (1.0, 10.0),
        (10.0, 20.0),
        (20.0, 40.0),
        (40.0, 50.0),
        (50.0, 60.0),
    ]


some_milestones = st.lists(st.sampled_from([*MILESTONES, "odd"]), max_size=12)


def page(attempt: Attempt) -> tuple[object, ...]:
    return attempt.status, attempt.failed_step, attempt.error, steps(attempt)


@given(some_milestones)
def test_the_rank_never_falls(names: Sequence[str]) -> None:
    attempt, seen = Attempt("job", 1, 1.0), set()
    for name in names:
        moved = attempt if name in seen else receive(attempt, report(name), BUILT)
        assert moved.rank >= attempt.rank
        attempt = moved
        seen.add(name)


@given(some_milestones, some_milestones, st.sampled_from(["running", "failed"]))
def test_the_end_always_wins(before: Sequence[str], later: Sequence[str], end: str) -> None:
    others = [name for name in [*before, end, *later] if name == end or name not in ("running", "failed")]
    assert after(*others).status == end


@given(st.sets(st.sampled_from([*RANKS, "odd"])).flatmap(lambda some: st.permutations(sorted(some))))
def test_any_order_of_the_same_callbacks_gives_the_same_page(names: Sequence[str]) -> None:
    sent = [report(name, sent_at=float(ord(name[0]) + len(name))) for name in names]
    assert page(after(*sent)) == page(after(*sorted(sent, key=lambda one: one.sent_at or 0)))


def test_what_comes_late_unsays_nothing_that_was_said_since() -> None:
    def said(*order: int) -> tuple[object, ...]:
        reports = (
            report("provisioning", sent_at=10.0, subject="old", server_ip="192.0.2.1", note="1 of 2"),
            report("vm_created", sent_at=20.0, subject="new", note="2 of 2"),
            report("ansible_started", sent_at=15.0, note="late", server_id="7"),
        )
        attempt = after(*(reports[i] for i in order))
        return attempt.subject, attempt.server_ip, attempt.server_id, attempt.note, attempt.rank

    orders = [said(*order) for order in permutations((0, 1, 2))]
    assert orders == [("new", "192.0.2.1", "7", "2 of 2", 3)] * 6


def test_a_clock_of_whole_seconds_makes_nothing_late() -> None:
    noted = after(report("vm_created", 100.7), report(None, 100.9, sent_at=100.0, note="1 of 2"))
    assert noted.note == "1 of 2"


def test_any_order_of_what_follows_a_failure_gives_the_same_page() -> None:
    late = [report(name, sent_at=50.0 + rank) for name, rank in RANKS.items() if name != "running"]
    failed = report("failed", failed_step="configure", error="no")
    assert len({page(after("vm_created", failed, *order))[:3] for order in permutations(late)}) == 1
    assert len({str(page(after("vm_created", failed, *order))) for order in permutations(late)}) == 1


def test_a_failed_step_ends_with_the_failure_one_never_begun_has_no_end() -> None:
    failed = report("failed", sent_at=90.0)
    attempt = after("vm_created", failed, report("ansible_started", sent_at=80.0), report("ansible_complete"))
    assert [step.finished_at for step in steps(attempt)] == [None, 100.0, 90.0, None, None]
    assert steps(after("vm_created"))[2].finished_at is None


def test_the_run_that_truly_began_last_is_shown() -> None:
    """Every order of up to three runs: new ones, re-runs and retries; clocks that differ; lost callbacks."""
    tried = 0
    for kinds in product(("new", "again", "retry"), repeat=2):
        for skews in product((-200, 0, 200), repeat=3):
            for lost in product((False, True), repeat=3):
                for late in (False, True):
                    assert_last_is_shown(kinds, skews, lost, late)
                    tried += 1
    assert tried == 9 * 27 * 8 * 2


def assert_last_is_shown(
    kinds: Sequence[str], skews: Sequence[int], lost: Sequence[bool], late: bool
) -> None:
    runs, newest = [Run("100", "1")], 100
    for kind in kinds:  # "again" starts the oldest run once more
        newest += kind != "again"
        again = 1 + sum(run.id == "100" for run in runs)
        runs.append(Run("100", str(again)) if kind == "again" else Run(str(newest), "1"))
    arrivals: list[tuple[float, Report | None]] = []
    for index, (run, skew) in enumerate(zip(runs, skews, strict=True)):
        began = 10_000.0 * (index + 1)
        if index and kinds[index - 1] == "retry":
            arrivals.append((began - 5, None))
        for order, name in enumerate(("provisioning", "vm_created", "failed")):
            at = began + 10 * order
            if name == "provisioning" and lost[index]:
                continue
            if name == "failed" and late:
                at += 10_100.0  # after the first callbacks of the next run
            arrivals.append((at, report(name, run=run, sent_at=began + 10 * order + skew, arrived_at=at)))
    attempts = [Attempt("job", 1, 1.0)]
    for at, said in sorted(arrivals, key=lambda each: each[0]):
        if said is None:
            attempts.append(Attempt("job", attempts[-1].number + 1, at))
            continue
        target = receive(place(attempts, said), said, BUILT)
        attempts = sorted(
            [each for each in attempts if each.number != target.number] + [target], key=lambda one: one.number
        )
    assert attempts[-1].run == runs[-1], (kinds, skews, lost, late)
