"""Progress pages after a restart, as browsers and the page's script make them, and who else asks meanwhile.

What static/page.js does, with its times, in one thread with epoll: the browser opens a lost stream again
after the `retry` that it was last told, and says what it has; a stream that did not begin is opened anew
after a pause that doubles, and a poll tells whether there is a connection at all. A page has one poll at
a time and gives it up after ten seconds, so it holds two connections at most, and most of the time one.
"""

import heapq
import itertools
import multiprocessing
import random
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.support.load import heartbeat, request

NEVER = float("inf")
POLLS = (4.0, 5.0)  # seconds between two polls
POLLS_HEARING = (90.0, 91.0)  # seconds
GIVES_UP_AFTER = 10.0  # seconds, of a poll
TURN = 0.15  # seconds that a page asks other pages whether it may have a stream
TICKS = 10  # parts of a second: each page looks at its clock once a second, not all at once
RETRY, VERSION = re.compile(rb"\nretry: (\d+)\n"), re.compile(rb"\nid: (\w+)\n")
ASK_EVERY = 0.1  # seconds between two callbacks, and two looks at /healthz


@dataclass(slots=True, eq=False)
class Page:
    """A page in a browser; its times are monotonic seconds."""

    path: str
    version: str = ""
    retry: float = 1.0
    stream: "Exchange | None" = None  # open, on its way, or to be opened again by the browser
    poll: "Exchange | None" = None
    hears: bool = False
    tells_all: bool = False
    is_offline: bool = False
    is_back: bool = False
    failures: int = 0
    connect_at: float = NEVER
    poll_at: float = NEVER
    verify_at: float = NEVER


@dataclass(slots=True, eq=False)
class Exchange:
    """One connection with one request; `ended` hears of its end, with what came."""

    socket: socket.socket
    request: bytes
    ended: Callable[["Exchange"], None]
    heard: Callable[[bytes], None] | None = None  # where it does not wait for the end
    is_sent: bool = False
    answer: bytes = b""
    began: float = field(default_factory=time.monotonic)


class Asked(NamedTuple):
    """What somebody asked: "callback" or "healthz", when (monotonic), the seconds it took, whether 200."""

    name: str
    began: float
    seconds: float
    is_good: bool


class Loop:
    """Exchanges with one server, in one thread; `most` is how many there were at once."""

    def __init__(self, port: int) -> None:
        self.port, self.most = port, 0
        self._poll = select.epoll()
        self._open: dict[int, Exchange] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def turn_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Do what is due and read what has come, until then; fails after so many seconds."""
        until = time.monotonic() + seconds
        while not holds():
            now = time.monotonic()
            assert now < until, f"still waiting after {seconds} s"
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            patience = min(self._due[0][0] - now, 0.05) if self._due else 0.05
            for handle, events in self._poll.poll(max(patience, 0)):
                if exchange := self._open.get(handle):
                    self._go_on(exchange, events)

    def close(self) -> None:
        for exchange in self._open.values():
            exchange.socket.close()
        self._poll.close()

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), what))

    def _begin(self, exchange: Exchange) -> None:
        self._open[exchange.socket.fileno()] = exchange
        self.most = max(self.most, len(self._open))
        self._poll.register(exchange.socket.fileno(), select.EPOLLOUT)

    def _go_on(self, exchange: Exchange, events: int) -> None:
        handle, data = exchange.socket.fileno(), b""
        with suppress(OSError):  # refused or reset: it ends without an answer
            if not exchange.is_sent and not events & (select.EPOLLERR | select.EPOLLHUP):
                exchange.socket.sendall(exchange.request)
                exchange.is_sent = True
                self._poll.modify(handle, select.EPOLLIN)
                return
            data = exchange.socket.recv(262_144)
        if not data:
            self._end(exchange)
        elif exchange.heard:
            exchange.heard(data)
        else:
            exchange.answer += data

    def _end(self, exchange: Exchange) -> None:
        self._poll.unregister(exchange.socket.fileno())
        del self._open[exchange.socket.fileno()]
        exchange.socket.close()
        exchange.ended(exchange)


class Asker(Loop):
    """Sends a callback and looks at /healthz now and then, each on a connection of its own."""

    def __init__(self, port: int, job_id: str, tell: Callable[[Asked], None]) -> None:
        super().__init__(port)
        self._job_id, self._tell = job_id, tell
        self._ask()

    def _ask(self) -> None:
        requests = {"callback": heartbeat(self._job_id, time.time()), "healthz": request("/healthz")}
        for name, data in requests.items():
            began = time.monotonic()

            def ended(exchange: Exchange, name: str = name, began: float = began) -> None:
                if exchange.answer:
                    is_good = exchange.answer.startswith(b"HTTP/1.1 200")
                    self._tell(Asked(name, began, time.monotonic() - began, is_good))

            data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            self._begin(Exchange(_connecting(self.port), data, ended))
        self._later(ASK_EVERY, self._ask)


@contextmanager
def asking(port: int, job_id: str) -> Iterator[Callable[[], list[Asked]]]:
    """Somebody else asks meanwhile, from a process of its own: what was answered so far."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_ask, args=(port, job_id, theirs), daemon=True
    )
    process.start()
    answered: list[Asked] = []

    def so_far() -> list[Asked]:
        while ours.poll():
            answered.append(ours.recv())
        return answered

    yield so_far
    process.terminate()
    process.join()


def _ask(port: int, job_id: str, parent: Connection) -> None:
    Asker(port, job_id, parent.send).turn_until(lambda: False, NEVER)


class Pages(Loop):
    """The pages of one server."""

    def __init__(self, port: int, paths: list[str]) -> None:
        super().__init__(port)
        self.pages = [Page(path) for path in paths]
        self.back = 0

    def open(self) -> None:
        """Open all streams, spread over some seconds, and wait until each has its first frame."""
        for number, page in enumerate(self.pages):
            self._later(number / 500, lambda page=page: self._listen(page))  # type: ignore[misc]
        self.turn_until(lambda: self.back == len(self.pages), 120)

    def forget(self) -> None:
        """From now on a page is back when its next stream has begun; until it is lost, all are at rest."""
        self.back = 0
        for page in self.pages:
            page.is_back, page.poll_at, page.verify_at, page.tells_all = False, NEVER, NEVER, True
        self._tick(0)

    def _tick(self, part: int) -> None:
        self._later(1 / TICKS, lambda: self._tick((part + 1) % TICKS))
        now = time.monotonic()
        for page in self.pages[part::TICKS]:
            if page.poll and now > page.poll.began + GIVES_UP_AFTER:
                page.poll.answer = b""
                self._end(page.poll)
            if now > page.connect_at and not page.stream:
                self._connect(page, now)
            if now > min(page.poll_at, page.verify_at):
                self._ask_anew(page, now)

    def _connect(self, page: Page, now: float) -> None:
        page.connect_at = now + random.uniform(20, 40)
        if not page.is_offline:
            page.poll_at = now + 10
        self._later(TURN, lambda: self._listen(page))

    def _listen(self, page: Page, headers: str = "") -> None:
        def heard(data: bytes) -> None:
            if page.stream and data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
                self._end(page.stream)
            else:
                self._hear(page, data)

        def ended(_: Exchange) -> None:
            self._lost(page, time.monotonic())

        asked = request(f"{page.path}/events", headers)
        page.stream = Exchange(_connecting(self.port), asked, ended, heard)
        self._begin(page.stream)

    def _hear(self, page: Page, data: bytes) -> None:
        if retry := RETRY.search(data):
            page.retry = int(retry[1]) / 1000
        if not (version := VERSION.search(data)):
            return
        page.version = version[1].decode()
        now = time.monotonic()
        if not page.hears and not page.tells_all:
            page.verify_at = now + random.uniform(3, 5)
        page.hears, page.is_offline, page.failures, page.poll_at = True, False, 0, now + 90
        self.back += not page.is_back
        page.is_back = True

    def _lost(self, page: Page, now: float) -> None:
        page.verify_at = NEVER
        if page.hears:
            page.hears, page.poll_at = False, now + random.uniform(6, 9)
            self._later(page.retry, lambda: self._listen(page, f"Last-Event-ID: {page.version}"))
            return
        pause = min(2**page.failures, 32)
        page.stream, page.failures = None, page.failures + 1
        page.connect_at, page.poll_at = now + random.uniform(pause / 2, pause * 2), now + random.random()

    def _ask_anew(self, page: Page, now: float) -> None:
        page.verify_at = NEVER
        page.poll_at = now + random.uniform(*(POLLS_HEARING if page.hears else POLLS))
        if page.poll:
            return

        def ended(poll: Exchange) -> None:
            page.poll = None
            if not poll.answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 204")):
                page.is_offline = True
                return
            page.tells_all |= page.hears
            if page.is_offline:
                page.is_offline, page.connect_at = False, 0.0

        data = request(f"{page.path}/steps?after={page.version}", "Connection: close")
        page.poll = Exchange(_connecting(self.port), data, ended)
        self._begin(page.poll)


def _connecting(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.connect_ex(("127.0.0.1", port))
    return connection
