"""A relay between Milepost and its database, which can lose what passes through it."""

import selectors
import socket
from contextlib import suppress
from threading import Event, Thread


class Relay:
    """A TCP relay to PostgreSQL; `swallow` makes every connection half open, new ones too."""

    def __init__(self, port: int) -> None:
        self.target, self.swallow = port, Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.is_open = True
        self.thread = Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        peers: dict[socket.socket, socket.socket] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            while self.is_open:
                for key, _ in selector.select(0.05):
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if end is self.listener:
                        near = self.listener.accept()[0]
                        far = socket.create_connection(("127.0.0.1", self.target))
                        peers |= {near: far, far: near}
                        for each in (near, far):
                            selector.register(each, selectors.EVENT_READ)
                        continue
                    with suppress(OSError):
                        data = end.recv(65536)
                        if data and not self.swallow.is_set():
                            peers[end].sendall(data)
                        if data:
                            continue
                    for each in (end, peers[end]):
                        with suppress(KeyError, ValueError):  # closed with its peer, in this very turn
                            selector.unregister(each)
                        each.close()
        for each in peers:
            each.close()
        self.listener.close()

    def close(self) -> None:
        self.is_open = False
        self.thread.join()
