"""A pipeline: the steps of one kind of job, their words and the milestones that move them.

Each is a TOML file, `NAME.toml`; the built-in `provision-agent` is one, too. Everything that is shown or
counted of steps derives from here.
"""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

BUILT_IN = "provision-agent"
INPUTS = ("job_id", "agent_id", "region", "callback_url")
ENDS = ("running", "failed")  # callbacks with these statuses end an attempt, so no step is reached by them
FEWEST, MOST = 2, 12  # steps
LONGEST_LABEL, LONGEST_SENTENCE, LONGEST_MILESTONE = 40, 200, 64  # characters
SENTENCES = ("now", "if_slow", "went_wrong", "covers")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_STEP_ID = re.compile(r"[a-z0-9_]{1,32}")
_WORKFLOW = re.compile(r"[A-Za-z0-9._-]{1,100}\.ya?ml|[0-9]{1,20}")


class BadPipeline(ValueError):
    """A file that breaks the form; the message names file, key and reason."""


@dataclass(frozen=True)
class Step:
    """One stage that a person sees; sentences are "" where the file has none."""

    id: str
    label: str
    reached_by: tuple[str, ...]
    failed_by: tuple[str, ...]
    now: str = ""
    if_slow: str = ""
    went_wrong: str = ""
    covers: str = ""


@dataclass(frozen=True)
class Pipeline:
    """A whole file, checked; optional texts are "" where the file has none."""

    name: str
    steps: tuple[Step, ...]
    title: str = ""
    done: str = ""
    result: str = ""
    leaves: str = ""
    workflow: str = ""
    inputs: tuple[str, ...] = INPUTS

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each milestone: the index of the step that it makes active; `running` is above all."""
        by_milestone = {name: i for i, step in enumerate(self.steps) for name in step.reached_by}
        return {"provisioning": 1, **by_milestone, "running": len(self.steps)}

    def failed_at(self, failed_step: str, rank: int) -> int:
        """The index of the step on which a failure stands, at `rank`."""
        return min(max(self._mapped(failed_step), rank, 1), len(self.steps) - 1)

    def _mapped(self, failed_step: str) -> int:
        """By the exact name first, then by the longest pattern; 0 where the name says nothing."""
        patterns = [(name, i) for i, step in enumerate(self.steps) for name in step.failed_by]
        for name, i in sorted(patterns, key=lambda each: (each[0].endswith("*"), -len(each[0]))):
            if failed_step == name or (name.endswith("*") and failed_step.startswith(name[:-1])):
                return i
        return 0

    @cached_property
    def content(self) -> str:
        """The whole definition as JSON, the same for the same definition."""
        return json.dumps(asdict(self), sort_keys=True)

    @cached_property
    def hash(self) -> str:
        """Names this very definition."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:32]


def from_content(content: str) -> Pipeline:
    """The pipeline that `Pipeline.content` was made of."""
    fields = json.loads(content)
    steps = tuple(
        Step(**step | {"reached_by": tuple(step["reached_by"]), "failed_by": tuple(step["failed_by"])})
        for step in fields["steps"]
    )
    return Pipeline(**fields | {"steps": steps, "inputs": tuple(fields["inputs"])})


def load(folder: Path | None) -> dict[str, Pipeline]:
    """The built-in pipeline and those of `folder`, by name; raises BadPipeline."""
    built_in = [Path(__file__).parent / "pipelines" / f"{BUILT_IN}.toml"]
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".toml") if folder else []
    except OSError as error:
        raise BadPipeline(f"{folder}: {error.strerror}") from None
    return {path.stem: _read(path) for path in [*built_in, *files]}


def _read(path: Path) -> Pipeline:
    if not _NAME.fullmatch(path.stem):
        raise BadPipeline(f"{path}: the name is not 1 to 32 of a-z 0-9 -, the first a letter")
    try:
        return _pipeline(path.stem, tomllib.loads(path.read_bytes().decode()))
    except OSError as error:
        reason = str(error.strerror)
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except tomllib.TOMLDecodeError as error:
        reason = f"not TOML: {error}"
    except RecursionError:
        reason = "not TOML: nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise BadPipeline(f"{path}: {reason}")


def _pipeline(name: str, given: Mapping[str, Any]) -> Pipeline:
    texts = ("title", "done", "result", "leaves")
    _known(given, (*texts, "inputs", "workflow", "steps"), "")
    tables = given.get("steps")
    if not isinstance(tables, list) or not FEWEST <= len(tables) <= MOST:
        raise ValueError(f"steps: not {FEWEST} to {MOST} tables [[steps]]")
    steps = tuple(_step(table, i) for i, table in enumerate(tables))
    for key, all_of in (
        ("id", [step.id for step in steps]),
        ("label", [step.label for step in steps]),
        ("reached_by", list(chain.from_iterable(step.reached_by for step in steps))),
        ("failed_by", list(chain.from_iterable(step.failed_by for step in steps))),
    ):
        for value, times in Counter(all_of).items():
            if times > 1:
                raise ValueError(f"{key}: {value!r} stands twice")
    workflow = given.get("workflow", "" if name == BUILT_IN else f"{name}.yml")
    if (workflow or "workflow" in given) and not (
        isinstance(workflow, str) and _WORKFLOW.fullmatch(workflow)
    ):
        raise ValueError("workflow: not the name of a workflow's file, such as deploy-site.yml")
    inputs = _texts(given, "inputs", "", INPUTS, LONGEST_MILESTONE)
    if not set(inputs) <= set(INPUTS) or len(set(inputs)) < len(inputs):
        raise ValueError(f"inputs: not some of {', '.join(INPUTS)}, each once")
    sentences = {key: _text(given, key, "", LONGEST_SENTENCE) for key in texts}
    return Pipeline(name, steps, workflow=workflow, inputs=inputs, **sentences)


def _step(given: object, index: int) -> Step:
    if not isinstance(given, dict):
        raise ValueError("steps: not tables")
    id = given.get("id")
    where = f"step {index + 1}" + (f" ({id[:32]})" if isinstance(id, str) else "") + ": "
    _known(given, ("id", "label", "reached_by", "failed_by", *SENTENCES), where)
    if not isinstance(id, str) or not _STEP_ID.fullmatch(id):
        raise ValueError(f"{where}id: not 1 to 32 of a-z 0-9 _")
    if not index and "reached_by" in given:
        raise ValueError(f"{where}reached_by: the first step is active from the start, so it has none")
    reached_by = _texts(given, "reached_by", where, (id,) if index else (), LONGEST_MILESTONE)
    if any(name in ENDS for name in reached_by):
        raise ValueError(f"{where}reached_by: running and failed end an attempt and reach no step")
    if index and not reached_by:
        raise ValueError(f"{where}reached_by: empty, so nothing could ever reach the step")
    failed_by = _texts(given, "failed_by", where, (id, f"{id}_*"), LONGEST_MILESTONE)
    if any("*" in name[:-1] for name in failed_by):
        raise ValueError(f"{where}failed_by: * stands only at the end")
    label = _text(given, "label", where, LONGEST_LABEL)
    if not label:
        raise ValueError(f"{where}label: required")
    return Step(
        id,
        label,
        tuple("provisioning" if name == "in_progress" else name for name in reached_by),
        failed_by,
        **{key: _text(given, key, where, LONGEST_SENTENCE) for key in SENTENCES},
    )


def _known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            raise ValueError(f"{where}{key}: unknown; known are {', '.join(keys)}")


def _text(given: Mapping[str, Any], key: str, where: str, longest: int) -> str:
    value = given.get(key, "")
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{where}{key}: not a text of one line")
    if len(value) > longest or (key in given and not value.strip()):
        raise ValueError(f"{where}{key}: not 1 to {longest} characters")
    return value


def _texts(
    given: Mapping[str, Any], key: str, where: str, default: tuple[str, ...], longest: int
) -> tuple[str, ...]:
    values = given.get(key, default)
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}{key}: not a list of texts")
    if not all(value.isprintable() and 1 <= len(value) <= longest for value in values):
        raise ValueError(f"{where}{key}: not texts of 1 to {longest} characters")
    return tuple(values)


def milestones(pipeline: Pipeline) -> Iterator[str]:
    """One milestone for each step after the first, in order: what a rehearsal reports."""
    for step in pipeline.steps[1:]:
        yield step.reached_by[0]
