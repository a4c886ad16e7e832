"""gunicorn's gevent worker with Milepost's own connection loop: every wait for a client has an end.

gunicorn's own loop waits for a body for ever, serves a pipelining client without a pause, and stops
only when the last idle connection and the last stream have timed out.
"""

import errno
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BytesIO
from time import monotonic
from typing import Any

import gevent
from gevent.server import StreamServer
from gunicorn.http.errors import NoMoreData
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.http.wsgi import create
from gunicorn.util import write_error
from gunicorn.workers.ggevent import GeventWorker
from werkzeug.exceptions import BadRequest, HTTPException, RequestEntityTooLarge, ServiceUnavailable

from webapp import logs
from webapp.config import CALLBACK_PATH, LARGEST_BODY, LARGEST_DELIVERY
from webapp.connections import Connection, Connections
from webapp.gate import Gate

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

    def __init__(self, client: Any, is_arriving: Callable[[], None]) -> None:
        super().__init__(client)
        self.deadline, self._is_arriving = 0.0, is_arriving

    def chunk(self, size_hint: int | None = None) -> bytes:
        """What comes next of a request that has begun, b"" at the end of the connection."""
        self._is_arriving()
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


class Refused:
    """In place of a body: the route that reads it answers with this error."""

    def __init__(self, error: HTTPException) -> None:
        self.error = error

    def read(self, size: int = -1) -> bytes:
        """Raises the error."""
        raise self.error


class Server(StreamServer):
    """Accepts connections; when files run out, it makes room and tries again, with one line in the log."""

    warned_at = -60.0

    def __init__(self, listener: Any, worker: "Worker") -> None:
        super().__init__(listener, partial(worker.handle, listener.getsockname()))
        self.connections = worker.connections
        # More than the gate lets in, or callbacks would wait in the backlog; not all: the others share.
        self.max_accept = 50 if worker.cfg.workers > 1 else self.max_accept

    def do_read(self) -> Any:
        """A new connection, or None."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            if monotonic() > self.warned_at + 60:
                logs.write("error", "no connection can be accepted", {"cause": error.strerror})
            self.warned_at = monotonic()
            self.connections.make_room()
            itself: Any = self
            itself.stop_accepting()
            gevent.spawn_later(0.1, itself._start_accepting_if_started)
            return None


class Worker(GeventWorker):  # type: ignore[misc]
    """Serves connections until SIGTERM, then finishes within two seconds."""

    def run(self) -> None:
        """Accept connections until SIGTERM, then answer what has begun."""
        sys.stderr, self.connections = logs.Stderr(), Connections()
        self.gate = Gate()
        servers: list[Any] = [Server(listener, self) for listener in self.sockets]
        for server in servers:
            server.start()
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
        end, ours = monotonic() + STOPS_WITHIN, self.connections
        while (ours.waiting or ours.served) and (now := monotonic()) < end:
            gevent.sleep(0.02)
            idle = [c.greenlet for c in ours.waiting if now - (c.idle_since or now) > STILL_COMES_WITHIN]
            gevent.killall(idle, block=False)
        served = [connection.greenlet for connection in ours.served]
        gevent.killall(served, ServiceUnavailable("the server restarts"), timeout=CUT_WITHIN)

    def handle(self, listener: Any, client: Any, address: Any) -> None:
        """Serve a connection's requests, one after the other."""
        connection = Connection(address[0])
        parser = RequestParser(self.cfg, client, address)
        parser.unreader = reader = Reader(client, partial(self.connections.is_arriving, connection))
        try:
            self.connections.add(connection)
            while reader.begin():
                connection.idle_since = None
                request = next(parser)
                self._read_body(request, client)
                self.connections.is_whole(connection)
                client.settimeout(SENT_WITHIN)
                self._answer(request, client, address, listener)
                connection.idle_since = monotonic()
                self.connections.add(connection)
                gevent.sleep(0)  # a client that pipelines never waits: everybody else has a turn
        except StopIteration:
            if parser.mesg and parser.mesg.must_close:
                with suppress(OSError):
                    reader.drain()
        except (NoMoreData, OSError, gevent.GreenletExit, MemoryError):
            pass  # the connection is closed, by either side
        except ServiceUnavailable as stopping:  # before it came to the app
            with suppress(OSError):
                write_error(client, 503, stopping.name, stopping.description)
        except Exception as error:  # a malformed request; its own words may hold a link's token
            self.handle_error(None, client, address, error)
        finally:
            self.connections.remove(connection)
            client.close()

    def _answer(self, request: Any, client: Any, address: Any, listener: Any) -> None:
        """Have the app answer; raises StopIteration where the connection is to be closed after it."""
        path = request.path
        is_free, is_stream = path.endswith(("/healthz", CALLBACK_PATH)), path.endswith("/events")
        if is_stream and self.connections.is_crowded:
            write_error(client, 503, "Service Unavailable", "too many streams are open")
            raise StopIteration
        if not is_free:
            self.gate.enter(is_stream)
        is_inside = not is_free
        try:
            response, environ = create(request, client, address, listener, self.cfg)
            environ["wsgi.multithread"] = True
            if not self.alive:
                response.force_close()
            parts = self.wsgi(environ, response.start_response)
            try:
                for part in parts:
                    response.write(part)
                    if is_inside:  # a stream that has begun makes way
                        is_inside = False
                        self.gate.leave()
                response.close()
            except Exception as error:
                if isinstance(error, OSError) or not response.headers_sent:
                    raise
                logs.log.error("exception", exc_info=True)
                raise ConnectionAbortedError from error  # half of an answer cannot become another one
            finally:
                if hasattr(parts, "close"):
                    parts.close()
        finally:
            if is_inside:
                self.gate.leave()
        if response.should_close():
            raise StopIteration

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
            except MemoryError:  # which is no fault of the sender's
                raise
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
