"""What every measure takes and gives: how large it is, a Milepost under load, and figures."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.load import Client, Load, median, milestone
from tests.support.postgresql import postgresql
from tests.support.server import OPERATOR_TOKEN, Server
from webapp.signing import Links


@dataclass(frozen=True)
class Figure:
    """One number of the table; `goal` is the bound that issue or README give it, if any."""

    measure: str
    name: str
    value: float
    unit: str
    goal: str = ""


Figures = Iterator[Figure]


@dataclass(frozen=True)
class Bench:
    """How large: `watchers` and durations at scale 1 are those of the goals; `peers` is a healthchecks."""

    scale: float
    folder: Path
    peers: Path | None = None

    @property
    def watchers(self) -> int:
        return max(int(10_000 * self.scale), 10)

    def seconds(self, at_scale_1: float, least: float = 2.0) -> float:
        return max(at_scale_1 * self.scale, least)

    def count(self, at_scale_1: int, least: int = 100) -> int:
        return max(int(at_scale_1 * self.scale), least)

    def new_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        folder.chmod(0o755)
        return folder

    @contextmanager
    def milepost(
        self, database: str = "sqlite", workers: int = 1, app: str = "wsgi:app", **settings: str
    ) -> Iterator["Milepost"]:
        folder = self.new_folder()
        settings["WEB_CONCURRENCY"] = str(workers)
        if database == "sqlite":
            with Milepost(folder, f"sqlite:///{folder}/milepost.db", app, settings) as milepost:
                yield milepost
            return
        with (
            postgresql(folder) as cluster,
            Milepost(folder, cluster.new_database(), app, settings) as milepost,
        ):
            yield milepost


class Milepost(Server):
    """The product as it is served, and a client to load it with."""

    def __init__(self, folder: Path, database_url: str, app: str, settings: dict[str, str]) -> None:
        super().__init__(folder, database_url, **settings)
        self.app = app
        self._links = Links("", self.environ["SECRET_KEY"], OPERATOR_TOKEN)

    def __enter__(self) -> "Milepost":
        self.flask("db", "upgrade")
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        self.client = Client(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()

    def path(self, job_id: str) -> str:
        return self._links.page(job_id, 0)

    def jobs(self, count: int) -> list[str]:
        """Jobs that have begun."""
        names = [f"job-{number}" for number in range(count)]
        load = self.client.storm((milestone(name, "provisioning") for name in names), 600)
        assert (len(load.latencies), load.errors) == (count, 0), (len(load.latencies), load.errors, count)
        return names

    def watch(self, names: list[str]) -> None:
        self.client.open_streams([self.path(name) for name in names])
        self.client.listen(1.0)
        self.client.arrivals.clear()


def in_turn(
    loaded: Sequence[tuple[Client, Callable[[str], Iterator[bytes]]]], seconds: float, turns: int = 4
) -> tuple[list[float], list[int], int]:
    """What each client's server answers in a second (medians) and in all, loaded in turn; all errors.

    A client's requests are made from a prefix that is new in each turn.
    """
    loads: list[list[Load]] = [[] for _ in loaded]
    for turn in range(turns):
        for (client, requests), taken in zip(loaded, loads, strict=True):
            ready = list(requests(f"turn-{turn}"))
            taken.append(client.storm(ready, seconds))
    errors = sum(load.errors for taken in loads for load in taken)
    rates = [median(load.rate for load in taken) for taken in loads]
    return rates, [sum(len(load.latencies) for load in taken) for taken in loads], errors


def number_of(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"
