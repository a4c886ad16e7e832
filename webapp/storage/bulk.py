"""Many rows at once: SQLite takes them one after the other, PostgreSQL as JSON in one statement.

There a statement for each row took a third of a callback. The rows of a call have the same names.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import JSON, Connection, Integer, Subquery, Table, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite

Rows = Sequence[dict[str, Any]]
Names = tuple[str, ...]


def insert(connection: Connection, table: Table, rows: Rows) -> None:
    """Insert rows that are not there."""
    _execute(connection, _insert(_is_postgresql(connection), table, tuple(rows[0])), rows)


def insert_new(connection: Connection, table: Table, rows: Rows) -> set[str]:
    """Insert rows, but not those that are there; the jobs of those that were inserted."""
    statement = _insert_new(_is_postgresql(connection), table, tuple(rows[0]))
    return set(_execute(connection, statement, rows).scalars())


def update(connection: Connection, table: Table, keys: Names, rows: Rows) -> None:
    """Set what the rows bring, the changed columns alone: SQLite would write every index anew."""
    _execute(connection, _update(_is_postgresql(connection), table, tuple(rows[0]), keys), rows)


def _is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _execute(connection: Connection, statement: Any, rows: Rows) -> Any:
    if _is_postgresql(connection):
        return connection.execute(statement, {"rows": rows, "count": len(rows)})
    return connection.execute(statement, [{f"b_{name}": row[name] for name in row} for row in rows])


@lru_cache(128)
def _insert(is_postgresql: bool, table: Table, names: Names) -> Any:
    if is_postgresql:
        return postgresql.insert(table).from_select(names, select(_given(table, names)))
    return sqlite.insert(table).values({name: bindparam(f"b_{name}") for name in names})


@lru_cache(128)
def _insert_new(is_postgresql: bool, table: Table, names: Names) -> Any:
    statement = _insert(is_postgresql, table, names)
    return statement.on_conflict_do_nothing().returning(table.c.job_id)


@lru_cache(128)
def _update(is_postgresql: bool, table: Table, names: Names, keys: Names) -> Any:
    given: Any = _given(table, names).c if is_postgresql else {name: bindparam(f"b_{name}") for name in names}
    found = table.update().where(*(table.c[key] == given[key] for key in keys))
    return found.values({name: given[name] for name in names if name not in keys})


def _given(table: Table, names: Names) -> Subquery:
    """The rows as a table; in arrays, the quotes of the bodies would cost as much as this saves."""
    rows = func.json_to_recordset(bindparam("rows", type_=JSON))
    columns = [column(name, table.c[name].type) for name in names]
    given = rows.table_valued(*columns).render_derived(with_types=True)
    # Without a LIMIT the planner takes them for 100, and reads a table of 10,000 from end to end.
    return select(given).limit(bindparam("count", type_=Integer)).subquery()
