"""Pruning in steps so small that no callback waits for one, and giving the space back."""

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic, sleep, time
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, func, or_, select

from webapp.rules.attempt import Clock
from webapp.rules.progress import NEWEST
from webapp.storage.database import to_write
from webapp.storage.jobs import current_attempts, is_in
from webapp.storage.tables import attempts, callbacks, departed, jobs
from webapp.storage.transaction import DELETED_FOR, Transaction
from webapp.storage.writer import Writer

JOBS, ROWS, PAGES = 50, 500, 50  # of one transaction: about 10 ms; a page that moves takes 0.25 ms
# Of a job that is pruned, an attempt that usual times are learnt from stays: under a job id that begins so,
# as no job's can, and with each column emptied that may be empty and that the times do not need.
NOBODY = "~"
KEPT = ("definition", "end", "ended_at")
FORGOTTEN = {column.name: None for column in attempts.c if column.nullable and column.name not in KEPT}


def prunable(until: float, clock: Clock) -> ColumnElement[bool]:
    """The job is over or lost, and nothing was heard of it since `until`."""
    last = func.coalesce(attempts.c.ended_at, attempts.c.heard_at, attempts.c.opened_at)
    return and_(jobs.c.created_at < until, last < until, or_(is_in("over", clock), is_in("lost", clock)))


def prune(writer: Writer, which: ColumnElement[bool]) -> Iterator[int]:
    """Remove such jobs; how many, after each step."""
    for _ in _paced(writer.engine, lambda: writer.run(_forget_departed)):
        pass
    oldest: dict[str, float] = writer.run(_oldest_learnt_from)
    yield from _paced(writer.engine, lambda: writer.run(partial(_step, which, oldest)))


def _paced(engine: Engine, step: Callable[[], int | None]) -> Iterator[int]:
    """What each step did, until one says None; after each the others have a turn, for as long as it took."""
    began = monotonic()
    while (done := step()) is not None:
        yield done
        if engine.dialect.name == "sqlite":  # or a callback's commit would write back all that gathered
            with engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        sleep(max(monotonic() - began, 0.005))
        began = monotonic()


def _step(which: ColumnElement[bool], oldest: dict[str, float], transaction: Transaction) -> int | None:
    """Remove some jobs, or else some of their callbacks; None once there are no more such jobs."""
    connection = transaction.connection
    found = current_attempts().with_only_columns(jobs.c.job_id, maintain_column_froms=True).where(which)
    # Locked, because a callback may bring it back to life.
    ids = list(connection.execute(found.limit(JOBS).with_for_update(of=jobs, skip_locked=True)).scalars())
    if not ids:
        return None
    some = select(callbacks.c.id).where(callbacks.c.job_id.in_(ids)).limit(ROWS)
    if connection.execute(callbacks.delete().where(callbacks.c.id.in_(some))).rowcount == ROWS:
        return 0
    _keep_times(transaction, ids, oldest)
    transaction.remove(ids)
    return len(ids)


def _oldest_learnt_from(transaction: Transaction) -> dict[str, float]:
    """When the oldest attempt ended that usual times are learnt from, by pipeline; older ones are let go."""
    oldest = {}
    for pipeline in transaction.settings.pipelines:
        done = (attempts.c.pipeline == pipeline) & (attempts.c.end == "running")
        ended = select(attempts.c.ended_at).where(done).order_by(attempts.c.ended_at.desc())
        oldest[pipeline] = transaction.connection.execute(ended.offset(NEWEST - 1).limit(1)).scalar() or 0.0
        kept = done & (attempts.c.job_id >= NOBODY) & (attempts.c.ended_at < oldest[pipeline])
        transaction.connection.execute(attempts.delete().where(kept))
    return oldest


def _keep_times(transaction: Transaction, job_ids: list[str], oldest: dict[str, float]) -> None:
    """Keep what usual times are learnt from, without anything that tells whose they were."""
    done = select(attempts.c.job_id, attempts.c.number, attempts.c.pipeline, attempts.c.ended_at)
    done = done.where(attempts.c.job_id.in_(job_ids), attempts.c.end == "running")
    for row in transaction.connection.execute(done).all():
        if row.ended_at >= oldest.get(row.pipeline, float("inf")):
            which = (attempts.c.job_id == row.job_id) & (attempts.c.number == row.number)
            values: dict[str, Any] = FORGOTTEN | {"job_id": NOBODY + secrets.token_hex(16)}
            transaction.connection.execute(attempts.update().where(which).values(values))


def _forget_departed(transaction: Transaction) -> int | None:
    """Of jobs that are gone only revoked links have to be remembered, and deletions for a day."""
    gone = or_(departed.c.deleted_at.is_(None), departed.c.deleted_at < time() - DELETED_FOR)
    some = select(departed.c.job_id).where(departed.c.link == 0, gone).limit(ROWS)
    forgotten = departed.delete().where(departed.c.job_id.in_(some))
    return transaction.connection.execute(forgotten).rowcount or None


def give_back(engine: Engine) -> bool:
    """Give SQLite's free pages back to the disk, step by step; False for a file that cannot shrink so."""
    if engine.dialect.name != "sqlite":
        return True  # PostgreSQL's own autovacuum makes the space usable again
    with to_write(engine) as connection:
        ask: Any = connection.connection.cursor()

        def step() -> int | None:
            with connection.begin():
                for _ in range(PAGES):  # Python's sqlite3 gives one page back, whatever number stands there
                    ask.execute("PRAGMA incremental_vacuum(1)").fetchall()
            return ask.execute("PRAGMA freelist_count").fetchone()[0] or None

        if ask.execute("PRAGMA auto_vacuum").fetchone()[0] != 2:
            return False
        for _ in _paced(engine, step):
            pass
    return True
