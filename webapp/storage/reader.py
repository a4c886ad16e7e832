"""Reads that are asked for together share one statement: a restart brings thousands of streams at once."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import gevent
from gevent.event import AsyncResult
from sqlalchemy import Connection, Engine, Row

from webapp.storage.jobs import CURRENT

T = TypeVar("T")


class Reader(Generic[T]):
    """Finds jobs; `make` makes of a row of `current_attempts()` what is wanted of it."""

    def __init__(self, engine: Engine, make: Callable[[Row[Any], Connection], T]) -> None:
        self._engine, self._make = engine, make
        self._asked: dict[str, AsyncResult[T | None]] = {}

    def find(self, job_id: str) -> T | None:
        """A job as it is now, or None; waits for a turn of the event loop. Raises SQLAlchemyError."""
        if not self._asked:
            gevent.spawn(self._read)
        return self._asked.setdefault(job_id, AsyncResult()).get()

    def _read(self) -> None:
        asked, self._asked = self._asked, {}
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(CURRENT, {"ids": [*asked]})
                found = {row.job_id: self._make(row, connection) for row in rows}
        except Exception as error:  # theirs, who wait for it
            for result in asked.values():
                result.set_exception(error)
        else:
            for job_id, result in asked.items():
                result.set(found.get(job_id))
