"""pipelines, sessions, notifications; what GitHub says of a run; jobs that departed"""

from typing import Any

import click
from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, String, Text

revision = "0002"
down_revision = "0001"

Number = BigInteger().with_variant(Integer, "sqlite")
Id = String().with_variant(String(collation="C"), "postgresql")
ADDED: dict[Any, tuple[str, ...]] = {
    Text: ("definition", "subject", "note", "repository", "result_url", "waiting_for"),
    Double: ("first_sent_at", "last_callback_at", "run_state_at", "expected_from", "expected_to"),
    Boolean: ("server_left",),
}


def key(name: str, kind: Any) -> Column[Any]:
    return Column(name, kind, primary_key=True, autoincrement=False)


def full(name: str, kind: Any, **options: Any) -> Column[Any]:
    return Column(name, kind, nullable=False, **options)


def upgrade() -> None:
    with op.batch_alter_table("attempts") as table:
        table.drop_index("attempts_ended")
        table.drop_index("ix_attempts_version")
        table.alter_column("version", new_column_name="change", existing_type=Number)
        table.alter_column("witness", new_column_name="run_state", existing_type=Text())
        table.alter_column("witnessed_at", new_column_name="looked_at", existing_type=Double())
        table.add_column(full("pipeline", Id, server_default="provision-agent"))
        for kind, names in ADDED.items():
            for name in names:
                table.add_column(Column(name, kind))
    op.create_index("attempts_ended", "attempts", ["pipeline", "end", "ended_at"])
    op.create_index("ix_attempts_change", "attempts", ["change"])
    op.execute("UPDATE attempts SET usual = NULL, last_callback_at = last_signal_at")
    with op.batch_alter_table("jobs") as table:
        table.add_column(full("pipeline", Id, server_default="provision-agent"))
    op.create_index("jobs_by_pipeline", "jobs", ["pipeline", "created_at", "job_id"])
    op.create_index("jobs_counted", "jobs", ["pipeline", "status"])
    op.create_table("definitions", key("hash", Text), full("content", Text))
    counted = [full("link", Integer), full("change", Number, index=True)]
    op.create_table("departed", key("job_id", Id), *counted, Column("deleted_at", Double))
    op.create_table("closures", key("until", Double), full("since", Double))
    hashes = [key("hash", Text), Column("key_hash", Text, unique=True), full("fingerprint", Text)]
    op.create_table("sessions", *hashes, full("opened_at", Double), Column("ended_at", Double))
    event = [key("job_id", Id), key("number", Integer), key("event", Text), full("happened_at", Double)]
    times = [Column("due_at", Double, index=True), Column("sent_at", Double, index=True)]
    op.create_table("notifications", *event, *times, full("tries", Integer), Column("problem", Text))
    op.create_table("marks", key("name", Text), full("at", Double))


def downgrade() -> None:
    raise click.ClickException("nothing is dropped: restore the backup that you made before the upgrade")
