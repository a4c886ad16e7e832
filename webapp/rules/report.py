"""What is said to us becomes values: strict JSON first, then each field by its rule in the contract's tables.

Python's `json` alone also takes UTF-16, NaN, duplicate keys and strings that no database stores.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from itertools import chain
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

from webapp.rules.attempt import Report, Run
from webapp.rules.pipeline import BUILT_IN, ENDS

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ID_RULE = "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
DEEPEST = 32
LONGEST_ERROR, LONGEST_URL = 2000, 2000  # characters
LATEST_TIME = 253_402_300_799  # the last second of the year 9999
STATUSES = {"provisioning": "provisioning", "running": "running", "failed": "failed"}
STATUSES |= {"in_progress": "provisioning", "success": "running"}  # these are GitHub's words
STATUSES |= {"failure": "failed", "cancelled": "failed"}
_REPOSITORY = r"(?!\.\.?/)[A-Za-z0-9_.-]{1,100}/(?!\.\.?$)[A-Za-z0-9_.-]{1,100}"
_LIKE_AN_END = re.compile(f"(step:)*({'|'.join(ENDS)})")  # a step that is kept under another name
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# ECMA-48: control sequences, strings (OSC, DCS, SOS, PM, APC) and two-character escapes
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class BadField(ValueError):
    """A body that is not strict JSON, or a field that breaks its rule; the message begins with its name."""


def parse(body: bytes) -> dict[str, Any]:
    """The one object of a strict JSON text; raises BadField."""
    try:
        value = _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, BadField) else "the body is not strict JSON"
        raise BadField(reason) from None
    if not isinstance(value, dict):
        raise BadField("the body is not one JSON object")
    _check([value])
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise BadField("the body has a key twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _check(values: Iterable[object], depth: int = 0) -> None:
    for value in values:
        if isinstance(value, str):
            if _UNSTORABLE.search(value):
                raise BadField("the body has a NUL or half a surrogate pair")
        elif isinstance(value, dict | list):
            if depth == DEEPEST:
                raise BadField(f"the body nests deeper than {DEEPEST}")
            _check(chain(value, value.values()) if isinstance(value, dict) else value, depth + 1)
        elif isinstance(value, float) and not isfinite(value):
            raise BadField("the body has a number that JSON does not know")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise BadField("the body has an integer beyond 64 bits")


# What reads a value: None, or a ValueError, if it breaks the rule; and the words for that, "" to drop it
Rule = tuple[Callable[[Any], Any], str]


def checked(fields: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """What the rules read of the fields; null and "" mean absent, others are left out; raises BadField."""
    said = {}
    for name, (read, says) in rules.items():
        value = fields.get(name)
        if value is None or value == "":
            continue
        try:
            kept = read(value)
        except ValueError:
            kept = None
        if kept is None and says:
            raise BadField(f"{name}: {says}")
        if kept is not None and kept != "":
            said[name] = kept
    return said


def matching(form: str, says: str) -> Rule:
    """The rule of a text that has this form."""
    fits = re.compile(form).fullmatch
    return (lambda value: value if isinstance(value, str) and fits(value) else None), says


def one_of(words: Collection[str]) -> Rule:
    """The rule of a fixed choice."""
    known = tuple(words)
    return (lambda value: value if value in known else None), f"not one of {', '.join(known)}"


def _text(longest: int, clean: Callable[[str], str] = str) -> Rule:
    says = f"not a text of at most {longest} characters"
    return (lambda value: clean(value) if isinstance(value, str) and len(value) <= longest else None), says


def _clean(text: str) -> str:
    """The last LONGEST_ERROR characters, without escape sequences and controls but newline and tab."""
    text = text.replace("\r\n", "\n")
    if not text.isprintable():
        text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    return text[-LONGEST_ERROR:]


def _whole(value: Any, least: int = 0) -> str | None:
    """As decimal digits without leading zeros."""
    is_whole = type(value) in (int, str) and re.fullmatch("[0-9]{1,20}", str(value))
    return str(int(value)) if is_whole and int(value) >= least else None


def _server_id(value: object) -> str | None:
    text = str(value) if type(value) in (int, str) else "\n"
    return text if len(text) <= 255 and text.isprintable() else None


def _address(value: object) -> str | None:
    return str(ip_address(value)) if isinstance(value, str) and "%" not in value else None


def _url(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > LONGEST_URL or not value.isprintable() or " " in value:
        return None
    return value if urlsplit(value).scheme in ("http", "https") and urlsplit(value).hostname else None


ID = matching(JOB_ID.pattern, ID_RULE)  # safe in any shell, where it becomes an input of a workflow
FLAG: Rule = (lambda value: value if isinstance(value, bool) else None), "neither true nor false"
WHOLE: Rule = _whole, "not a whole number of at most 20 digits 0-9"
CALLBACK: dict[str, Rule] = {
    "job_id": ID,
    "type": one_of(["heartbeat"]),
    "status": one_of(STATUSES),
    "step": _text(64),
    "failed_step": _text(64),
    "error": _text(65_536, _clean),
    "pipeline": _text(64),
    "workflow_run_id": WHOLE,
}
OF_ATTEMPT: dict[str, Rule] = {  # kept in the attempt's fields of the same names
    "subject": _text(100, lambda text: _clean(text.replace("\n", " "))),
    "note": _text(200, lambda text: _clean(text.replace("\n", " "))),
    "repository": matching(_REPOSITORY, "not owner/name"),
    "server_id": (_server_id, ""),
    "server_ip": (_address, ""),
    "tailscale_ip": (_address, ""),
}
RUN_ATTEMPT: Rule = partial(_whole, least=1), "not a whole number from 1, of at most 20 digits 0-9"
SENT_AT = {"sent_at": (lambda value: value if type(value) in (int, float) else None, "not a number")}
START = {"agent_id": ID, "region": ID, "job_id": ID, "pipeline": ID, "dispatch": FLAG}


def sent_at(fields: Mapping[str, Any]) -> float | None:
    """When the sender says it sent, in Unix seconds; raises BadField."""
    return checked(fields, SENT_AT).get("sent_at")


def read(fields: Mapping[str, Any], body: bytes, arrived_at: float) -> Report:
    """The report that a callback's fields make; `arrived_at` in Unix seconds; raises BadField."""
    given, said = checked(fields, CALLBACK), checked(fields, OF_ATTEMPT)
    status, step = given.get("status"), given.get("step")
    if "job_id" not in given:
        raise BadField(f"job_id: {ID_RULE}")
    if ("status" in given) == ("type" in given):
        raise BadField(f"status: {CALLBACK['status'][1]}; a heartbeat has none")
    milestone = STATUSES[status] if status else None
    if milestone == "provisioning":
        milestone = f"step:{step}" if step and _LIKE_AN_END.fullmatch(step) else step or milestone
    elif milestone == "failed":
        failed_step = "cancelled" if status == "cancelled" else given.get("failed_step", step)
        said |= {"failed_step": failed_step, "error": given.get("error")}
        said |= checked(fields, {"server_left": FLAG})
    elif milestone == "running":
        said |= checked(fields, {"result_url": (_url, "")})
    run = None
    if run_id := given.get("workflow_run_id"):
        run = Run(run_id, checked(fields, {"run_attempt": RUN_ATTEMPT}).get("run_attempt", "1"))
    sent, pipeline = sent_at(fields), given.get("pipeline")
    if sent is not None and not 0 <= sent <= LATEST_TIME:
        raise BadField("sent_at: not a time between the years 1970 and 9999")
    return Report(given["job_id"], milestone, arrived_at, sent, run, pipeline, said, body.decode())


@dataclass(frozen=True)
class Start:
    """A job that the operator wants started, from the API or the form."""

    agent_id: str
    region: str | None = None
    job_id: str = field(default_factory=lambda: secrets.token_hex(8))
    pipeline: str = BUILT_IN
    dispatch: bool = True


def read_start(fields: Mapping[str, Any], pipelines: Collection[str]) -> Start:
    """The job that is asked for; raises BadField."""
    for name in fields:
        if name not in START:
            raise BadField(f"{name}: not one of {', '.join(START)}")
    asked = checked(fields, START)
    if "agent_id" not in asked:
        raise BadField("agent_id: required")
    start = Start(**asked)
    if start.pipeline not in pipelines:
        raise BadField(f"pipeline: {start.pipeline} is not a pipeline here")
    return start
