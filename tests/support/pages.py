"""Progress pages after a restart, as browsers and the page's script make them, and who else asks meanwhile.

A page that loses its stream polls at once, opens the stream again after the `retry` that it was last
told, and polls every four to six seconds until it has it. One thread with epoll.
"""

import heapq
import itertools
import random
import re
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.support.load import heartbeat, request

RETRY = re.compile(rb"\nretry: (\d+)\n")
ASK_EVERY = 0.1  # seconds between two callbacks, and two looks at /healthz


@dataclass(slots=True, eq=False)
class Page:
    path: str
    retry: float = 1.0
    stream: "Exchange | None" = None
    is_back: bool = False


@dataclass(slots=True, eq=False)
class Exchange:
    """One connection with one request; `ended` hears of its end, with what came."""

    socket: socket.socket
    request: bytes
    ended: Callable[["Exchange"], None]
    page: Page | None = None
    is_sent: bool = False
    answer: bytes = b""


@dataclass
class Pages:
    """The pages of one server; `asked` are the seconds that a callback and /healthz took, by name.

    Only what was asked after `since` (monotonic seconds) counts.
    """

    port: int
    paths: list[str]
    asked: dict[str, list[float]] = field(default_factory=lambda: {"callback": [], "healthz": []})

    def __post_init__(self) -> None:
        self._poll = select.epoll()
        self._open: dict[int, Exchange] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.pages = [Page(path) for path in self.paths]
        self.back, self.since = 0, 0.0

    def open(self) -> None:
        """Open all streams, spread over some seconds, and wait until each has its first frame."""
        for number, page in enumerate(self.pages):
            self._later(number / 500, lambda page=page: self._listen(page))  # type: ignore[misc]
        self.turn_until(lambda: self.back == len(self.pages), 120)

    def forget(self) -> None:
        """From now on a page is back when its next stream has begun."""
        self.back = 0
        for page in self.pages:
            page.is_back = False

    def turn_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Do what is due and read what has come, until then; fails after so many seconds."""
        until = time.monotonic() + seconds
        while not holds():
            now = time.monotonic()
            assert now < until, f"{self.back} of {len(self.pages)} pages are back after {seconds} s"
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            patience = min(self._due[0][0] - now, 0.05) if self._due else 0.05
            for handle, events in self._poll.poll(max(patience, 0)):
                if exchange := self._open.get(handle):
                    self._go_on(exchange, events)

    def ask(self, job_id: str) -> None:
        """Send a callback and look at /healthz now and then, each on a connection of its own."""
        requests = {"callback": heartbeat(job_id, time.time()), "healthz": request("/healthz")}
        for name, data in requests.items():
            began = time.monotonic()

            def ended(exchange: Exchange, name: str = name, began: float = began) -> None:
                if exchange.answer and began >= self.since:
                    assert exchange.answer.startswith(b"HTTP/1.1 200"), exchange.answer
                    self.asked[name].append(time.monotonic() - began)

            data = data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            self._begin(Exchange(_connecting(self.port), data, ended))
        self._later(ASK_EVERY, lambda: self.ask(job_id))

    def close(self) -> None:
        for exchange in self._open.values():
            exchange.socket.close()
        self._poll.close()

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), what))

    def _begin(self, exchange: Exchange) -> None:
        self._open[exchange.socket.fileno()] = exchange
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
            self._poll.unregister(handle)
            del self._open[handle]
            exchange.socket.close()
            exchange.ended(exchange)
        elif exchange.page and exchange.page.stream is exchange:
            self._hear(exchange.page, data)
        else:
            exchange.answer += data

    def _hear(self, page: Page, data: bytes) -> None:
        if retry := RETRY.search(data):
            page.retry = int(retry[1]) / 1000
        if b"event: steps" in data and not page.is_back:
            page.is_back = True
            self.back += 1

    def _listen(self, page: Page) -> None:
        def ended(stream: Exchange) -> None:
            if stream.is_sent:  # it was open: the script polls at once
                self._ask_anew(page)
            self._later(page.retry, lambda: self._listen(page))

        page.stream = Exchange(_connecting(self.port), request(f"{page.path}/events"), ended, page)
        self._begin(page.stream)

    def _ask_anew(self, page: Page) -> None:
        data = request(f"{page.path}/steps?after=x", "Connection: close")
        self._begin(Exchange(_connecting(self.port), data, lambda _: None))

        def again() -> None:
            if not page.is_back:
                self._ask_anew(page)

        self._later(random.uniform(4, 6), again)


def _connecting(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.connect_ex(("127.0.0.1", port))
    return connection
