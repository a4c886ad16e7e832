"""Copy all that one Milepost database has into another, empty one: from SQLite to PostgreSQL, or back.

    flask --app wsgi db upgrade                                  # the old one, and with its URL the new one
    python .github/deploy/copy_database.py sqlite:////var/lib/milepost/milepost.db postgresql://…

Nothing may write to the old one meanwhile: stop the servers. All is copied, or nothing.
"""

import sys
from pathlib import Path

from sqlalchemy import Connection, create_engine, func, select, text

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from webapp.storage.tables import metadata

ROWS = 5_000  # that are in memory at the same time


def main(old: str, new: str) -> None:
    """Copy, and say how much; raises SystemExit."""
    engines = [create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1)) for url in (old, new)]
    schema = text("SELECT version_num FROM alembic_version")
    with engines[0].connect() as source, engines[1].begin() as target:
        if source.scalar(schema) != target.scalar(schema):
            raise SystemExit("The schemas differ: run `flask --app wsgi db upgrade` on both.")
        for table in metadata.sorted_tables:
            if target.execute(select(table).limit(1)).first():
                raise SystemExit(f"The new database is not empty: {table.name} has rows. Nothing was copied.")
            count = 0
            found = source.execution_options(yield_per=ROWS).execute(select(table))
            for rows in found.mappings().partitions():
                target.execute(table.insert(), [dict(row) for row in rows])
                count += len(rows)
            print(f"{table.name}: {count} rows")
        count_on(target)


def count_on(target: Connection) -> None:
    """PostgreSQL's next ids come after those that were copied."""
    if target.dialect.name != "postgresql":
        return
    for table in metadata.sorted_tables:
        for column in table.primary_key:
            name = target.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
            if name:
                target.execute(
                    select(func.setval(name, select(func.max(column) + 1).scalar_subquery(), False))
                )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
