"""The tables. `transaction` writes them, `jobs` reads them; times are Unix seconds."""

from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from webapp.rules.attempt import Attempt

metadata = MetaData()
db = SQLAlchemy(metadata=metadata)
# SQLite counts up only what is called INTEGER. Ids sort and compare by byte, on PostgreSQL as on SQLite.
Number = BigInteger().with_variant(Integer, "sqlite")
Id = String().with_variant(String(collation="C"), "postgresql")

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Id, primary_key=True),
    Column("agent_id", Id),
    Column("region", Text),
    Column("pipeline", Id, nullable=False, server_default="provision-agent"),
    Column("created_at", Double, nullable=False),
    Column("attempt", Integer, nullable=False, doc="the number of the current one"),
    Column("status", Text, nullable=False, doc="of the current attempt"),
    Column("link", Integer, nullable=False, server_default="0", doc="how many links were revoked"),
    Index("jobs_newest", "created_at", "job_id"),
    Index("jobs_by_status", "status", "created_at", "job_id"),
    Index("jobs_by_agent", "agent_id", "created_at", "job_id"),
    Index("jobs_by_pipeline", "pipeline", "created_at", "job_id"),
    Index("jobs_counted", "pipeline", "status"),  # 100,000 in 20 ms, not 200
)

_unfinished = text('"end" IS NULL')
attempts = Table(
    "attempts",
    metadata,
    Column("job_id", Id, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False, doc="below 1: never opened"),
    Column("opened_at", Double, nullable=False),
    Column("pipeline", Id, nullable=False, server_default="provision-agent"),
    Column("definition", Text, doc="the hash of its steps; null: those of the built-in pipeline"),
    Column("change", Number, nullable=False, index=True),
    Column("subject", Text),
    Column("note", Text),
    Column("run_id", Text),
    Column("run_attempt", Text),
    Column("repository", Text),
    Column("run_url", Text),
    Column("first_sent_at", Double),
    Column("rank", Integer, nullable=False),
    Column("end", Text),
    Column("ended_at", Double),
    Column("end_sent_at", Double),
    Column("failed_step", Text),
    Column("error", Text),
    Column("contradicted", Boolean, nullable=False),
    Column("times", JSON, nullable=False),
    Column("last_callback_at", Double),
    Column("last_signal_at", Double),
    Column("heard_at", Double),
    Column("heartbeat_sent_at", Double),
    Column("server_id", Text),
    Column("server_ip", Text),
    Column("tailscale_ip", Text),
    Column("server_left", Boolean),
    Column("result_url", Text),
    Column("asked_at", Double, doc="when GitHub was asked to run the workflow"),
    Column("taken_at", Double, doc="when GitHub took the dispatch"),
    Column("run_state", Text, doc="GitHub's newest word of the run"),
    Column("run_state_at", Double),
    Column("waiting_for", Text),
    Column("looked_at", Double, doc="when GitHub's API was last asked about the run"),
    Column("usual", JSON(none_as_null=True)),
    Column("expected_from", Double),
    Column("expected_to", Double),
    Index("attempts_unfinished", "heard_at", sqlite_where=_unfinished, postgresql_where=_unfinished),
    Index("attempts_ended", "pipeline", "end", "ended_at"),
    Index("attempts_by_run", "run_id", postgresql_using="hash"),
)

callbacks = Table(
    "callbacks",
    metadata,
    Column("id", Number, primary_key=True),
    Column("job_id", Id, nullable=False),
    Column("number", Integer, nullable=False),
    Column("milestone", Text, doc="null for a heartbeat"),
    Column("arrived_at", Double, nullable=False),
    Column("sent_at", Double),
    Column("body", Text, nullable=False),
    UniqueConstraint("job_id", "number", "milestone", name="callbacks_once"),  # makes repeats harmless
)

definitions = Table(
    "definitions",
    metadata,
    Column("hash", Text, primary_key=True),
    Column("content", Text, nullable=False, doc="a rules.pipeline.Pipeline as JSON"),
)

departed = Table(
    "departed",
    metadata,
    Column("job_id", Id, primary_key=True, doc="of a job that was pruned or deleted"),
    Column("link", Integer, nullable=False, doc="how many of its links were revoked"),
    Column("change", Number, nullable=False, index=True),
    Column("deleted_at", Double, doc="null where it was pruned"),
)

closures = Table(
    "closures",
    metadata,
    Column("until", Double, primary_key=True, autoincrement=False, doc="when a server started"),
    Column("since", Double, nullable=False, doc="the newest arrival that the database knew then"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("hash", Text, primary_key=True, doc="of the secret that the cookie carries"),
    Column("key_hash", Text, unique=True, doc="of the sign-in link's key, which works once"),
    Column("fingerprint", Text, nullable=False, doc="of the operator token that it was opened with"),
    Column("opened_at", Double, nullable=False),
    Column("ended_at", Double),
)

notifications = Table(
    "notifications",
    metadata,
    Column("job_id", Id, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("event", Text, primary_key=True, doc="done, failed, cancelled, lost or recovered"),
    Column("happened_at", Double, nullable=False),
    Column("due_at", Double, index=True, doc="of the next try; null: sent or given up"),
    Column("tries", Integer, nullable=False),
    Column("sent_at", Double, index=True),
    Column("problem", Text, doc="why the last try failed"),
)

marks = Table(
    "marks",
    metadata,
    Column("name", Text, primary_key=True, doc="such as notify_since"),
    Column("at", Double, nullable=False),
)

MILESTONES = callbacks.c.milestone.is_not(None)
STATE = [attempts.c[name] for name in Attempt._fields]


def attempt_from(row: Row[Any]) -> Attempt:
    """The value of a row whose first columns are STATE."""
    return Attempt._make(row[: len(STATE)])


def difference(before: Attempt, after: Attempt) -> dict[str, Any]:
    """The columns that changed."""
    changed = zip(after._fields, before, after, strict=True)
    return {name: new for name, old, new in changed if new != old}
