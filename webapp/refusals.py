"""The callbacks that this process has refused: how many, and why the last one, for each hour of a day."""

from collections import Counter, deque
from dataclasses import dataclass
from time import time

HOUR, HOURS = 3600, 24
LONGEST = 300  # characters of a cause


@dataclass(frozen=True)
class Hour:
    """`began` is in Unix seconds."""

    began: int
    count: int
    cause: str


by_status: Counter[int] = Counter()  # since this process began
_hours: deque[Hour] = deque(maxlen=HOURS)


def add(status: int, cause: str) -> None:
    """A callback was answered so."""
    by_status[status] += 1
    began = int(time()) // HOUR * HOUR
    before = _hours.pop().count if _hours and _hours[-1].began == began else 0
    _hours.append(Hour(began, before + 1, f"{status}: {cause[:LONGEST]}"))


def lately() -> list[Hour]:
    """The hours of the last day in which there were any, newest first."""
    return [hour for hour in reversed(_hours) if hour.began > time() - HOURS * HOUR]
