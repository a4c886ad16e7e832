"""A backup is one file: a tar archive of the SQLite database and of the secrets that `make run` made."""

import os
import shutil
import sqlite3
import tarfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from click import ClickException

DATABASE = "milepost.db"
LARGEST_SECRET = 4096  # bytes


def back_up(database: Path, secrets: Mapping[str, Path], to: Path) -> None:
    """Write a backup, first aside; the database may be in use. Raises ClickException and others."""
    if not database.exists():
        raise ClickException(f"there is no database at {database}")
    if to.exists() and not tarfile.is_tarfile(to):
        raise ClickException(f"{to} is there and is no backup: name another file")
    os.umask(0o077)
    with TemporaryDirectory(dir=to.parent, prefix=".milepost-") as folder:
        copy, aside = Path(folder, DATABASE), Path(folder, "backup")
        with _connected(database) as source, _connected(copy) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")
            _check(target)
        with aside.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
                for name, path in {DATABASE: copy, **secrets}.items():
                    if path.exists():
                        archive.add(path, name)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(to)


def read_secrets(file: Path, names: list[str]) -> dict[str, str]:
    """The made secrets in a backup, by name. Raises ClickException."""
    with _opened(file) as archive:
        known = [name for name in names if name in archive.getnames()]
        members = {name: archive.extractfile(name) for name in known}
        return {name: each.read(LARGEST_SECRET).decode().strip() for name, each in members.items() if each}


def restore(file: Path, database: Path) -> None:
    """Take the database out of a backup; a running server goes on with it. Raises ClickException."""
    os.umask(0o077)
    database.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=database.parent, prefix=".milepost-") as folder, _opened(file) as archive:
        # Read, not extracted: that can be told to trust nothing (`filter`) only since Python 3.11.4.
        copy, packed = Path(folder, DATABASE), archive.extractfile(DATABASE)
        if packed is None:  # a folder, for one
            raise ClickException(f"{file} is no backup of Milepost")
        with packed, copy.open("xb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        with _connected(copy) as source, _connected(database) as target:
            _check(source)
            if _tables(target) & {"jobs"} and target.execute("SELECT 1 FROM jobs LIMIT 1").fetchone():
                raise ClickException(f"{database} has jobs: nothing is restored over them")
            if "sessions" in _tables(source):
                source.execute("DELETE FROM sessions")  # who signed out since stays signed out
            target.execute("PRAGMA journal_mode=WAL")
            source.backup(target)


def _connected(path: Path) -> "closing[sqlite3.Connection]":
    return closing(sqlite3.connect(path, timeout=5, isolation_level=None))


def _check(copy: sqlite3.Connection) -> None:
    said = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    if said != "ok" or not {"jobs", "attempts", "callbacks"} <= _tables(copy):
        raise ClickException(f"this is no sound database of Milepost: {said}")


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _opened(file: Path) -> tarfile.TarFile:
    try:
        archive = tarfile.open(file)  # noqa: SIM115
        if DATABASE in archive.getnames():
            return archive
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ClickException(f"{file} cannot be read: {error}") from None
    raise ClickException(f"{file} is no backup of Milepost")
