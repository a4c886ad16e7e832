"""Job, Attempt and Callback as tables. `store` writes them, the doors read them; times are Unix seconds."""

from collections.abc import Iterable
from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    Index,
    Integer,
    Row,
    Select,
    String,
    Text,
    UniqueConstraint,
    bindparam,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from webapp.rules import progress


class Base(DeclarativeBase):
    """Every table's base; Flask-SQLAlchemy's own would be untyped."""


db = SQLAlchemy(model_class=Base)
# SQLite counts up only what is called INTEGER. Ids sort and compare by byte, on PostgreSQL as on SQLite.
Number = BigInteger().with_variant(Integer, "sqlite")
Id = String().with_variant(String(collation="C"), "postgresql")


class Job(Base):
    """One agent to be provisioned; `attempt` and `status` are those of its current attempt."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(Id, primary_key=True)
    agent_id: Mapped[str | None] = mapped_column(Id)
    region: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    attempt: Mapped[int]
    status: Mapped[str] = mapped_column(Text)
    link: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (
        Index("jobs_newest", "created_at", "job_id"),
        Index("jobs_by_status", "status", "created_at", "job_id"),
        Index("jobs_by_agent", "agent_id", "created_at", "job_id"),
    )


class Attempt(Base):
    """The columns of `progress.Attempt`, and since when it is silent, for the search for the lost."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(Id, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    opened_at: Mapped[float]
    version: Mapped[int] = mapped_column(Number, index=True)
    run_id: Mapped[str | None] = mapped_column(Text)
    run_attempt: Mapped[str | None] = mapped_column(Text)
    rank: Mapped[int]
    end: Mapped[str | None] = mapped_column(Text)
    ended_at: Mapped[float | None]
    end_sent_at: Mapped[float | None]
    failed_step: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    contradicted: Mapped[bool]
    times: Mapped[dict[str, float]] = mapped_column(JSON)
    last_signal_at: Mapped[float | None]
    heartbeat_sent_at: Mapped[float | None]
    server_id: Mapped[str | None] = mapped_column(Text)
    server_ip: Mapped[str | None] = mapped_column(Text)
    tailscale_ip: Mapped[str | None] = mapped_column(Text)
    asked_at: Mapped[float | None]
    taken_at: Mapped[float | None]
    run_url: Mapped[str | None] = mapped_column(Text)
    witness: Mapped[str | None] = mapped_column(Text)
    witnessed_at: Mapped[float | None]
    usual: Mapped[dict[str, list[float]] | None] = mapped_column(JSON(none_as_null=True))
    heard_at: Mapped[float | None]

    __table_args__ = (
        Index(
            "attempts_unfinished",
            "heard_at",
            sqlite_where=text('"end" IS NULL'),
            postgresql_where=text('"end" IS NULL'),
        ),
        Index("attempts_ended", "end", "ended_at"),
        Index("attempts_by_run", "run_id", postgresql_using="hash"),  # digits of any length
    )


class Callback(Base):
    """An accepted callback, kept for good; `milestone` is null for a heartbeat.

    The unique key is what makes repeats harmless: a milestone counts once per attempt.
    """

    __tablename__ = "callbacks"

    id: Mapped[int] = mapped_column(Number, primary_key=True)
    job_id: Mapped[str] = mapped_column(Id)
    number: Mapped[int]
    milestone: Mapped[str | None] = mapped_column(Text)
    arrived_at: Mapped[float]
    sent_at: Mapped[float | None]
    body: Mapped[str] = mapped_column(Text)

    __table_args__ = (UniqueConstraint("job_id", "number", "milestone", name="callbacks_once"),)


jobs, attempts, callbacks = (model.metadata.tables[model.__tablename__] for model in (Job, Attempt, Callback))
STATE = [attempts.c[name] for name in progress.Attempt._fields]


def attempt_from(row: Row[Any]) -> progress.Attempt:
    """The value of a row whose first columns are STATE."""
    return progress.Attempt._make(row[: len(STATE)])


def current_attempts() -> Select[Any]:
    """Select each job's current attempt, and the job's own columns after it."""
    return select(*STATE, *jobs.c).join(
        jobs, (jobs.c.job_id == attempts.c.job_id) & (jobs.c.attempt == attempts.c.number)
    )


CURRENT = current_attempts().where(jobs.c.job_id.in_(bindparam("ids", expanding=True)))


def attempts_of(connection: Connection, job_id: str) -> list[progress.Attempt]:
    """All attempts of a job, oldest first, those that were never opened (below 1) included."""
    rows = connection.execute(select(*STATE).where(attempts.c.job_id == job_id).order_by(attempts.c.number))
    return [attempt_from(row) for row in rows]


def as_row(attempt: progress.Attempt) -> dict[str, Any]:
    """The columns of an attempt."""
    return attempt._asdict() | {"heard_at": attempt.heard_at}


def difference(before: progress.Attempt, after: progress.Attempt) -> dict[str, Any]:
    """The columns that changed."""
    changed = zip(after._fields, before, after, strict=True)
    row = {name: new for name, old, new in changed if new != old}
    if after.heard_at != before.heard_at:
        row["heard_at"] = after.heard_at
    return row


_NEWEST_VERSION = select(attempts.c.version).order_by(attempts.c.version.desc()).limit(1)


def newest_version(connection: Connection) -> int:
    """The number of the last change; each change of what is shown takes the next one."""
    return connection.execute(_NEWEST_VERSION).scalar() or 0


def known_jobs(connection: Connection, job_ids: Iterable[str]) -> set[str]:
    """Those of the jobs that exist, their rows locked until the transaction ends (SQLite: the file is)."""
    ids = sorted(job_ids)
    rows = connection.execute(
        select(jobs.c.job_id).where(jobs.c.job_id.in_(ids)).order_by(jobs.c.job_id).with_for_update()
    )
    return {row.job_id for row in rows}
