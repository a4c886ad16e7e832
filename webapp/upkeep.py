"""The terminal's upkeep: back up, restore, prune."""

import sqlite3
import tarfile
from pathlib import Path
from time import time

import click
import flask_migrate
from flask.cli import with_appcontext
from sqlalchemy import Engine

from webapp import config
from webapp.parts import parts
from webapp.storage import backup, pruning
from webapp.storage.jobs import count_all
from webapp.storage.tables import db

MADE = {name.lower(): config.INSTANCE / name.lower() for name in config.SECRETS}
FAILURES = (backup.Refused, OSError, EOFError, sqlite3.Error, tarfile.TarError)
TELL_EVERY = 1000  # jobs


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@with_appcontext
def back_up(file: Path) -> None:
    """Copy the database and the made secrets into FILE (mode 0600), beside a running server."""
    database = _sqlite(db.engine, f'pg_dump --format=custom --file={file} "$DATABASE_URL"')
    try:
        backup.back_up(database, MADE, file)
    except FAILURES as error:
        raise click.ClickException(f"no backup was written: {error}") from None
    made = [name for name, path in MADE.items() if path.exists()]
    click.echo(f"{file}: the database and {len(made)} made secrets: keep it as secret as they are")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@with_appcontext
def restore(file: Path) -> None:
    """Bring a backup back, where there is no job yet and no other secret was made."""
    database = _sqlite(db.engine, f'pg_restore --no-owner --dbname="$DATABASE_URL" {file}')
    try:
        found = backup.read_secrets(file, list(MADE))
        for name, secret in found.items():
            if MADE[name].exists() and MADE[name].read_text().strip() != secret:
                raise backup.Refused(f"{MADE[name]} differs from the backup's: nothing is restored")
        backup.restore(file, database)
        for name, secret in found.items():
            config.keep_secret(MADE[name], secret)
    except FAILURES as error:
        raise click.ClickException(f"not restored: {error}") from None
    flask_migrate.upgrade()
    click.echo(f"restored from {file}")


def _sqlite(engine: Engine, command: str) -> Path:
    """The path of the database; PostgreSQL has programs of its own for this."""
    if engine.dialect.name == "sqlite":
        return Path(engine.url.database or "")
    made = [str(path) for path in MADE.values() if path.exists()]
    too = f"; and keep a copy of {' '.join(made)}" if made else ""
    raise click.ClickException(f"for PostgreSQL, run: {command}{too}")


@click.command()
@click.option("--older-than", "days", required=True, type=click.FloatRange(0), metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
@with_appcontext
def prune(days: float, dry_run: bool) -> None:
    """Delete the jobs that are over or lost, of which nothing was heard for DAYS, with their callbacks."""
    which = pruning.prunable(time() - days * 86_400, parts().views.clock(db.session.connection()))
    if dry_run:
        click.echo(f"{count_all(db.session.connection(), which)} jobs would be pruned")
        return
    db.session.remove()
    pruned = 0
    for removed in pruning.prune(parts().writer, which):
        if pruned // TELL_EVERY < (pruned + removed) // TELL_EVERY:
            click.echo(f"{pruned + removed} jobs pruned so far", err=True)
        pruned += removed
    if not pruning.give_back(db.engine):
        click.echo("the file keeps its size: its space is used again", err=True)
    click.echo(f"{pruned} jobs pruned")


COMMANDS = (back_up, restore, prune)
