"""A callback's bytes become a Report: strict JSON first, then the contract's table of fields.

Python's `json` alone also takes UTF-16, NaN, duplicate keys and strings that no database stores.
"""

import json
import math
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NoReturn

from webapp.rules.progress import RANKS, Report, Run

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEEPEST = 32
LONGEST_ERROR = 2000
LATEST_TIME = 253_402_300_799  # the last second of the year 9999
_DIGITS = re.compile(r"[0-9]+")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


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
        raise BadReport("job_id: 1 to 64 of A-Z a-z 0-9 . _ - are required, the first a letter or digit")
    step = _text(given, "step", 64)
    failed_step = _text(given, "failed_step", 64) or step
    error = _text(given, "error")
    return Report(
        job_id=job_id,
        milestone=_milestone(given, step),
        arrived_at=arrived_at,
        sent_at=_time(sent_at(given)),
        run=_run(given),
        failed_step=failed_step,
        error=error and error[:LONGEST_ERROR],
        server_id=_server_id(given.get("server_id")),
        server_ip=_address(given.get("server_ip")),
        tailscale_ip=_address(given.get("tailscale_ip")),
        body=body.decode(),
    )


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
    """The milestone's name; None for a heartbeat; a step that is not known gets a prefix."""
    kind, status = given.get("type"), given.get("status")
    if kind is not None:
        if kind != "heartbeat":
            raise BadReport("type: only heartbeat is known")
        if status is not None:
            raise BadReport("status: a heartbeat has none")
        return None
    if status == "provisioning":
        known = step is None or (step in RANKS and step != "running")
        return (step or "provisioning") if known else f"step:{step}"
    if status == "running" or status == "failed":
        return str(status)
    raise BadReport("status: provisioning, running or failed is required")


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
    if not isinstance(value, str) or not _DIGITS.fullmatch(value):
        raise BadReport(f"{name}: not a whole number of the digits 0-9")
    return value.lstrip("0") or "0"


def _server_id(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


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
