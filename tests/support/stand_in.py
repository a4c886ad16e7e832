"""What stands in for somebody else's service: an HTTP server on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class StandIn(BaseHTTPRequestHandler):
    """Answers in the name of somebody else's service."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening(handler: type[StandIn], address: str = "127.0.0.1") -> Iterator[int]:
    """A stand-in on a port of its own, for as long as this lasts."""
    server = ThreadingHTTPServer((address, 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
