"""jobs, attempts, callbacks: the schema of 0.1. A database without tables gets today's from env.py."""

import click

revision = "0001"
down_revision = None


def upgrade() -> None:
    raise click.ClickException("tables of 0.1 are no longer made: flask db upgrade makes today's")


def downgrade() -> None:
    raise click.ClickException("nothing is dropped: delete the database yourself if you want that")
