"""What Milepost is measured beside: raw sqlite3, and a bare epoll loop that feeds streams."""

import multiprocessing
import select
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path

from webapp.routes.middleware import CHUNK
from webapp.streams.hub import COMMENT_EVERY

BEAT = 0.25  # seconds between two rounds of comments

KEEP = (
    "INSERT INTO callbacks (job_id, number, milestone, arrived_at, sent_at, body) VALUES (?, 1, ?, ?, ?, ?)"
)
MOVE = "UPDATE attempts SET rank = rank + 1, last_signal_at = ?, change = change + 1 WHERE job_id = ?"
OPEN = (
    "INSERT INTO jobs (job_id, created_at, attempt, status) VALUES (?, ?, 1, 'provisioning')",
    "INSERT INTO attempts (job_id, number, opened_at, change, rank, contradicted, times)"
    " VALUES (?, 1, ?, 0, 0, 0, '{}')",
)


def raw_sqlite(path: Path, seconds: float, group: int) -> float:
    """Callbacks a second with sqlite3 alone: six to a job, `group` of them in each durable commit."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    stored, start = 0, time.monotonic()
    while time.monotonic() < start + seconds:
        database.execute("BEGIN IMMEDIATE")
        for number in range(stored, stored + group):
            job_id, now = f"raw-{group}-{number // 6}", time.time()
            if number % 6 == 0:
                for statement in OPEN:
                    database.execute(statement, (job_id, now))
            database.execute(KEEP, (job_id, str(number), now, now, "x" * 160))
            database.execute(MOVE, (now, job_id))
        database.execute("COMMIT")
        stored += group
    database.close()
    return stored / (time.monotonic() - start)


def bare_stream(watchers: int, message: bytes, rounds: int = 5) -> list[float]:
    """Seconds until all of the watchers have a message that an epoll loop writes to each."""
    with _fed(watchers, _serve, message) as (server, poll, sockets):
        server.recv()
        return [_round(server, poll, sockets, len(message)) for _ in range(rounds)]


def bare_rest(watchers: int, seconds: float) -> float:
    """The share of a core that a bare loop takes to send each watcher as many comments as Milepost does."""
    with _fed(watchers, _comment, seconds) as (server, poll, sockets):
        while not server.poll():
            for handle, _ in poll.poll(BEAT):
                sockets[handle].recv(262_144)
        return float(server.recv())


@contextmanager
def _fed(
    watchers: int, serve: Callable[..., None], what: object
) -> Iterator[tuple[Connection, select.epoll, dict[int, socket.socket]]]:
    """Watchers of a process that runs `serve`; what it says, and where they are read."""
    ours, theirs = multiprocessing.Pipe()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        arguments = (listener, watchers, what, theirs)
        server = multiprocessing.get_context("fork").Process(target=serve, args=arguments)
        server.start()
        poll, sockets = select.epoll(), {}
        for _ in range(watchers):
            watcher = socket.create_connection(listener.getsockname())
            sockets[watcher.fileno()] = watcher
            poll.register(watcher.fileno(), select.EPOLLIN)
        yield ours, poll, sockets
        for watcher in sockets.values():
            watcher.close()
        server.join()


def _round(server: Connection, poll: select.epoll, sockets: dict[int, socket.socket], length: int) -> float:
    start, missing = time.monotonic(), dict.fromkeys(sockets, length)
    server.send(None)
    while missing:
        for handle, _ in poll.poll():
            missing[handle] -= len(sockets[handle].recv(262_144))
            if not missing[handle]:
                del missing[handle]
    return time.monotonic() - start


def _serve(listener: socket.socket, watchers: int, message: bytes, driver: Connection) -> None:
    """Accept the watchers, then write to each of them whenever the driver says so, until one is gone."""
    accepted = [listener.accept()[0] for _ in range(watchers)]
    for watcher in accepted:
        watcher.setblocking(False)
    driver.send(None)
    poll = select.epoll()
    poll.register(driver.fileno(), select.EPOLLIN)
    poll.register(accepted[0].fileno(), select.EPOLLIN)
    while (driver.fileno(), select.EPOLLIN) in poll.poll():
        driver.recv()
        for watcher in accepted:
            watcher.send(message)


def _comment(listener: socket.socket, watchers: int, seconds: float, driver: Connection) -> None:
    """Accept the watchers, send them comments, and tell the driver what it took."""
    accepted = [listener.accept()[0] for _ in range(watchers)]
    turn, sent = cycle(accepted), 0
    start, spent = time.monotonic(), time.process_time()
    while (passed := time.monotonic() - start) < seconds:
        due = int(watchers * passed / COMMENT_EVERY)
        for watcher in islice(turn, due - sent):
            watcher.send(CHUNK)
        sent = due
        time.sleep(BEAT)
    driver.send((time.process_time() - spent) / passed)
