"""The database frozen, cut off, exchanged, full or locked: nothing is lost, and health says so."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from sqlalchemy import create_engine

from tests.support import databases
from tests.support.databases import Databases
from tests.support.postgresql import Cluster
from tests.support.preloaded import Preloads
from tests.support.relay import Relay
from tests.support.server import Serve, Server, free_port, new_job_id, wait_until

pytestmark = pytest.mark.slow

ANSWERED_WITHIN = 8.0  # seconds, says the contract
AT_ONCE = 1.0  # seconds


def report(server: Server, job_id: str) -> requests.Response:
    return server.post(json.dumps({"job_id": job_id, "status": "provisioning"}).encode())


def health(server: Server) -> requests.Response:
    """Asked of the running server, which has to answer at once."""
    began = time.monotonic()
    answer = requests.get(f"{server.url}/healthz", timeout=10)
    assert time.monotonic() - began < AT_ONCE + 0.5
    return answer


def is_sick(server: Server) -> bool:
    return health(server).status_code == 503


def is_well(server: Server) -> bool:
    return health(server).status_code == 200


def file_of(server: Server) -> Path:
    return Path(server.database_url.removeprefix("sqlite:///"))


@contextmanager
def cut_off(relay: Relay, cluster: Cluster) -> Iterator[None]:
    """Every connection is half open: what is sent is swallowed."""
    relay.swallow.set()
    try:
        yield
    finally:
        relay.swallow.clear()


@contextmanager
def frozen(relay: Relay, cluster: Cluster) -> Iterator[None]:
    """All of PostgreSQL's processes are stopped: it accepts connections, and says nothing."""
    master = int((cluster.folder / "data" / "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    pids = [master, *map(int, children)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def read_only(relay: Relay, cluster: Cluster) -> Iterator[None]:
    """A standby that answers reads alone, behind connections that stay open."""
    cluster.set("default_transaction_read_only", "on")
    try:
        yield
    finally:
        cluster.set("default_transaction_read_only", "off")


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Databases]:
    """A PostgreSQL that these tests may freeze."""
    with databases.apart("postgresql") as own:
        yield own


@pytest.mark.one_database
@pytest.mark.parametrize("trouble", [cut_off, frozen, read_only])
def test_a_database_that_takes_nothing_is_a_503_in_time_and_health_says_so(
    serve: Serve, own_cluster: Databases, trouble: Callable[[Relay, Cluster], AbstractContextManager[None]]
) -> None:
    url = own_cluster.migrated()
    port = own_cluster.cluster.port
    with closing(Relay(port)) as relay:
        server = serve(DATABASE_URL=url.replace(f":{port}/", f":{relay.port}/"))
        job_id = new_job_id()
        server.report(job_id, "provisioning")
        with closing(server.events(job_id, timeout=60)) as events:
            events.next()
            with trouble(relay, own_cluster.cluster):
                for _ in range(2):
                    began = time.monotonic()
                    refused = report(server, new_job_id())
                    assert time.monotonic() - began < ANSWERED_WITHIN
                    assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
                    assert is_sick(server)
            wait_until(lambda: is_well(server))
            assert server.report(job_id, "vm_created") is False
            assert 'data-step="installing" data-state="active"' in events.next()["data"]
        said = server.log.read_text()
        assert "OperationalError" not in said and "the database is not available: " in said


@pytest.mark.one_database
def test_a_pooler_in_transaction_mode_is_refused_one_in_session_mode_works(
    serve: Serve, own_cluster: Databases, preloaded: Preloads, tmp_path: Path
) -> None:
    url = urlsplit(own_cluster.migrated())
    tmp_path.parent.parent.chmod(0o755)
    for mode in ("transaction", "session"):
        with pgbouncer(own_cluster.folder, own_cluster.cluster.port, mode) as port:
            pooled = f"postgresql://milepost@127.0.0.1:{port}{url.path}"
            if mode == "transaction":
                said = Server(tmp_path, pooled, preloaded).refuses_to_start()
                assert "transaction mode" in said and "Traceback" not in said and said.count("\n") <= 20
                continue
            server = serve(DATABASE_URL=pooled, WEB_CONCURRENCY="2")
            job_id = new_job_id()
            server.report(job_id, "provisioning")
            with closing(server.events(job_id)) as events:
                events.next()
                for step in ("vm_created", "ansible_started"):
                    server.report(job_id, step)
                    assert "steps" in events.next()["event"]


@contextmanager
def pgbouncer(folder: Path, port: int, mode: str) -> Iterator[int]:
    own = free_port()
    configuration, users = folder / f"{mode}.ini", folder / "users.txt"
    users.write_text('"milepost" ""\n')
    configuration.write_text(
        f"[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {own}\nauth_type = trust\nauth_file = {users}\npool_mode = {mode}\n"
        f"unix_socket_dir =\nlogfile = {folder / mode}.log\n"
    )
    (folder / f"{mode}.log").touch()
    (folder / f"{mode}.log").chmod(0o666)
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    process = subprocess.Popen([*as_other, "pgbouncer", "-q", str(configuration)])
    try:
        wait_until(lambda: is_listening(own))
        yield own
    finally:
        process.terminate()
        process.wait(20)


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def delete(file: Path) -> None:
    file.unlink()


def exchange(file: Path) -> None:
    """Another database comes into the place of the file, as when a copy is put back."""
    copy = file.with_name("copy.db")
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    copy.replace(file)


def delete_wal(file: Path) -> None:
    file.with_name(f"{file.name}-wal").unlink()


@pytest.mark.one_database
@pytest.mark.parametrize("change", [delete, exchange, delete_wal])
def test_what_is_answered_200_is_in_the_file_at_the_path(
    serve: Serve, own_sqlite: str, change: Callable[[Path], None]
) -> None:
    server = serve(DATABASE_URL=own_sqlite)
    before = new_job_id()
    server.report(before, "provisioning")
    link = server.link(before)
    with closing(server.events(before)) as events:
        events.next()
        change(file_of(server))
        stored = [job_id for job_id in (new_job_id() for _ in range(20)) if report(server, job_id).ok]
        if change is delete:
            assert not stored and is_sick(server) and requests.get(link, timeout=10).status_code == 503
            assert "the database file is gone" in server.log.read_text()
            return
        assert report(server, before).ok and requests.get(link, timeout=10).ok and is_well(server)
        server.report(before, "vm_created")
        assert 'data-step="installing" data-state="active"' in events.next()["data"]
    server.stop(signal.SIGKILL)
    server.start()
    assert len(stored) >= 19
    for job_id in (before, *stored):
        assert server.job(job_id)


@pytest.fixture
def own_sqlite() -> str:
    return Databases("sqlite").migrated()


@pytest.fixture
def obedient(own_sqlite: str, tmp_path: Path) -> Iterator[Server]:
    """A Milepost that the permissions of its files bind, whoever runs the tests."""
    server = Server(tmp_path, own_sqlite)
    if os.geteuid() == 0:
        without = "=-dac_override,-dac_read_search"
        server.limits = ("setpriv", f"--bounding-set{without}", f"--inh-caps{without}")
    server.start()
    try:
        yield server
    finally:
        server.stop()
        file_of(server).parent.chmod(0o700)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.one_database
def test_a_file_made_read_only_is_a_503_until_it_can_be_written_again(obedient: Server) -> None:
    job_id, cause = new_job_id(), "attempt to write a readonly database"
    beat: dict[str, object] = {"job_id": job_id, "type": "heartbeat", "sent_at": time.time()}
    obedient.report(job_id, "provisioning")
    assert obedient.post(json.dumps(beat).encode()).ok
    link = obedient.link(job_id)
    with closing(obedient.events(job_id)) as events:
        events.next()
        file_of(obedient).chmod(0o400)
        wait_until(lambda: is_sick(obedient))
        replayed = obedient.post(json.dumps(beat).encode())  # for which nothing would be written
        assert replayed.status_code == 503 and is_sick(obedient)
        refused = report(obedient, new_job_id())
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        assert is_sick(obedient) and cause in health(obedient).text
        assert requests.get(link, timeout=10).ok
        said = obedient.log.read_text()
        assert said.count(f"the database is not available: {cause}") == 2
        file_of(obedient).chmod(0o600)
        wait_until(lambda: is_well(obedient))
        assert obedient.report(job_id, "vm_created") is False
        assert 'data-step="installing" data-state="active"' in events.next()["data"]
    obedient.stop(signal.SIGKILL)
    obedient.start()
    assert obedient.states(job_id)[2] == "active"


@pytest.mark.one_database
def test_what_is_answered_200_in_a_read_only_folder_is_in_the_file(obedient: Server) -> None:
    obedient.report(before := new_job_id(), "provisioning")
    file_of(obedient).parent.chmod(0o500)
    after = new_job_id()
    assert report(obedient, after).ok and is_well(obedient)
    obedient.stop(signal.SIGKILL)
    obedient.start()
    assert obedient.job(before) and obedient.job(after) and is_well(obedient)


@pytest.mark.one_database
def test_a_long_reader_leaves_no_large_wal(serve: Serve, own_sqlite: str) -> None:
    server = serve(DATABASE_URL=own_sqlite)
    job_id, wal = new_job_id(), file_of(server).with_name("milepost.db-wal")
    server.report(job_id, "provisioning")
    with closing(sqlite3.connect(file_of(server), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        while wal.stat().st_size < 6 * 2**20:
            server.report(job_id, "heartbeat", kept="x" * 60_000)
        reader.execute("COMMIT")
    wait_until(lambda: server.report(job_id, "heartbeat") is False and wal.stat().st_size <= 4 * 2**20)


@pytest.mark.one_database
def test_pages_and_streams_stay_quick_beside_a_lock_of_another_process(serve: Serve, own_sqlite: str) -> None:
    server = serve(DATABASE_URL=own_sqlite)
    job_id = new_job_id()
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    with closing(sqlite3.connect(file_of(server), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        waiting = Thread(target=report, args=(server, new_job_id()))
        waiting.start()
        for _ in range(5):
            began = time.monotonic()
            assert requests.get(link, timeout=10).ok
            with closing(server.events(job_id)) as events:
                events.next()
            assert time.monotonic() - began < AT_ONCE
        wait_until(lambda: is_sick(server))
        other.execute("COMMIT")
        waiting.join()
    wait_until(lambda: is_well(server))


@pytest.mark.one_database
def test_a_schema_that_cannot_store_is_sick_and_stops_the_start(
    serve: Serve, own_sqlite: str, preloaded: Preloads, tmp_path: Path
) -> None:
    server = serve(DATABASE_URL=own_sqlite)
    with closing(sqlite3.connect(file_of(server), isolation_level=None)) as other:
        other.execute("ALTER TABLE attempts RENAME COLUMN rank TO ranking")
    wait_until(lambda: is_sick(server))
    assert "rank" in health(server).text
    said = Server(tmp_path, own_sqlite, preloaded).refuses_to_start()
    assert "no such column" in said and "Traceback" not in said and said.count("\n") <= 20


@pytest.mark.one_database
def test_sqlite_is_durable_at_each_commit(own_sqlite: str) -> None:
    from webapp.storage.database import engine_options, prepare  # what no kill can show

    engine = create_engine(own_sqlite, **engine_options(own_sqlite))
    prepare(engine)
    with engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "fullfsync", "auto_vacuum")
        }
    engine.dispose()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "fullfsync": 0, "auto_vacuum": 2}


@pytest.mark.one_database
def test_a_new_postgresql_reads_no_table_from_end_to_end(serve: Serve) -> None:
    server = serve(DATABASE_URL=Databases("postgresql").migrated())
    job_ids = [new_job_id() for _ in range(100)]
    for step in ("provisioning", "vm_created"):
        for job_id in job_ids:
            server.report(job_id, step)
    scans = (
        "SELECT sum(seq_scan), sum(idx_scan) FROM pg_stat_user_tables WHERE relname IN ('jobs', 'attempts')"
    )

    def read() -> tuple[int, int]:
        return connection.execute(scans).fetchone() or (0, 0)

    with psycopg.connect(server.database_url, autocommit=True) as connection:
        wait_until(lambda: read()[1] > 200)  # it counts a little later
        assert read()[0] < 20
