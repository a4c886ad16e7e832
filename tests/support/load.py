"""One thread with epoll that sends all of the load and reads all of the streams.

Raw sockets and requests made beforehand: the driver has to cost much less than the server, and one
clock has to see a callback leave and its fragment arrive.
"""

import itertools
import json
import os
import re
import resource
import select
import socket
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.server import CALLBACKS, sign

OPENED_AT_ONCE = 256
_EVENT = re.compile(rb"event: (?:steps|alive)\nid: (\w+)\n")
MILESTONES = ("provisioning", "vm_created", "network_configured", "ansible_started", "ansible_complete")


def open_files() -> int:
    """Raise the limit of open files as far as this user may; the limit now."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def milestone(job_id: str, name: str) -> bytes:
    """A milestone's callback, as one HTTP request."""
    status = name if name in ("running", "failed") else "provisioning"
    step = {} if name in (status, "provisioning") else {"step": name}
    return callback({"job_id": job_id, "status": status, **step})


def heartbeat(job_id: str, sent_at: float | None = None, note: str = "") -> bytes:
    """A heartbeat's callback, as one HTTP request; one with a new note changes what is shown."""
    return callback({"job_id": job_id, "type": "heartbeat", "note": note}, sent_at)


def callback(said: dict[str, object], sent_at: float | None = None) -> bytes:
    """A signed callback with what the sender adds, as one HTTP request."""
    run = {"workflow_run_id": "16012345678", "run_attempt": 1, "sent_at": sent_at or time.time()}
    body = json.dumps(said | run).encode()
    return request(CALLBACKS, f"X-Signature: {sign(body)}\r\nContent-Type: application/json", body)


def request(path: str, headers: str = "", body: bytes | None = None) -> bytes:
    """An HTTP/1.1 request; a GET where there is no body."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: milepost"]
    lines += [headers] if headers else []
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def new_jobs(prefix: str, count: int) -> Iterator[bytes]:
    """The milestones of `count` new jobs, 64 jobs at a time side by side."""
    for first in range(0, count, 64):
        for name in (*MILESTONES, "running"):
            for number in range(first, min(first + 64, count)):
                yield milestone(f"{prefix}-{number}", name)


@dataclass(slots=True)
class Load:
    """What came back: `latencies` in seconds, of answers with status 200."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: int = 0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        return quantile(self.latencies, share)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else float("nan")


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


@dataclass(slots=True, eq=False)
class _Connection:
    """Keep-alive, one request at a time."""

    socket: socket.socket
    sent_at: float = 0.0
    tag: int = -1
    answer: bytes = b""


@dataclass(slots=True, eq=False)
class _Stream:
    socket: socket.socket
    number: int
    rest: bytes = b""


@dataclass(slots=True, frozen=True)
class Arrival:
    """What a stream received: which stream, of which version, when (monotonic seconds)."""

    stream: int
    version: str
    at: float


@dataclass(slots=True, frozen=True)
class Sent:
    """A callback that was sent: its tag, when, and from which local port."""

    tag: int
    at: float
    port: int


class Client:
    """Connections and streams to one server, which may close a connection after each answer."""

    def __init__(self, port: int, keeps_alive: bool = True) -> None:
        self.port = port
        self._keeps_alive = keeps_alive
        self.arrivals: list[Arrival] = []
        self.sent: list[Sent] = []
        self.ended = 0  # streams that the server closed
        self._poll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._free: deque[_Connection] = deque()
        self._streams: dict[int, _Stream] = {}
        self._load = Load()

    def close(self) -> None:
        sockets = [one.socket for one in self._connections.values()]
        for open in sockets + [one.socket for one in self._streams.values()]:
            open.close()
        self._poll.close()

    def open_streams(self, paths: Sequence[str], seen: dict[str, str] | None = None) -> None:
        """Open a stream for each path, and wait for its first event; `seen` are versions, by path."""
        for first in range(0, len(paths), OPENED_AT_ONCE):
            batch = paths[first : first + OPENED_AT_ONCE]
            wanted = len(self.arrivals) + len(batch)
            for path in batch:
                stream = _Stream(self._connect(), len(self._streams))
                self._streams[stream.socket.fileno()] = stream
                known = f"\r\nLast-Event-ID: {seen[path]}" if seen else ""
                stream.socket.sendall(request(f"{path}/events", f"Accept: text/event-stream{known}"))
            until = time.monotonic() + 60
            while len(self.arrivals) < wanted and time.monotonic() < until:
                self._turn(1.0)
            assert len(self.arrivals) >= wanted, "a stream did not begin"

    def stream_ports(self) -> dict[int, int]:
        """The local port of each stream."""
        return {s.number: s.socket.getsockname()[1] for s in self._streams.values()}

    def ports(self) -> list[int]:
        """The local ports of the connections that carry requests."""
        return [connection.socket.getsockname()[1] for connection in self._connections.values()]

    def storm(self, requests: Iterable[bytes], seconds: float, connections: int = 32) -> Load:
        """Each connection sends the next request when it has its answer."""
        self._load, queue = Load(), iter(requests)
        self._turn(0)  # the server may have closed what was idle
        start = time.monotonic()
        while (now := time.monotonic()) < start + seconds:
            self._widen(connections)
            ready = list(itertools.islice(queue, len(self._free)))
            for connection, one in zip(self._take(len(ready)), ready, strict=True):
                self._send(connection, one, now)
            if len(self._free) == len(self._connections):
                break  # nothing is left to be sent
            self._turn(1.0)
        return self._finish(start)

    def pace(self, requests: Iterable[bytes], rate: float, connections: int = 8) -> Load:
        """One request each 1/`rate` seconds, whatever the server does; timed from when it was due."""
        self._load = Load()
        self._turn(0)
        start = time.monotonic()
        for number, one in enumerate(requests):
            due = start + number / rate
            while (now := time.monotonic()) < due:
                self._turn(due - now)
            self._widen(connections if self._free else len(self._connections) + 1)
            self._send(self._take(1)[0], one, due, number)
        return self._finish(start)

    def listen(self, seconds: float, until: int | None = None) -> Sequence[Arrival]:
        """Only read, for so long or until there are so many arrivals; all arrivals."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and (until is None or len(self.arrivals) < until):
            self._turn(end - now)
        return self.arrivals

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(connection.fileno(), select.EPOLLIN)
        return connection

    def _widen(self, connections: int) -> None:
        while len(self._connections) < connections:
            connection = _Connection(self._connect())
            self._connections[connection.socket.fileno()] = connection
            self._free.append(connection)

    def _take(self, most: int) -> list[_Connection]:
        return [self._free.popleft() for _ in range(min(most, len(self._free)))]

    def _send(self, connection: _Connection, data: bytes, at: float, tag: int = -1) -> None:
        connection.sent_at, connection.tag, connection.answer = at, tag, b""
        try:
            connection.socket.sendall(data)
        except OSError:
            self._lose(connection)
            return
        if tag >= 0:
            self.sent.append(Sent(tag, time.monotonic(), connection.socket.getsockname()[1]))

    def _finish(self, start: float) -> Load:
        end = time.monotonic() + 30
        while len(self._free) < len(self._connections) and time.monotonic() < end:
            self._turn(1.0)
        self._load.seconds = time.monotonic() - start
        self._load.errors += len(self._connections) - len(self._free)
        return self._load

    def _turn(self, patience: float) -> None:
        """Read whatever has arrived."""
        for handle, _ in self._poll.poll(max(patience, 0)):
            if stream := self._streams.get(handle):
                self._hear(stream)
            elif connection := self._connections.get(handle):
                self._answered(connection)

    def _hear(self, stream: _Stream) -> None:
        data = _receive(stream.socket)
        now = time.monotonic()
        if not data:
            self.ended += 1
            del self._streams[stream.socket.fileno()]
            stream.socket.close()
            return
        stream.rest += data
        if stream.rest.endswith((b"\n\n\r\n", b"\n\n\r\n0\r\n\r\n")):  # a whole event in a whole chunk
            for version in _EVENT.findall(stream.rest):
                self.arrivals.append(Arrival(stream.number, version.decode(), now))
            stream.rest = b""

    def _answered(self, connection: _Connection) -> None:
        data = _receive(connection.socket)
        if not data:
            self._lose(connection)
            return
        connection.answer += data
        head, _, body = connection.answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        if length and len(body) >= int(length):
            if head.startswith(b"HTTP/1.1 200"):
                self._load.latencies.append(time.monotonic() - connection.sent_at)
            else:
                self._load.errors += 1
            self._free.append(connection)
            if not self._keeps_alive:
                self._lose(connection)

    def _lose(self, connection: _Connection) -> None:
        """An error, unless it was idle: the server closes those."""
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        if connection in self._free:
            self._free.remove(connection)
        else:
            self._load.errors += 1


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(262_144)
    except OSError:
        return b""


def cpu_seconds(pids: Iterable[int]) -> float:
    """The processor time that these processes have taken."""
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def resident(pids: Iterable[int]) -> int:
    """The memory of these processes in bytes, what they share divided (PSS)."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(rollup.partition("Pss:")[2].split()[0]) * 1024 for rollup in rollups)


def workers_of(ports: Iterable[int], workers: Iterable[int], server: int) -> dict[int, int]:
    """Which worker process holds the other end of each local port's connection to `server`."""
    owner = {}
    for pid in workers:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if (target := str(handle.readlink())).startswith("socket:["):
                    owner[target[8:-1]] = pid
    wanted, found = set(ports), {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, *rest = line.split()
        port = int(remote[-4:], 16)
        if int(local[-4:], 16) == server and port in wanted and rest[6] in owner:
            found[port] = owner[rest[6]]
    return found
