"""What goes wrong around Milepost, and that watchers and runners get over it."""

import json
import os
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from playwright.sync_api import Browser, expect
from sqlalchemy import Executable, create_engine, literal, select

from tests.support.databases import Databases
from tests.support.load import Client, heartbeat, request, resident
from tests.support.server import Serve, Server, wait_until
from webapp.storage.tables import attempts, jobs

pytestmark = pytest.mark.slow

SILENT = 2000  # clients
DEAF = 50  # clients
CHANGES = 50
MEMORY = 8 * 2**20  # bytes


def provisioning(job_id: str, step: str | None = None) -> bytes:
    return json.dumps({"job_id": job_id, "status": "provisioning", "step": step}).encode()


@contextmanager
def unavailable(server: Server, databases: Databases) -> Iterator[None]:
    """While nobody can write to the server's database."""
    if server.database_url.startswith("sqlite"):
        path = server.database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("COMMIT")
    else:
        databases.cluster.stop()
        yield
        databases.cluster.start()


def test_without_its_database_it_answers_503_and_then_goes_on_by_itself(
    serve: Serve, own_database: Databases, job_id: str
) -> None:
    server = serve(DATABASE_URL=own_database.migrated())
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    with closing(server.events(job_id)) as events:
        assert 'data-step="creating" data-state="active"' in events.next()["data"]
        with unavailable(server, own_database):
            refused = server.post(provisioning(job_id, "vm_created"))
            assert (refused.status_code, set(refused.json())) == (503, {"error"})
            assert int(refused.headers["Retry-After"]) > 0
            if "postgresql" in server.database_url:  # on SQLite readers go on beside a writer
                for url in (link, f"{link}/steps", f"{link}/events", f"{server.url}/healthz"):
                    assert requests.get(url, timeout=30).status_code == 503
        assert server.post(provisioning(job_id, "vm_created")).json()["duplicate"] is False
        assert requests.get(link, timeout=30).status_code == 200
        assert 'data-step="installing" data-state="active"' in events.next()["data"]


@contextmanager
def another_writing(server: Server, *statements: Executable) -> Iterator[None]:
    """While another's transaction has run these; it commits once somebody waits for it."""
    engine = create_engine(server.database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as other:
        for statement in statements:
            other.execute(statement)
        yield
        if engine.name == "postgresql":  # SQLite does not tell
            wait_until(lambda: is_waited_for(server))
    engine.dispose()


def is_waited_for(server: Server) -> bool:
    """Whether somebody waits for a lock in the server's PostgreSQL."""
    with psycopg.connect(server.database_url) as connection:
        waiting = (
            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return connection.execute(waiting).fetchone() is not None


def test_who_waited_for_another_writer_finds_the_attempt_that_it_opened(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    link = server.link(job_id)
    columns = [literal(2) if column.name == "number" else column for column in attempts.c]
    opened = attempts.insert().from_select([*attempts.c], select(*columns).where(attempts.c.job_id == job_id))
    turned = jobs.update().where(jobs.c.job_id == job_id).values(attempt=2)
    with ThreadPoolExecutor() as pool:
        with another_writing(server, opened, turned):
            revoked = pool.submit(server.api, f"/api/jobs/{job_id}/revoke", method="POST")
        assert revoked.result().status_code == 200
    assert requests.get(link, timeout=30).status_code == 404
    assert server.page(job_id)["attempt"] == 2


def test_a_callback_that_waited_for_another_writer_takes_no_step_back(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    moved = attempts.update().where(attempts.c.job_id == job_id).values(rank=3, change=attempts.c.change + 1)
    with ThreadPoolExecutor() as pool:
        with another_writing(server, moved):
            told = pool.submit(server.post, provisioning(job_id, "vm_created"))
        assert told.result().status_code == 200
    states = [step["state"] for step in server.page(job_id)["steps"]]
    assert states == ["completed", "completed", "completed", "active", "pending"]


@pytest.mark.one_database
def test_on_postgresql_a_job_is_locked_before_its_attempt(serve: Serve, job_id: str) -> None:
    """In the other order two who wait for a third would wait for each other."""
    server = serve(DATABASE_URL=Databases("postgresql").migrated())
    server.report(job_id, "provisioning")
    first, other = (psycopg.connect(server.database_url) for _ in range(2))
    with first, other, ThreadPoolExecutor() as pool:
        first.execute("SELECT FROM attempts FOR UPDATE")
        told = pool.submit(server.post, provisioning(job_id, "vm_created"))
        wait_until(lambda: is_waited_for(server))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SELECT FROM jobs FOR UPDATE NOWAIT")
        first.rollback()
        assert told.result().status_code == 200


@contextmanager
def failing_commits(server: Server) -> Iterator[None]:
    """While statements succeed, but no commit: a file that cannot grow, a constraint checked at the end."""
    if server.database_url.startswith("sqlite"):
        log = Path(server.database_url.removeprefix("sqlite:///") + "-wal")
        for pid in server.workers():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
        yield
        for pid in server.workers():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
    with psycopg.connect(server.database_url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no'; END$$"
        )
        connection.execute(
            "CREATE CONSTRAINT TRIGGER refused AFTER INSERT ON callbacks INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        yield
        connection.execute("DROP FUNCTION refuse CASCADE")


def test_a_commit_that_fails_is_never_acknowledged(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    version = server.page(job_id)["version"]
    with failing_commits(server):
        assert server.post(provisioning(job_id, "vm_created")).status_code == 503
        if "sqlite" in server.database_url:  # as on a full disk; there the rule is of one table alone
            assert requests.get(f"{server.url}/healthz", timeout=30).status_code == 503
    assert server.page(job_id)["version"] == version
    assert server.post(provisioning(job_id, "vm_created")).json()["duplicate"] is False


@pytest.mark.one_database
def test_a_frame_that_fails_is_logged_with_its_job_and_the_next_is_shown(tmp_path: Path, job_id: str) -> None:
    server = Server(tmp_path, Databases("sqlite").migrated())  # its line has a traceback
    server.start()
    try:
        server.report(job_id, "provisioning")
        with closing(server.events(job_id)) as events:
            events.next()
            with closing(sqlite3.connect(server.database_url.removeprefix("sqlite:///"))) as other, other:
                other.execute("""UPDATE attempts SET usual = '{"creating": 5}'""")  # of no known shape
            server.report(job_id, "heartbeat", note="5 of 8")
            failed = wait_until(
                lambda: [line for line in log(server) if line["event"] == "no frame of a job"]
            )
            assert {(line["level"], line["job"]) for line in failed} == {("error", job_id)}
            server.report(job_id, "vm_created")
            assert 'data-step="installing" data-state="active"' in events.next()["data"]
    finally:
        server.stop()


def log(server: Server) -> list[dict[str, object]]:
    """Each line is an event; what was raised stands in the same line."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


@pytest.mark.one_database
def test_a_page_whose_worker_is_killed_comes_back_with_the_newest_state(
    serve: Serve, browser: Browser, job_id: str
) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    page = browser.new_page()
    with page.expect_request(lambda asked: asked.url.endswith("/events")):
        page.goto(server.link(job_id))
    expect(page.locator('[data-step="creating"]')).to_have_attribute("data-state", "active")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: worker not in server.workers() and server.workers() and server.is_up())
    server.report(job_id, "vm_created")
    expect(page.locator('[data-step="installing"]')).to_have_attribute("data-state", "active", timeout=3000)
    page.close()


@pytest.mark.one_database
def test_streams_whose_worker_is_killed_return_with_the_newest_state(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    with ExitStack() as streams:
        opened = [streams.enter_context(closing(server.events(job_id))) for _ in range(20)]
        for events in opened:
            events.next()
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        for events in opened:
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                events.next()
        server.report(job_id, "vm_created")
        for _ in opened:
            back = streams.enter_context(closing(server.events(job_id)))
            assert 'data-step="installing" data-state="active"' in back.next()["data"]


@pytest.mark.one_database
def test_clients_that_connect_and_say_nothing_keep_nobody_waiting(server: Server, job_id: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as silent:
        silent.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(SILENT):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
        wait_until(lambda: server.open_files() >= SILENT)
        assert server.report(job_id, "provisioning") is False
        assert server.states(job_id)[1] == "active"
        with closing(server.events(job_id)) as events:
            assert events.next()["event"] == "steps"
    wait_until(lambda: server.open_files() < SILENT / 10)


@contextmanager
def deaf(server: Server, path: str) -> Iterator[socket.socket]:
    """A client that opens a stream and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(request(f"{path}/events"))
        yield client


@pytest.mark.one_database
def test_a_client_that_stops_reading_costs_little_and_is_let_go_of(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    path = urlsplit(server.link(job_id)).path
    with closing(Client(server.port)) as reader:
        reader.open_streams([path])
        files = server.open_files()
        with ExitStack() as clients:
            for _ in range(DEAF):
                clients.enter_context(deaf(server, path))
            wait_until(lambda: server.open_files() >= files + DEAF)
            memory = resident(server.workers())
            reader.arrivals.clear()
            load = reader.pace(
                [heartbeat(job_id, time.time() + n, note=f"{n}") for n in range(CHANGES)], rate=10
            )
            assert (len(load.latencies), load.errors) == (CHANGES, 0)
            newest = server.page(job_id)["version"]
            wait_until(lambda: reader.listen(0.05)[-1].version == newest)
            assert len(reader.arrivals) > 5
            assert resident(server.workers()) - memory < MEMORY
        server.report(job_id, "vm_created")
        wait_until(lambda: server.open_files() < files + DEAF / 2)  # the database has some, too
