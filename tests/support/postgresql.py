"""A temporary PostgreSQL of the installed server programs, run as its own user where we are root."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.server import free_port, wait_until

SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "500"}
FORGETFUL = {"fsync": "off", "full_page_writes": "off"}  # of the machine's death, not of a kill


@contextmanager
def postgresql(folder: Path, **settings: str) -> Iterator["Cluster"]:
    """A cluster in an empty folder, for as long as this lasts."""
    cluster = Cluster(folder)
    cluster.create(**settings)
    try:
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """A folder with a cluster, for any process that knows the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data = folder / "data"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    @property
    def exists(self) -> bool:
        return (self.folder / "port").exists()

    def create(self, **settings: str) -> None:
        """Initialize and start it."""
        self._data.mkdir(parents=True)
        if self._as:
            self.folder.chmod(0o755)
            subprocess.run(["chown", "postgres", self._data], check=True)
        options = ["-A", "trust", "-U", "milepost", "-E", "UTF8", "--no-sync"]
        self._run("initdb", "-D", str(self._data), *options)
        port = free_port()
        with (self._data / "postgresql.conf").open("a") as configuration:
            for name, value in {**SETTINGS, "port": str(port), **settings}.items():
                configuration.write(f"{name} = '{value}'\n")
        self.start()
        (self.folder / "port").write_text(str(port))

    def start(self) -> None:
        log = str(self._data / "log")
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", log, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop")

    def new_database(self, template: str = "template1") -> str:
        """The URL of a database that is a copy of `template`."""
        name = f"milepost_{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def set(self, name: str, value: str) -> None:
        """Set what all sessions go by from their next statement on, those that are open included."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            connection.execute("SELECT pg_reload_conf()")
        # The server reads it some time later, and tells its sessions before it accepts the next connection.
        wait_until(lambda: self._has(name, value))

    def _has(self, name: str, value: str) -> bool:
        with psycopg.connect(self.url("postgres")) as connection:
            return connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)

    def url(self, database: str) -> str:
        return f"postgresql://milepost@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
        path = next((str(home / program) for home in homes if (home / program).exists()), program)
        subprocess.run([*self._as, path, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
