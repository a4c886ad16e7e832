"""pipelines, sessions, notifications; what GitHub says of a run; jobs that departed"""

import click
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ID = sa.String().with_variant(sa.String(collation="C"), "postgresql")
ADDED = {
    "pipeline": sa.Column("pipeline", ID, nullable=False, server_default="provision-agent"),
    **{
        name: sa.Column(name, kind())
        for name, kind in {
            "definition": sa.Text,
            "subject": sa.Text,
            "note": sa.Text,
            "repository": sa.Text,
            "first_sent_at": sa.Double,
            "last_callback_at": sa.Double,
            "server_left": sa.Boolean,
            "result_url": sa.Text,
            "run_state_at": sa.Double,
            "waiting_for": sa.Text,
            "expected_from": sa.Double,
            "expected_to": sa.Double,
        }.items()
    },
}


def upgrade() -> None:
    with op.batch_alter_table("attempts") as table:
        table.drop_index("attempts_ended")
        table.drop_index("ix_attempts_version")
        table.alter_column("version", new_column_name="change", existing_type=NUMBER)
        table.alter_column("witness", new_column_name="run_state", existing_type=sa.Text())
        table.alter_column("witnessed_at", new_column_name="looked_at", existing_type=sa.Double())
        for column in ADDED.values():
            table.add_column(column)
    op.create_index("attempts_ended", "attempts", ["pipeline", "end", "ended_at"])
    op.create_index("ix_attempts_change", "attempts", ["change"])
    op.execute("UPDATE attempts SET usual = NULL, last_callback_at = last_signal_at")
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("pipeline", ID, nullable=False, server_default="provision-agent"))
    op.create_index("jobs_by_pipeline", "jobs", ["pipeline", "created_at", "job_id"])
    op.create_index("jobs_counted", "jobs", ["pipeline", "status"])
    op.create_table(
        "definitions",
        sa.Column("hash", sa.Text(), primary_key=True),
        sa.Column("content", sa.Text(), nullable=False),
    )
    op.create_table(
        "departed",
        sa.Column("job_id", ID, primary_key=True),
        sa.Column("link", sa.Integer(), nullable=False),
        sa.Column("change", NUMBER, nullable=False, index=True),
        sa.Column("deleted_at", sa.Double()),
    )
    op.create_table(
        "closures",
        sa.Column("until", sa.Double(), primary_key=True, autoincrement=False),
        sa.Column("since", sa.Double(), nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("hash", sa.Text(), primary_key=True),
        sa.Column("key_hash", sa.Text(), unique=True),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
    )
    op.create_table(
        "notifications",
        sa.Column("job_id", ID, primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("event", sa.Text(), primary_key=True),
        sa.Column("happened_at", sa.Double(), nullable=False),
        sa.Column("due_at", sa.Double(), index=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("sent_at", sa.Double(), index=True),
        sa.Column("problem", sa.Text()),
    )
    op.create_table(
        "marks",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    raise click.ClickException("nothing is dropped: restore the backup that you made before the upgrade")
