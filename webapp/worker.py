"""gunicorn's gevent worker with Milepost's own connection loop: every wait for a client has an end.

gunicorn's own loop waits for a body for ever, serves a pipelining client without a pause, and stops
only when the last idle connection and the last stream have timed out.
"""

import socket
import sys
from contextlib import suppress
from functools import partial
from io import BytesIO
from time import monotonic
from typing import Any

import gevent
from gevent import getcurrent
from gevent.server import StreamServer
from gunicorn.http.errors import NoMoreData
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, ServiceUnavailable

from webapp import logs
from webapp.config import CALLBACK_PATH, LARGEST_BODY, LARGEST_DELIVERY

IDLE_FOR = 10.0  # seconds that a silent connection is kept
ARRIVES_WITHIN = 25.0  # seconds for a whole request, head and body; the contract: within 30
SENT_WITHIN = 60.0  # seconds in which a client must read something of what is sent to it
STOPS_WITHIN, CUT_WITHIN = 1.4, 0.3  # seconds after SIGTERM: to finish; to say 503
STILL_COMES_WITHIN = 0.25  # seconds in which a new connection may send its request even then
# After an answer that did not wait for the whole body: a connection that is closed on unread bytes is
# reset, and the client loses the answer.
DRAINED, DRAINED_WITHIN = 2**20, 1.0  # bytes, seconds


class Reader(SocketUnreader):  # type: ignore[misc]
    """Reads a connection until a deadline, which each request sets anew; raises TimeoutError."""

    deadline = 0.0

    def chunk(self, size_hint: int | None = None) -> bytes:
        """What has arrived, b"" at the end of the connection."""
        self.sock.settimeout(max(self.deadline - monotonic(), 0.001))
        return bytes(super().chunk(size_hint))

    def begin(self) -> bool:
        """Wait for the first byte of a request; False where the connection ends instead."""
        if not self.buf.getbuffer().nbytes:
            self.deadline = monotonic() + IDLE_FOR
            self.unread(self.chunk())
        self.deadline = monotonic() + ARRIVES_WITHIN
        return bool(self.buf.getbuffer().nbytes)

    def drain(self) -> None:
        """Read what is left and throw it away."""
        self.sock.shutdown(socket.SHUT_WR)
        self.deadline, drained = monotonic() + DRAINED_WITHIN, 0
        while drained < DRAINED and (part := self.chunk(DRAINED)):
            drained += len(part)


class Refused:
    """In place of a body: the route that reads it answers with this error."""

    def __init__(self, error: HTTPException) -> None:
        self.error = error

    def read(self, size: int = -1) -> bytes:
        """Raises the error."""
        raise self.error


class Connection:
    """One client's connection, and the greenlet that serves it.

    `idle_since` (monotonic seconds) before a request has begun, `is_served` while the app answers one.
    """

    __slots__ = ("greenlet", "idle_since", "is_served")

    def __init__(self) -> None:
        self.greenlet = getcurrent()
        self.idle_since: float | None = monotonic()
        self.is_served = False


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves connections until SIGTERM, then finishes within two seconds."""

    connections: dict[Connection, None]

    def run(self) -> None:
        """Accept connections until SIGTERM, then answer what has begun."""
        sys.stderr, self.connections = logs.Stderr(), {}
        servers = []
        for listener in self.sockets:
            server: Any = StreamServer(listener, partial(self.handle, listener.getsockname()))
            server.max_accept = 1 if self.cfg.workers > 1 else server.max_accept
            server.start()
            servers.append(server)
        while self.alive:
            self.notify()
            logs.sink.flush()
            gevent.sleep(0.1)
        for server, listener in zip(servers, self.sockets, strict=True):
            server._do_read()  # connections that the kernel has accepted already
            server.close()
            listener.close()
        self._finish()

    def _finish(self) -> None:
        """Answer what has begun; streams and idle connections end at once, what takes too long is a 503."""
        self.wsgi.extensions["milepost"].hub.end()
        end = monotonic() + STOPS_WITHIN
        while self.connections and (now := monotonic()) < end:
            gevent.sleep(0.02)
            idle = [c.greenlet for c in self.connections if now - (c.idle_since or now) > STILL_COMES_WITHIN]
            gevent.killall(idle, block=False)
        served = [connection.greenlet for connection in self.connections if connection.is_served]
        gevent.killall(served, ServiceUnavailable("the server restarts"), timeout=CUT_WITHIN)

    def handle(self, listener: Any, client: Any, address: Any) -> None:
        """Serve a connection's requests, one after the other."""
        connection = Connection()
        self.connections[connection] = None
        parser = RequestParser(self.cfg, client, address)
        parser.unreader = reader = Reader(client)
        try:
            while reader.begin():
                connection.idle_since = None
                request = next(parser)
                self._read_body(request, client)
                client.settimeout(SENT_WITHIN)
                connection.is_served = True
                self.handle_request(listener, request, client, address)
                connection.idle_since, connection.is_served = monotonic(), False
                gevent.sleep(0)  # a client that pipelines never waits: everybody else has a turn
        except StopIteration:
            if parser.mesg and parser.mesg.must_close:
                with suppress(OSError):
                    reader.drain()
        except (NoMoreData, OSError, gevent.GreenletExit):
            pass  # the connection is closed, by either side
        except Exception as error:  # a malformed request; its own words may hold a link's token
            self.handle_error(None, client, address, error)
        finally:
            del self.connections[connection]
            client.close()

    def _read_body(self, request: Any, client: Any) -> None:
        """Replace the request's body by its bytes, or by the reason why they cannot be had."""
        body, largest = request.body, self._largest(request)
        length = getattr(body.reader, "length", None)  # None for a chunked one
        error: HTTPException = RequestEntityTooLarge(f"the body is larger than {largest} bytes")
        if largest and (length or 0) <= largest:
            if request._expected_100_continue:
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                data = body.read(largest + 1)
            except Exception:  # broken off, badly chunked, or too slow
                data, error = b"", BadRequest("the body did not arrive whole")
            else:
                if length is not None and len(data) < length:
                    error = BadRequest("the body did not arrive whole")
                elif len(data) <= largest:
                    request.body = BytesIO(data)
        request._expected_100_continue = False  # or gunicorn would say it later
        if request.body is body:
            request.body = Refused(error)
            request.force_close()

    def _largest(self, request: Any) -> int:
        """The longest body in bytes that this request may have; 0 where it is not read at all."""
        is_delivery = any(name == "X-GITHUB-EVENT" for name, _ in request.headers)
        if not is_delivery or not request.path.endswith(CALLBACK_PATH):
            return LARGEST_BODY
        return LARGEST_DELIVERY if self.wsgi.extensions["milepost"].settings.webhook_keys else 0
