"""A pipeline: the steps of one kind of job, their words and the milestones that move them; a TOML file."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

BUILT_IN = "provision-agent"
BUILT_IN_FILE = Path(__file__).parent / "pipelines" / f"{BUILT_IN}.toml"
INPUTS = ("job_id", "agent_id", "region", "callback_url")
ENDS = ("running", "failed")  # callbacks with these statuses end an attempt, so no step is reached by them
FEWEST, MOST = 2, 12  # steps
LONGEST = {"label": 40, "reached_by": 64, "failed_by": 64, "inputs": 64}  # characters
LONGEST_SENTENCE = 200
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_STEP_ID = re.compile(r"[a-z0-9_]{1,32}")
_WORKFLOW = re.compile(r"[A-Za-z0-9._-]{1,100}\.ya?ml|[0-9]{1,20}")


class BadPipeline(ValueError):
    """A file that breaks the form; the message names file, key and reason."""


@dataclass(frozen=True)
class Step:
    """One stage that a person sees, as its table in the file has it; sentences are "" where it has none."""

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
    """A whole file, checked; optional texts are "" where it has none."""

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
        """The index of the step on which a failure stands, at `rank`: by its name, or the longest `…*`."""
        names = [(name, i) for i, step in enumerate(self.steps) for name in step.failed_by]
        exact = [(len(name), i) for name, i in names if name == failed_step and name[-1] != "*"]
        wild = [(len(name), i) for name, i in names if name[-1] == "*" and failed_step.startswith(name[:-1])]
        _, mapped = max(exact or wild, default=(0, 0))
        return min(max(mapped, rank, 1), len(self.steps) - 1)

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
    table = json.loads(content)
    steps = tuple(Step(**_frozen(step)) for step in table["steps"])
    return Pipeline(**_frozen(table) | {"steps": steps})


def _frozen(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def load(folder: Path | None) -> dict[str, Pipeline]:
    """The built-in pipeline and those of `folder`, by name; raises BadPipeline."""
    path, pipelines = folder, {}
    try:
        files = sorted(folder.iterdir()) if folder else []
        for path in [BUILT_IN_FILE, *(file for file in files if file.suffix == ".toml")]:
            _must(_NAME.fullmatch(path.stem), "the name is not 1 to 32 of a-z 0-9 -, the first a letter")
            pipelines[path.stem] = _pipeline(path.stem, tomllib.loads(path.read_bytes().decode()))
        return pipelines
    except OSError as error:
        reason = str(error.strerror)
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = f"not TOML: {error}"
    except ValueError as error:
        reason = str(error)
    raise BadPipeline(f"{path}: {reason}")


def _must(holds: object, says: str) -> None:
    if not holds:
        raise ValueError(says)


def _checked(given: Mapping[str, Any], kind: type[Pipeline | Step]) -> dict[str, Any]:
    """A table by the fields of its class, each a text of one line, or several of them."""
    known = {field.name: field.type for field in fields(kind) if field.name not in ("name", "steps")}
    for key, value in given.items():
        longest = LONGEST.get(key, LONGEST_SENTENCE)
        _must(key in known, f"{key}: unknown; known are {', '.join(known)}")
        is_list = known[key] is not str
        _must(isinstance(value, list) or not is_list, f"{key}: not a list of texts")
        for text in value if is_list else [value]:
            _must(isinstance(text, str) and text.isprintable(), f"{key}: not a text of one line")
            _must(text.strip() and len(text) <= longest, f"{key}: not 1 to {longest} characters")
    return _frozen(given)


def _pipeline(name: str, given: dict[str, Any]) -> Pipeline:
    tables, steps = given.pop("steps", None), []
    are_tables = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    _must(are_tables and FEWEST <= len(tables) <= MOST, f"steps: not {FEWEST} to {MOST} tables [[steps]]")
    for index, table in enumerate(tables):
        try:
            steps.append(_step(table, index))
        except ValueError as error:
            raise ValueError(f"step {index + 1} ({str(table.get('id'))[:32]}): {error}") from None
    for key in ("id", "label", "reached_by", "failed_by"):
        values = [getattr(step, key) for step in steps]
        texts = chain.from_iterable(values) if isinstance(values[0], tuple) else values
        for text, times in Counter(texts).items():
            _must(times == 1, f"{key}: {text!r} stands twice")
    own = {} if name == BUILT_IN else {"workflow": f"{name}.yml"}
    pipeline = Pipeline(name, tuple(steps), **own | _checked(given, Pipeline))
    is_file = not pipeline.workflow or _WORKFLOW.fullmatch(pipeline.workflow)
    _must(is_file, "workflow: not the name of a workflow's file, such as deploy-site.yml")
    is_some = set(pipeline.inputs) <= set(INPUTS) and len(set(pipeline.inputs)) == len(pipeline.inputs)
    _must(is_some, f"inputs: not some of {', '.join(INPUTS)}, each once")
    return pipeline


def _step(given: Mapping[str, Any], index: int) -> Step:
    table = _checked(given, Step)
    id = table.get("id", "")
    _must(_STEP_ID.fullmatch(id), "id: not 1 to 32 of a-z 0-9 _")
    _must("label" in table, "label: required")
    is_free = index or "reached_by" not in table
    _must(is_free, "reached_by: the first step is active from the start, so it has none")
    reached_by = table.get("reached_by", (id,) if index else ())
    _must(reached_by or not index, "reached_by: empty, so nothing could ever reach the step")
    _must(not set(reached_by) & set(ENDS), "reached_by: running and failed end an attempt and reach no step")
    table["reached_by"] = tuple("provisioning" if name == "in_progress" else name for name in reached_by)
    step = Step(**{"failed_by": (id, f"{id}_*"), **table})
    _must(not any("*" in name[:-1] for name in step.failed_by), "failed_by: * stands only at the end")
    return step
