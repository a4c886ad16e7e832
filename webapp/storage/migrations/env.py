"""Alembic's entry: bring the app's database to the newest schema, one migrator at a time."""

import sqlite3
from contextlib import suppress
from typing import Any

from alembic import context
from sqlalchemy import text

from webapp.storage.database import to_write
from webapp.storage.tables import db

with to_write(db.engine) as connection:
    context.configure(connection=connection, target_metadata=db.metadata, render_as_batch=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            driver: Any = connection.connection.driver_connection
            driver.bound = None  # a migration may take long
            for setting in ("statement_timeout", "lock_timeout"):
                connection.execute(text(f"SET LOCAL {setting} = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(6453)"))
        migrations = context.get_context()
        if migrations.get_current_revision() is None and "destination_rev" in migrations.opts:
            db.metadata.create_all(connection)  # the migrations are for the databases of older versions
            migrations.stamp(context.script, "head")
        context.run_migrations()
    if connection.dialect.name == "sqlite":
        connection.commit()
        ask = connection.connection.cursor()
        if ask.execute("PRAGMA auto_vacuum").fetchone()[0] == 0:  # made before `prune` gave space back
            ask.execute("PRAGMA auto_vacuum=INCREMENTAL")
            with suppress(sqlite3.OperationalError):  # in use, or no room: then the file keeps its size
                ask.execute("VACUUM")
