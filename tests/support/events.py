"""A stream of server-sent events, as a client reads it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import requests

PATIENCE = 60.0  # seconds; comments alone go on for ever


class Events:
    """A stream, read event by event."""

    def __init__(
        self,
        url: str,
        timeout: float = 30,
        headers: dict[str, str] | None = None,
        verify: bool | str = True,
    ) -> None:
        self.response = requests.get(url, stream=True, timeout=timeout, headers=headers, verify=verify)
        assert self.response.status_code == 200, self.response.text
        self._lines = self.response.iter_lines(chunk_size=1, decode_unicode=True)

    def __iter__(self) -> Iterator[dict[str, str]]:
        event: dict[str, str] = {}
        for line in self._lines:
            if not line:
                if event:
                    yield event
                event = {}
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            event[name] = f"{event[name]}\n{value}" if name in event else value

    def next(self) -> dict[str, str]:
        """The next event that is not a comment alone, and not only a sign of life."""
        return self._next(lambda kind: kind not in (None, "alive"))

    def next_alive(self) -> dict[str, str]:
        """The next sign of life with which nothing else changed."""
        return self._next(lambda kind: kind == "alive")

    def _next(self, is_wanted: Callable[[str | None], bool]) -> dict[str, str]:
        until = time.monotonic() + PATIENCE
        for event in self:
            if is_wanted(event.get("event")):
                return event
            assert time.monotonic() < until, f"no such event within {PATIENCE} s"
        raise StopIteration

    def be_patient(self, seconds: float) -> None:
        """Wait no longer than this for the next bytes."""
        raw: Any = self.response.raw
        raw._fp.fp.raw._sock.settimeout(seconds)

    def close(self) -> None:
        self.response.close()
