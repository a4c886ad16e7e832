"""A callback's bytes become a Report: strict JSON first, then the contract's table of fields.

Python's `json` alone also takes UTF-16, NaN, duplicate keys and strings that no database stores.
"""

import json
import math
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

from webapp.rules.attempt import Report, Run
from webapp.rules.pipeline import ENDS

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ID_RULE = "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
DEEPEST = 32
LONGEST_ERROR, LONGEST_SUBJECT, LONGEST_NOTE = 2000, 100, 200  # characters
LONGEST_STEP, LONGEST_SERVER_ID, LONGEST_URL = 64, 255, 2000
MOST_DIGITS = 20
LATEST_TIME = 253_402_300_799  # the last second of the year 9999
STATUSES = {
    "provisioning": "provisioning",
    "running": "running",
    "failed": "failed",
    "in_progress": "provisioning",  # these are GitHub's words
    "success": "running",
    "failure": "failed",
    "cancelled": "failed",
}
_DIGITS = re.compile(r"[0-9]+")
_REPOSITORY = re.compile(r"(?!\.\.?/)[A-Za-z0-9_.-]{1,100}/(?!\.\.?$)[A-Za-z0-9_.-]{1,100}")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# ECMA-48: control sequences, strings (OSC, DCS, SOS, PM, APC) and two-character escapes
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class BadReport(ValueError):
    """A body that is not strict JSON, or a field that breaks the contract; the message names it."""


def parse(body: bytes) -> dict[str, Any]:
    """The one object of a strict JSON text; raises BadReport."""
    try:
        text = body.decode()
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, BadReport) else "the body is not strict JSON"
        raise BadReport(reason) from None
    if not isinstance(value, dict):
        raise BadReport("the body is not one JSON object")
    if "\\u" in text or text.count("[") + text.count("{") > DEEPEST:
        _check(value)
    return value


def read(fields: Mapping[str, Any], body: bytes, arrived_at: float) -> Report:
    """The report that the fields make; `arrived_at` in Unix seconds; raises BadReport."""
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    job_id = _text(given, "job_id")
    if job_id is None or not JOB_ID.fullmatch(job_id):
        raise BadReport(f"job_id: {ID_RULE}")
    step = _text(given, "step", LONGEST_STEP)
    failed_step = _text(given, "failed_step", LONGEST_STEP) or step
    milestone = _milestone(given, step)
    return Report(
        job_id=job_id,
        milestone=milestone,
        arrived_at=arrived_at,
        sent_at=_time(sent_at(given)),
        run=_run(given),
        repository=_repository(given),
        pipeline=_text(given, "pipeline", LONGEST_STEP),
        subject=_line(given, "subject", LONGEST_SUBJECT),
        note=_line(given, "note", LONGEST_NOTE),
        failed_step="cancelled" if given.get("status") == "cancelled" else failed_step,
        error=clean(_text(given, "error")),
        server_left=_flag(given, "server_left") if milestone == "failed" else None,
        result_url=_url(given.get("result_url")) if milestone == "running" else None,
        server_id=_server_id(given.get("server_id")),
        server_ip=_address(given.get("server_ip")),
        tailscale_ip=_address(given.get("tailscale_ip")),
        body=body.decode(),
    )


def clean(error: str | None) -> str | None:
    """The last LONGEST_ERROR characters, without escape sequences and controls but newline and tab."""
    text = (error or "").replace("\r\n", "\n")
    if not text.isprintable():
        text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    return text[-LONGEST_ERROR:] or None


def sent_at(fields: Mapping[str, Any]) -> float | None:
    """When the sender says it sent, in Unix seconds; raises BadReport."""
    value = fields.get("sent_at")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadReport("sent_at: not a number")
    return value


def _time(seconds: float | None) -> float | None:
    if seconds is not None and not 0 <= seconds <= LATEST_TIME:
        raise BadReport("sent_at: not a time between the years 1970 and 9999")
    return seconds


def _milestone(given: Mapping[str, Any], step: str | None) -> str | None:
    """The milestone's name; None for a heartbeat; a step that has an end's name gets a prefix."""
    kind, status = given.get("type"), given.get("status")
    if kind is not None:
        if kind != "heartbeat":
            raise BadReport("type: only heartbeat is known")
        if status is not None:
            raise BadReport("status: a heartbeat has none")
        return None
    milestone = STATUSES.get(status) if isinstance(status, str) else None
    if milestone is None:
        raise BadReport(f"status: not one of {', '.join(STATUSES)}")
    if milestone in ENDS:
        return milestone
    return f"step:{step}" if step in ENDS else step or milestone


def _line(given: Mapping[str, Any], name: str, longest: int) -> str | None:
    """A text that is shown as one line."""
    text = _text(given, name, longest)
    return text if text is None or text.isprintable() else clean(text.replace("\n", " "))


def _repository(given: Mapping[str, Any]) -> str | None:
    name = _text(given, "repository")
    if name is not None and not _REPOSITORY.fullmatch(name):
        raise BadReport("repository: not owner/name")
    return name


def _flag(given: Mapping[str, Any], name: str) -> bool | None:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadReport(f"{name}: neither true nor false")
    return value


def _url(value: object) -> str | None:
    """An http(s) address, or None for anything else."""
    if not isinstance(value, str) or len(value) > LONGEST_URL or not value.isprintable() or " " in value:
        return None
    try:
        parts = urlsplit(value)
        return value if parts.scheme in ("http", "https") and parts.hostname else None
    except ValueError:
        return None


def _text(given: Mapping[str, Any], name: str, longest: int | None = None) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise BadReport(f"{name}: not a text")
    if value is not None and longest and len(value) > longest:
        raise BadReport(f"{name}: longer than {longest} characters")
    return value


def _run(given: Mapping[str, Any]) -> Run | None:
    if "workflow_run_id" not in given:
        return None
    id = _digits(given, "workflow_run_id")
    attempt = _digits(given, "run_attempt") if "run_attempt" in given else "1"
    if attempt == "0":
        raise BadReport("run_attempt: less than 1")
    return Run(id, attempt)


def _digits(given: Mapping[str, Any], name: str) -> str:
    value = given[name]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or len(value) > MOST_DIGITS or not _DIGITS.fullmatch(value):
        raise BadReport(f"{name}: not a whole number of at most {MOST_DIGITS} digits 0-9")
    return value.lstrip("0") or "0"


def _server_id(value: object) -> str | None:
    """A text or integer of at most LONGEST_SERVER_ID characters, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value)
    return text if len(text) <= LONGEST_SERVER_ID and text.isprintable() else None


def _address(value: object) -> str | None:
    try:
        return str(ip_address(value)) if isinstance(value, str) and "%" not in value else None
    except ValueError:
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise BadReport("the body has a key twice")
    return value


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 2**64
    if not -(2**63) <= value < 2**63:
        raise BadReport("the body has an integer beyond 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _constant(digits)


def _constant(name: str) -> NoReturn:
    raise BadReport(f"the body has {name[:20]}, which JSON does not know")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def _check(value: object, depth: int = 1) -> None:
    """Refuse deep nesting, and strings that cannot be stored; only escapes can have made those."""
    if depth > DEEPEST and isinstance(value, dict | list):
        raise BadReport(f"the body nests deeper than {DEEPEST}")
    if isinstance(value, dict):
        _check(list(value), depth)
        for member in value.values():
            _check(member, depth + 1)
    elif isinstance(value, list):
        for member in value:
            _check(member, depth + 1)
    elif isinstance(value, str) and _UNSTORABLE.search(value):
        raise BadReport("the body has a NUL or half a surrogate pair")
