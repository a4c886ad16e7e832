"""gunicorn's gevent worker with Milepost's own connection loop: every wait for a client has an end.

gunicorn's own loop waits for a body for ever, serves a pipelining client without a pause, and stops
only when the last idle connection and the last stream have timed out.
"""

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from time import monotonic
from typing import Any

import gevent
from gevent import getcurrent
from gevent.event import Event
from gevent.server import StreamServer
from gunicorn.http.errors import NoMoreData
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import Response, create
from gunicorn.util import write_error
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import RequestEntityTooLarge, ServiceUnavailable

from webapp import logs
from webapp.config import CALLBACK_PATH, LARGEST_BODY, LARGEST_DELIVERY
from webapp.connections import Connections, Gate
from webapp.routes.guard import network_of

IDLE_FOR = 10.0  # seconds that a silent connection is kept
ARRIVES_WITHIN = 25.0  # seconds for a whole request, head and body; the contract: within 30
SENT_WITHIN = 60.0  # seconds in which a client must read something of what is sent to it
STOPS_WITHIN, CUT_WITHIN = 1.4, 0.3  # seconds after SIGTERM to answer what has begun; then to say 503
STILL_COMES_WITHIN = 0.25  # seconds in which a new connection may still send its request after SIGTERM
# After an answer that did not wait for the whole body: a connection that is closed on unread bytes is
# reset, and the client loses the answer.
DRAINED, DRAINED_WITHIN = 2**20, 1.0  # bytes, seconds


class Reader(SocketUnreader):  # type: ignore[misc]
    """Reads a connection until a deadline, which each request sets anew; raises TimeoutError."""

    def __init__(self, client: Any, arrive: Callable[[], None]) -> None:
        super().__init__(client)
        self.deadline, self._arrive = 0.0, arrive

    def chunk(self, size_hint: int | None = None) -> bytes:
        """What comes next of a request that has begun, b"" at the end of the connection."""
        self._arrive()
        return self._receive(size_hint)

    def _receive(self, size_hint: int | None = None) -> bytes:
        self.sock.settimeout(max(self.deadline - monotonic(), 0.001))
        return bytes(super().chunk(size_hint))

    def begin(self) -> bool:
        """Wait for the first byte of a request; False where the connection ends instead."""
        if not self.buf.getbuffer().nbytes:
            self.deadline = monotonic() + IDLE_FOR
            self.unread(self._receive())
        self.deadline = monotonic() + ARRIVES_WITHIN
        return bool(self.buf.getbuffer().nbytes)

    def drain(self) -> None:
        """Read what is left and throw it away."""
        self.sock.shutdown(socket.SHUT_WR)
        self.deadline, drained = monotonic() + DRAINED_WITHIN, 0
        while drained < DRAINED and (part := self._receive(DRAINED)):
            drained += len(part)


class TooLarge:
    """In place of a body: the route that reads it answers 413."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def read(self, size: int = -1) -> bytes:
        """Raises RequestEntityTooLarge."""
        raise RequestEntityTooLarge(f"the body is larger than {self.largest} bytes")


class Answer(Response):  # type: ignore[misc]
    """An answer whose head goes out with the first part of its body: one packet, not two."""

    headers_sent: bool
    _head = b""

    def send_headers(self) -> None:
        """Keep the head until something follows it."""
        if not self.headers_sent:
            lines = [
                *self.default_headers(),
                *(f"{name}: {value}\r\n" for name, value in self.headers),
                "\r\n",
            ]
            self._head, self.headers_sent = "".join(lines).encode("latin-1"), True

    def _emit_body(self, data: bytes) -> None:
        framed = b"%X\r\n%b\r\n" % (len(data), data) if self.chunked else data
        head, self._head = self._head, b""
        self.sock.sendall(head + framed)

    def close(self) -> None:
        """The end of the body, and the head where nothing came after it."""
        self.send_headers()
        if rest := self._head + (b"0\r\n\r\n" if self.chunked else b""):
            self.sock.sendall(rest)


class Server(StreamServer):
    """Accepts connections; when files run out, it makes room, with one line in the log, and tries again."""

    max_accept = 25  # in a turn, half of what gevent begins in one: more would hold up a commit
    max_delay = 0.1  # seconds until gevent tries again
    warned_at = -60.0

    def __init__(self, listener: Any, worker: "Worker") -> None:
        super().__init__(listener, partial(worker.handle, listener.getsockname()))
        self.connections = worker.connections
        if worker.cfg.workers > 1:  # or of 32 connections that come at once the quicker worker has 30
            self.max_accept = 5

    def do_read(self) -> Any:
        """A new connection, or None."""
        try:
            accepted = super().do_read()
            self.connections.are_all_accepted = accepted is None
            return accepted
        except OSError as error:
            if monotonic() > self.warned_at + 60:
                logs.write("error", "no connection can be accepted", {"cause": error.strerror})
            self.warned_at = monotonic()
            self.connections.make_room()
            raise gevent.GreenletExit from error  # which gevent does not print


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves connections until SIGTERM, then finishes within two seconds."""

    stops = Event()  # there is one worker in a process; SIGTERM may come before it runs

    def handle_exit(self, *_: object) -> None:
        """SIGTERM."""
        self.alive = False
        self.stops.set()

    handle_quit = handle_exit  # Ctrl-C comes twice, from the terminal and from the master

    def run(self) -> None:
        """Accept connections until SIGTERM, then answer what has begun."""
        sys.stderr, self.connections = logs.Stderr(), Connections()
        self.wsgi.wsgi_app = Gate(self.wsgi.wsgi_app, self.connections)
        servers: list[Any] = [Server(listener, self) for listener in self.sockets]
        for server in servers:
            server.start()
        while self.alive:
            self.notify()
            logs.sink.flush()
            self.stops.wait(1.0)
        for server, listener in zip(servers, self.sockets, strict=True):
            server._do_read()  # connections that the kernel has accepted already
            server.close()
            listener.close()
        self._finish()

    def _finish(self) -> None:
        """Answer what has begun; streams and idle connections end at once, what takes too long is a 503."""
        self.wsgi.extensions["milepost"].hub.end()
        end, ours = monotonic() + STOPS_WITHIN, self.connections
        gevent.sleep(0)  # the connections that were accepted last begin, or the loop would not see them
        while (ours.waiting or ours.served) and monotonic() < end:
            gevent.sleep(0.02)
            late = monotonic() - STILL_COMES_WITHIN
            idle: list[Any] = [each for each, since in ours.waiting.items() if since < late]
            gevent.killall(idle, block=False)
        served: list[Any] = [*ours.served]
        with suppress(gevent.Timeout):
            gevent.killall(served, ServiceUnavailable("the server restarts"), timeout=CUT_WITHIN)

    def handle(self, listener: Any, client: Any, address: Any) -> None:
        """Serve a connection's requests, one after the other."""
        this, origin, connections = getcurrent(), network_of(address[0]), self.connections
        parser = RequestParser(self.cfg, client, address)
        parser.unreader = reader = Reader(client, partial(connections.arrive, this, origin))
        try:
            connections.wait(this)
            while reader.begin():
                connections.take_turn(this, origin, reader.buf.getvalue())
                request = next(parser)
                self._read_body(request, client)
                connections.serve(this, origin)
                client.settimeout(SENT_WITHIN)
                self._answer(listener, request, client, address)
                connections.wait(this)
                gevent.sleep(0)  # a client that pipelines never waits: everybody else has a turn
        except StopIteration:
            if parser.mesg and parser.mesg.must_close:
                with suppress(OSError):
                    reader.drain()
        except (NoMoreData, OSError, gevent.GreenletExit, MemoryError):
            pass  # the connection is closed, by either side
        except ServiceUnavailable as stopping:  # thrown in by `_finish`, while the request was still read
            with suppress(OSError):
                write_error(client, 503, stopping.name, stopping.description)
        except Exception as error:  # a malformed request; its own words may hold a link's token
            self.handle_error(None, client, address, error)
        finally:
            connections.remove(this, origin)
            client.close()

    def _read_body(self, request: Any, client: Any) -> None:
        """Have the whole body at hand before routing, within its bound."""
        largest = LARGEST_BODY
        if request.path.endswith(CALLBACK_PATH) and "X-GITHUB-EVENT" in dict(request.headers):
            has_keys = self.wsgi.extensions["milepost"].settings.webhook_keys
            largest = LARGEST_DELIVERY if has_keys else -1  # every body is too large, so none is read
        length = getattr(request.body.reader, "length", None) or 0  # None for a chunked one
        is_taken, body = length <= largest, b""
        if is_taken:
            if request._expected_100_continue:
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = request.body.read(largest + 1)
            if len(body) < length:
                raise NoMoreData
            is_taken = len(body) <= largest
        request._expected_100_continue = False  # or gunicorn would say it later
        request.body = BytesIO(body) if is_taken else TooLarge(largest)
        if not is_taken:
            request.force_close()

    def _answer(self, listener: Any, request: Any, client: Any, address: Any) -> None:
        """Run the app; in place of gunicorn's `handle_request`, whose hooks and clocks nobody uses here."""
        response, environ = create(request, client, address, listener, self.cfg, Answer)
        body = self.wsgi(environ, response.start_response)
        if not self.alive:  # now, after what it may have waited for
            response.force_close()
        try:
            for part in body:
                response.write(part)
            response.close()
        except Exception as error:
            if isinstance(error, OSError) or not response.headers_sent:
                raise
            self.log.exception("Error handling request")  # its answer is cut off: the connection ends
            raise StopIteration from None
        finally:
            if hasattr(body, "close"):
                body.close()
        if response.should_close():
            raise StopIteration
