"""healthchecks beside Milepost: pings stored per second, and callbacks, on the same database in turn.

https://github.com/healthchecks/healthchecks, a checkout that somebody has installed; none of its code is
here. It runs as its docker/ has it for production: uwsgi with docker/uwsgi.ini (four processes, its
`sendalerts` and `sendreports` beside them), the settings of docker/.env.example, PostgreSQL. On SQLite
DB is the only other setting. A ping has a callback's body, and its check exists and is up already. That
uwsgi closes a connection after each answer, so each ping has its own.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import UUID

import psycopg
import requests
from sqlalchemy import make_url

from tests.bench.bench import Bench, Figure, Figures, in_turn
from tests.support.load import Client, heartbeat, new_jobs, request
from tests.support.server import free_port, wait_until

CHECKS = 1000
PREPARE = f"""
from uuid import UUID
from django.contrib.auth.models import User
from hc.accounts.models import Project
from hc.api.models import Check
project = Project.objects.create(owner=User.objects.create(username="bench"))
Check.objects.bulk_create(Check(project=project, code=UUID(int=n), status="up") for n in range({CHECKS}))
"""
COUNT = "from hc.api.models import Check; print(sum(check.n_pings for check in Check.objects.all()))"


class Healthchecks:
    """One healthchecks with a database of its own."""

    def __init__(self, checkout: Path, folder: Path, database: dict[str, str]) -> None:
        self.checkout, self.folder, self.port = checkout, folder, free_port()
        example = (checkout / "docker/.env.example").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in example if line and not line.startswith("#"))
        path = f"{checkout}/.venv/bin:{os.environ['PATH']}"
        ours = {"PATH": path, "ALLOWED_HOSTS": "localhost,milepost", "USE_GZIP_MIDDLEWARE": "True"}
        self.environ = settings | ours | database

    def manage(self, *arguments: str) -> str:
        command = ["python", "manage.py", *arguments]
        return subprocess.check_output(command, cwd=self.checkout, env=self.environ, text=True)

    @contextmanager
    def running(self) -> Iterator[Client]:
        """Serve it; a client of it."""
        self.manage("migrate", "--verbosity=0", "--skip-checks")
        self.manage("shell", "--verbosity=0", "--command", PREPARE)
        theirs, ini = (self.checkout / "docker/uwsgi.ini").read_text(), self.folder / "uwsgi.ini"
        theirs = theirs.replace("/opt/healthchecks", str(self.checkout))
        ini.write_text(theirs.replace("= :8000", f"= 127.0.0.1:{self.port}"))
        with (self.folder / "log").open("wb") as log:
            uwsgi = subprocess.Popen(
                ["uwsgi", ini], cwd=self.checkout, env=self.environ, stdout=log, stderr=log
            )
        client = Client(self.port, keeps_alive=False)
        try:
            wait_until(self._is_up, 60)
            yield client
        finally:
            client.close()
            uwsgi.send_signal(signal.SIGTERM)
            uwsgi.wait(30)

    def _is_up(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.port}/api/v3/status/"
            return requests.get(url, headers={"Host": "milepost"}, timeout=30).ok
        except requests.RequestException:
            return False


def peers(bench: Bench) -> Figures:
    """Stored callbacks per second by stored pings, 32 connections each."""
    if not bench.peers:
        return
    seconds = bench.seconds(5, 1)
    for database, goal in (("sqlite", ">= 10"), ("postgresql", ">= 6")):
        folder = bench.new_folder()
        with bench.milepost(database) as milepost:
            peer = Healthchecks(bench.peers, folder, _database(milepost.database_url, folder))
            with peer.running() as client:
                callbacks = partial(new_jobs, count=int(500 * seconds))
                pings = partial(_pings, count=int(2000 * seconds))
                loaded = [(milepost.client, callbacks), (client, pings)]
                (ours, theirs), answered, errors = in_turn(loaded, seconds)
                stored = int(peer.manage("shell", "--verbosity=0", "--command", COUNT))
        measure = f"peers, {database}"
        yield Figure(measure, "Milepost: callbacks stored", ours, "/s")
        yield Figure(measure, "healthchecks: pings stored", theirs, "/s")
        yield Figure(measure, "healthchecks: answered, but not stored", answered[1] - stored, "")
        yield Figure(measure, "Milepost by healthchecks", ours / theirs, "x", goal)
        yield Figure(measure, "errors", errors, "", "= 0")


def _database(url: str, folder: Path) -> dict[str, str]:
    """healthchecks' settings for a database of its own where Milepost has its."""
    if url.startswith("sqlite"):
        return {"DB": "sqlite", "DB_NAME": f"{folder}/hc.sqlite"}
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE hc")
    where = make_url(url)
    return {"DB_HOST": str(where.host), "DB_PORT": str(where.port), "DB_USER": str(where.username)}


def _pings(_: str, count: int) -> Iterator[bytes]:
    """Pings of all the checks in turn, each with a heartbeat's body."""
    for number in range(count):
        body = heartbeat(f"job-{number % CHECKS}").partition(b"\r\n\r\n")[2]
        yield request(f"/ping/{UUID(int=number % CHECKS)}", body=body)
