"""What may be asked of the operator's API and form: the fields of a start, and ids."""

import secrets
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from webapp.rules.pipeline import BUILT_IN
from webapp.rules.report import ID_RULE, JOB_ID

FIELDS = ("agent_id", "region", "job_id", "pipeline", "dispatch")


class BadField(ValueError):
    """A field that breaks its rule; the message begins with its name."""


@dataclass(frozen=True)
class Start:
    """A job that somebody wants started."""

    job_id: str
    agent_id: str
    region: str | None
    pipeline: str
    dispatch: bool


def read_start(fields: Mapping[str, Any], pipelines: Container[str]) -> Start:
    """The job that is asked for; raises BadField. Null and "" mean absent."""
    for name in fields:
        if name not in FIELDS:
            raise BadField(f"{name}: not one of {', '.join(FIELDS)}")
    dispatch = fields.get("dispatch")
    if not isinstance(dispatch, bool | None):
        raise BadField("dispatch: neither true nor false")
    agent_id = name_of(fields, "agent_id")
    if agent_id is None:
        raise BadField("agent_id: required")
    pipeline = fields.get("pipeline") or BUILT_IN
    if not isinstance(pipeline, str) or pipeline not in pipelines:
        raise BadField(f"pipeline: {str(pipeline)[:64]} is not a pipeline here")
    return Start(
        name_of(fields, "job_id") or secrets.token_hex(8),
        agent_id,
        name_of(fields, "region"),
        pipeline,
        dispatch is not False,
    )


def name_of(given: Mapping[str, Any], name: str) -> str | None:
    """All that becomes an input of the workflow has the alphabet of job ids: it is safe in any shell."""
    value = given.get(name)
    if value is None or value == "":
        return None
    if not (isinstance(value, str) and JOB_ID.fullmatch(value)):
        raise BadField(f"{name}: {ID_RULE}")
    return value
