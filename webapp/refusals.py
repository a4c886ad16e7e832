"""The callbacks that this process has refused: how many, and why the last one, for each hour of a day."""

from collections import Counter, deque
from time import time
from typing import Any

by_status: Counter[int] = Counter()  # since this process began
_hours: deque[dict[str, Any]] = deque(maxlen=24)  # newest first


def add(status: int, cause: str) -> None:
    """A callback was answered so."""
    by_status[status] += 1
    began = int(time()) // 3600 * 3600
    if not _hours or _hours[0]["began"] != began:
        _hours.appendleft({"began": began, "count": 0})
    _hours[0] |= {"count": _hours[0]["count"] + 1, "cause": f"{status}: {cause[:300]}"}


def lately() -> list[dict[str, Any]]:
    """The hours of the last day in which there were any, newest first: `began`, `count`, last `cause`."""
    return [hour for hour in _hours if hour["began"] > time() - 24 * 3600]
