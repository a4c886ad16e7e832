"""The callbacks that this process has refused: how many, and why the last one, for each hour of a day."""

from collections import Counter, deque
from dataclasses import dataclass
from time import time

HOUR, HOURS = 3600, 24
LONGEST = 300  # characters of a cause


@dataclass
class Hour:
    """`began` is in Unix seconds."""

    began: int
    count: int = 0
    cause: str = ""


class Refusals:
    """Counts by status since this process began, and by hour; the other processes have their own."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self._hours: deque[Hour] = deque(maxlen=HOURS)

    def add(self, status: int, cause: str) -> None:
        """A callback was answered so."""
        began = int(time()) // HOUR * HOUR
        if not self._hours or self._hours[-1].began != began:
            self._hours.append(Hour(began))
        self.by_status[status] += 1
        self._hours[-1].count += 1
        self._hours[-1].cause = f"{status}: {cause[:LONGEST]}"

    def lately(self) -> list[Hour]:
        """The hours of the last day in which there were any, newest first."""
        return [hour for hour in reversed(self._hours) if hour.began > time() - HOURS * HOUR]
