"""Pipelines: the form of their files, and that the promises hold for any of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.rules.attempt import Attempt, Report
from webapp.rules.pipeline import BUILT_IN, BadPipeline, Pipeline, Step, from_content, load
from webapp.rules.progress import receive, steps

TWO = """
[[steps]]
id = "queued"
label = "Queued"
[[steps]]
id = "build"
label = "Building"
"""


def read(folder: Path, text: str | bytes, name: str = "deploy") -> Pipeline:
    (folder / f"{name}.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(folder)[name]


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    pipeline = read(tmp_path, TWO)
    assert pipeline.workflow == "deploy.yml"
    assert pipeline.inputs == ("job_id", "agent_id", "region", "callback_url")
    assert pipeline.ranks == {"provisioning": 1, "build": 1, "running": 2}
    assert [pipeline.failed_at(name, 0) for name in ("build", "build_site", "other")] == [1, 1, 1]
    assert (pipeline.title, pipeline.done, pipeline.result, pipeline.leaves) == ("", "", "", "")


def test_a_file_may_claim_the_first_milestone_for_a_later_step(tmp_path: Path) -> None:
    text = TWO + '[[steps]]\nid = "ship"\nlabel = "Shipping"\nreached_by = ["in_progress", "shipped"]\n'
    assert read(tmp_path, text).ranks == {"provisioning": 2, "build": 1, "shipped": 2, "running": 3}


def test_a_failure_goes_by_the_exact_name_then_by_the_longest_pattern(tmp_path: Path) -> None:
    names = {"a": '["deploy_*"]', "b": '["deploy_site_*"]', "c": '["deploy_site_x", "other*"]'}
    text = TWO + "".join(
        f'[[steps]]\nid = "{id}"\nlabel = "Step {id}"\nfailed_by = {by}\n' for id, by in names.items()
    )
    pipeline = read(tmp_path, text + '[[steps]]\nid = "last"\nlabel = "Last"\n')
    shown = [
        pipeline.failed_at(name, 1) for name in ("deploy_db", "deploy_site_y", "deploy_site_x", "otherwise")
    ]
    assert shown == [2, 3, 4, 4]
    assert pipeline.failed_at("deploy_db", 4) == 4


def test_a_file_named_like_the_built_in_one_replaces_it(tmp_path: Path) -> None:
    assert read(tmp_path, TWO, BUILT_IN).steps[1].id == "build"
    assert load(tmp_path)[BUILT_IN].workflow == ""  # that of DISPATCH_WORKFLOW


STEP = '[[steps]]\nid = "{}"\nlabel = "Label {}"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff", "not UTF-8"),
        ("steps = [", "not TOML"),
        ('titel = "x"\n' + TWO, "titel: unknown"),
        (TWO + 'colour = "red"\n', "step 2 (build): colour: unknown"),
        (STEP.format("a", 1), "steps: not 2 to 12"),
        ("".join(STEP.format(f"s{i}", i) for i in range(13)), "steps: not 2 to 12"),
        (STEP.format("a", 1) + STEP.format("a", 2), "id: 'a' stands twice"),
        (STEP.format("a", 1) + STEP.format("b", 1), "label: 'Label 1' stands twice"),
        (STEP.format("a", 1) + STEP.format("B!", 2), "id: not 1 to 32"),
        (TWO.replace("Building", "B" * 41), "label: not 1 to 40"),
        (TWO.replace('label = "Building"', ""), "label: required"),
        (TWO + f'now = "{"x" * 201}"\n', "now: not 1 to 200"),
        (TWO + "now = 3\n", "now: not a text"),
        (TWO + 'reached_by = ["running"]\n', "reached_by: running and failed end"),
        (TWO + "reached_by = []\n", "reached_by: empty"),
        (TWO + 'reached_by = "build"\n', "reached_by: not a list"),
        (TWO + 'reached_by = ["provisioning", "in_progress"]\n', "reached_by: 'provisioning' stands twice"),
        (TWO.replace('label = "Queued"', 'label = "Queued"\nreached_by = ["x"]'), "the first step"),
        (TWO + 'failed_by = ["a*b"]\n', "failed_by: * stands only at the end"),
        (TWO + STEP.format("c", 3) + 'failed_by = ["build"]\n', "failed_by: 'build' stands twice"),
        ('inputs = ["job"]\n' + TWO, "inputs: not some of"),
        ('workflow = "../x.yml"\n' + TWO, "workflow: not the name"),
        ('title = "two\\nlines"\n' + TWO, "title: not a text of one line"),
    ],
)
def test_a_broken_file_is_named_with_key_and_reason(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(BadPipeline) as broken:
        read(tmp_path, text)
    assert says in str(broken.value)
    assert str(tmp_path / "deploy.toml") in str(broken.value)


def test_a_folder_and_a_bad_name_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "Deploy Site.toml").write_text(TWO)
    with pytest.raises(BadPipeline, match="the name is not"):
        load(tmp_path)
    (tmp_path / "Deploy Site.toml").rename(tmp_path / "x.txt")
    (tmp_path / "deploy.toml").mkdir()
    with pytest.raises(BadPipeline, match="directory"):
        load(tmp_path)


def make(count: int, spread: list[int]) -> Pipeline:
    """A pipeline of `count` steps, of which the i-th is reached by some milestones."""
    made = [
        Step(
            f"s{i}",
            f"S {i}",
            tuple(f"m{i}_{n}" for n in range(spread[i % len(spread)])) if i else (),
            (f"s{i}",),
        )
        for i in range(count)
    ]
    return Pipeline("made", tuple(made))


pipelines = st.builds(make, st.integers(2, 12), st.lists(st.integers(1, 3), min_size=1, max_size=4))


@given(pipelines, st.data())
def test_the_promises_hold_for_any_pipeline(pipeline: Pipeline, data: st.DataObject) -> None:
    names = [*pipeline.ranks, "failed", "unknown"]
    said = data.draw(st.lists(st.sampled_from(names), max_size=12, unique=True))
    failed = {"failed_step": data.draw(st.sampled_from(["s1", "x"]))}
    attempt = Attempt("job", 1, 1.0)
    for order, name in enumerate(said):
        report = Report("job", name, 100.0 + order, said=failed if name == "failed" else {})
        after = receive(attempt, report, pipeline)
        assert after.rank >= attempt.rank
        attempt = after
        shown = [step.state for step in steps(attempt, pipeline)]
        active = [state for state in shown if state not in ("completed", "pending")]
        assert len(active) == (0 if attempt.status == "running" else 1)
        assert shown == sorted(shown, key=lambda state: ("completed", *active, "pending").index(state))
    assert from_content(pipeline.content) == pipeline
