"""The databases of one run of the tests: migrated once, then copied for each server.

All processes of a run share one folder: the template of SQLite, and a PostgreSQL that the first
test to need one starts.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from tests.support import growth
from tests.support.postgresql import FORGETFUL, Cluster
from tests.support.server import Server

FOLDER = "MILEPOST_TESTS_FOLDER"  # the environment variable that tells the other processes of a run


def open_run() -> None:
    """Make the folder of this run."""
    os.environ[FOLDER] = str(_folder())


def close_run() -> None:
    """Stop what the run has started, and remove its folder."""
    _remove(Path(os.environ.pop(FOLDER)))


@contextmanager
def apart(kind: str) -> Iterator["Databases"]:
    """Databases for one test, which may stop their cluster."""
    folder = _folder()
    try:
        yield Databases(kind, folder)
    finally:
        _remove(folder)


class Databases:
    """Databases of one kind, `sqlite` or `postgresql`."""

    def __init__(self, kind: str, folder: Path | None = None) -> None:
        self.kind = kind
        self.folder = folder or Path(os.environ[FOLDER])
        self.cluster = Cluster(self.folder / "postgresql")

    def new(self) -> str:
        """The URL of an empty database."""
        return self._cluster().new_database() if self.kind == "postgresql" else self._new_file()

    def migrated(self) -> str:
        """The URL of a database with Milepost's newest schema."""
        return self._copy(self._template("migrated", self._migrate))

    def grown(self, jobs: int) -> str:
        """The URL of a database in which so many jobs have ended."""

        def grow() -> str:
            url = self.migrated()
            growth.fill(url, jobs)
            return url

        return self._copy(self._template(f"grown-{jobs}", grow))

    def _migrate(self) -> str:
        url = self.new()
        Server(self.folder, url).flask("db", "upgrade")
        return url

    def _copy(self, template: str) -> str:
        if self.kind == "postgresql":
            return self._cluster().new_database(template.rpartition("/")[2])
        url = self._new_file()
        shutil.copyfile(_path(template), _path(url))
        return url

    def _new_file(self) -> str:
        return f"sqlite:///{tempfile.mkdtemp(dir=self.folder)}/milepost.db"

    def _cluster(self) -> Cluster:
        with self._alone("cluster"):
            if not self.cluster.exists:
                self.cluster.create(**FORGETFUL)
        return self.cluster

    def _template(self, name: str, make: Callable[[], str]) -> str:
        """The URL of a database that is made once in a run, and only copied."""
        known = self.folder / f"{name}-{self.kind}"
        with self._alone(known.name):
            if not known.exists():
                known.write_text(make())
        return known.read_text()

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One process of the run at a time."""
        with (self.folder / f"{what}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def age_dispatch(server: Server, job_id: str) -> None:
    """As if the job's dispatch had been asked for a minute ago."""
    engine = create_engine(server.database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        earlier = text("UPDATE attempts SET asked_at = asked_at - 60 WHERE job_id = :job_id")
        assert connection.execute(earlier, {"job_id": job_id}).rowcount == 1
    engine.dispose()


def _path(url: str) -> str:
    return url.removeprefix("sqlite:///")


def _folder() -> Path:
    """A new one, open to PostgreSQL's user, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="milepost-tests-"))
    folder.chmod(0o755)
    return folder


def _remove(folder: Path) -> None:
    cluster = Cluster(folder / "postgresql")
    if cluster.exists:
        cluster.stop("immediate")
    shutil.rmtree(folder)


def execute(url: str, *statements: str) -> None:
    """Run statements beside the server of this database."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def scalar(url: str, statement: str) -> Any:
    """What a statement finds beside the server of this database."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        found = connection.scalar(text(statement))
    engine.dispose()
    return found
