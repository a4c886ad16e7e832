"""What the tests share: a server on each database, and a browser to watch it with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser import launch_options
from tests.github import GitHub, github
from tests.milepost import Cluster, Server, new_job_id, postgresql


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=["sqlite", "postgresql"], default="sqlite")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "doors: needs a server, so it is run on each database")


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "new_database" in getattr(item, "fixturenames", ()):
            item.add_marker("doors")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL of this run's own; not in pytest's folders, which each run of pytest closes to others."""
    with TemporaryDirectory(prefix="milepost-") as folder, postgresql(Path(folder)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def new_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], str]:
    """Makes empty databases, of the kind that this run tests on."""
    if request.config.getoption("--database") == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        return cluster.new_database
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('database')}/milepost.db"


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def _serve(new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    servers = []

    def serve(**settings: str) -> Server:
        server = Server(
            tmp_path_factory.mktemp("server"), settings.pop("DATABASE_URL", "") or new_database(), **settings
        )
        servers.append(server)
        server.flask("db", "upgrade")
        server.start()
        return server

    yield serve
    for server in servers:
        server.stop()
        assert "Traceback" not in server.log.read_text(), server.log.read_text()[-4000:]


@pytest.fixture(scope="session")
def server(_serve: Serve) -> Server:
    """The Milepost that most tests share; every job has an id of its own."""
    return _serve()


@pytest.fixture
def serve(_serve: Serve) -> Iterator[Serve]:
    """Starts a Milepost with other settings, for one test."""
    started = []

    def serve(**settings: str) -> Server:
        started.append(_serve(**settings))
        return started[-1]

    yield serve
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def at_github() -> Iterator[GitHub]:
    """GitHub's REST API, as a module's tests have it."""
    with github() as stand_in:
        yield stand_in


@pytest.fixture
def job_id() -> str:
    """Of a job that nobody has heard of."""
    return new_job_id()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real one, headless."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        yield browser
        browser.close()
