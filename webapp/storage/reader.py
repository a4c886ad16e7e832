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
        self._reading: gevent.Greenlet[[], None] | None = None

    def find(self, job_id: str) -> T | None:
        """A job as it is now, or None; waits for a turn of the event loop. Raises SQLAlchemyError."""
        result = self._asked.setdefault(job_id, AsyncResult())
        if not self._reading:  # none, or one that has ended, even by a lack of memory before it began
            self._reading = gevent.spawn(self._read)
        return result.get()

    def _read(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            problem: Exception = MemoryError()
            try:
                with self._engine.connect() as connection:
                    rows = connection.execute(CURRENT, {"ids": [*asked]})
                    found = {row.job_id: self._make(row, connection) for row in rows}
                for job_id, result in asked.items():
                    result.set(found.get(job_id))
            except Exception as error:
                problem = error
            finally:  # whatever happens here, nobody waits in vain
                for result in asked.values():
                    if not result.ready():
                        result.set_exception(problem)
