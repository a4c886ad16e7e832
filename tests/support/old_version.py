"""A database as Milepost 0.1 left it: its tables, and one job that was done."""

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

ROWS = (
    "INSERT INTO alembic_version VALUES ('0001')",
    "INSERT INTO jobs (job_id, created_at, attempt, status, link) VALUES ('a-job', 1.5, 1, 'running', 0)",
    "INSERT INTO callbacks (job_id, number, milestone, arrived_at, body)"
    " VALUES ('a-job', 1, 'running', 9.5, '{\"job_id\": \"a-job\"}')",
    'INSERT INTO attempts (job_id, number, opened_at, version, run_id, run_attempt, rank, "end", ended_at,'
    " contradicted, times, last_signal_at, heard_at, witness) VALUES ('a-job', 1, 1.5, 7, '42', '1', 5,"
    " 'running', 9.5, false, '{\"running\": 9.5}', 9.5, 9.5, 'completed: success')",
)


def make(database_url: str) -> None:
    engine = sa.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        _create(Operations(MigrationContext.configure(connection)))
        for row in ROWS:
            connection.exec_driver_sql(row)
    engine.dispose()


def _create(op: Operations) -> None:
    op.create_table("alembic_version", sa.Column("version_num", sa.String(32), primary_key=True))
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.String().with_variant(sa.String(collation="C"), "postgresql"), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("run_attempt", sa.Text(), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("end", sa.Text(), nullable=True),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("end_sent_at", sa.Double(), nullable=True),
        sa.Column("failed_step", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("contradicted", sa.Boolean(), nullable=False),
        sa.Column("times", sa.JSON(), nullable=False),
        sa.Column("last_signal_at", sa.Double(), nullable=True),
        sa.Column("heartbeat_sent_at", sa.Double(), nullable=True),
        sa.Column("server_id", sa.Text(), nullable=True),
        sa.Column("server_ip", sa.Text(), nullable=True),
        sa.Column("tailscale_ip", sa.Text(), nullable=True),
        sa.Column("asked_at", sa.Double(), nullable=True),
        sa.Column("taken_at", sa.Double(), nullable=True),
        sa.Column("run_url", sa.Text(), nullable=True),
        sa.Column("witness", sa.Text(), nullable=True),
        sa.Column("witnessed_at", sa.Double(), nullable=True),
        sa.Column("usual", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("heard_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "number"),
    )
    with op.batch_alter_table("attempts", schema=None) as batch_op:
        batch_op.create_index("attempts_by_run", ["run_id"], unique=False, postgresql_using="hash")
        batch_op.create_index("attempts_ended", ["end", "ended_at"], unique=False)
        batch_op.create_index(
            "attempts_unfinished",
            ["heard_at"],
            unique=False,
            sqlite_where=sa.text('"end" IS NULL'),
            postgresql_where=sa.text('"end" IS NULL'),
        )
        batch_op.create_index(batch_op.f("ix_attempts_version"), ["version"], unique=False)

    op.create_table(
        "callbacks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.String().with_variant(sa.String(collation="C"), "postgresql"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("milestone", sa.Text(), nullable=True),
        sa.Column("arrived_at", sa.Double(), nullable=False),
        sa.Column("sent_at", sa.Double(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "number", "milestone", name="callbacks_once"),
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String().with_variant(sa.String(collation="C"), "postgresql"), nullable=False),
        sa.Column(
            "agent_id", sa.String().with_variant(sa.String(collation="C"), "postgresql"), nullable=True
        ),
        sa.Column("region", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("link", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("job_id"),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index("jobs_by_agent", ["agent_id", "created_at", "job_id"], unique=False)
        batch_op.create_index("jobs_by_status", ["status", "created_at", "job_id"], unique=False)
        batch_op.create_index("jobs_newest", ["created_at", "job_id"], unique=False)
