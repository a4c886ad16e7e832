"""What the tests share: a server on each database, and a browser to watch it with."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.support import databases
from tests.support.browser import launch_options
from tests.support.databases import Databases
from tests.support.github import GitHub, github
from tests.support.operator import Operator, signed_in
from tests.support.preloaded import Preloads
from tests.support.server import ROOT, Serve, Server, new_job_id

KINDS = {"sqlite": ["sqlite"], "postgresql": ["postgresql"], "both": ["sqlite", "postgresql"]}
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no fault
hypothesis.settings.register_profile(
    "long", deadline=None, max_examples=int(os.environ.get("EXAMPLES", 20_000))
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=KINDS, default="sqlite", help="where the servers store")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and a cancelled step ends by it
    config.addinivalue_line(
        "markers", "one_database: no statement differs here, so --database=both runs it on SQLite alone"
    )
    config.addinivalue_line("markers", "fuzz: what hypothesis thinks up; make fuzz goes on for longer")
    config.addinivalue_line("markers", "slow: real starts, kills and waits, which make check leaves out")
    config.addinivalue_line("markers", "browser: needs a browser (marked by its fixture)")
    config.addinivalue_line(
        "markers", "workflow: runs the workflow by act, or a step of it (marked by its fixture)"
    )
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        databases.open_run()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is stopped leaves nothing


MARKED = {
    "browser": "browser",
    "runner": "workflow",
    "repository": "workflow",
    "steps": "workflow",
    "fresh_copy": "slow",
    "own_database": "slow",
    "own_cluster": "slow",
}
"""Markers that a test has by its fixtures."""
UMASK = os.umask(0o022)
os.umask(UMASK)


def pytest_runtest_teardown() -> None:
    os.umask(UMASK)  # an app that a test makes in this process closes its files to others


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        databases.close_run()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that has a database, directly or by its server, is run on each kind."""
    if "database" in metafunc.fixturenames:
        kinds = KINDS[metafunc.config.getoption("--database")]
        if any(metafunc.definition.iter_markers("one_database")):
            kinds = kinds[:1]
        metafunc.parametrize("database", kinds, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        used = getattr(item, "fixturenames", ())
        for fixture, marker in MARKED.items():
            if fixture in used:
                item.add_marker(marker)


@pytest.fixture(scope="session")
def database(request: pytest.FixtureRequest) -> Databases:
    """The kind of database that a test is run on."""
    return Databases(request.param)


@pytest.fixture(scope="session")
def new_database(database: Databases) -> Callable[[], str]:
    """Makes empty databases."""
    return database.new


@pytest.fixture
def own_database(database: Databases) -> Iterator[Databases]:
    """Databases for one test, which may stop their cluster."""
    with databases.apart(database.kind) as own:
        yield own


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloads]:
    """Starts servers and commands in little time."""
    preloaded = Preloads(ROOT, tmp_path_factory.mktemp("templates"))
    yield preloaded
    preloaded.close()


@contextmanager
def serving(database: Databases, preloaded: Preloads, folders: pytest.TempPathFactory) -> Iterator[Serve]:
    """A way to start servers, all of which are stopped at the end."""
    servers: list[Server] = []

    def serve(**settings: str) -> Server:
        url = settings.pop("DATABASE_URL", "") or database.migrated()
        servers.append(Server(folders.mktemp("server"), url, preloaded, **settings))
        servers[-1].start()
        return servers[-1]

    try:
        yield serve
    finally:
        with ThreadPoolExecutor(len(servers) or 1) as pool:
            list(pool.map(Server.stop, servers))
    for server in servers:
        assert "Traceback" not in server.log.read_text(), server.log.read_text()[-4000:]


@pytest.fixture(scope="session")
def server(
    database: Databases, preloaded: Preloads, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The Milepost that most tests share; every job has an id of its own."""
    with serving(database, preloaded, tmp_path_factory) as serve:
        yield serve()


@pytest.fixture(scope="module")
def _serve(
    database: Databases, preloaded: Preloads, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """Starts a Milepost with other settings, for all tests of a module."""
    with serving(database, preloaded, tmp_path_factory) as serve:
        yield serve


@pytest.fixture
def serve(
    database: Databases, preloaded: Preloads, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """Starts a Milepost with other settings, for one test."""
    with serving(database, preloaded, tmp_path_factory) as serve:
        yield serve


@pytest.fixture(scope="module")
def at_github() -> Iterator[GitHub]:
    """GitHub's REST API, as a module's tests have it."""
    with github() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def dispatcher(_serve: Serve, at_github: GitHub) -> Server:
    """A Milepost of two processes that may start runs."""
    return _serve(WEB_CONCURRENCY="2", **at_github.settings)


@pytest.fixture(scope="module")
def office(_serve: Serve, at_github: GitHub) -> Server:
    """A Milepost that may start runs, and to which GitHub delivers."""
    return _serve(GITHUB_WEBHOOK_SECRET="the webhook key of the tests", **at_github.settings)


@pytest.fixture
def operator(office: Server) -> Operator:
    """A person who has signed in at the office."""
    return signed_in(office)


@pytest.fixture
def job_id() -> str:
    """Of a job that nobody has heard of."""
    return new_job_id()


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Path:
    """The tracked files and their bytecode, beside the packages that are installed already."""
    copy = tmp_path / "milepost"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in tracked.stdout.split("\0"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for bytecode in (ROOT / "webapp").rglob("__pycache__"):  # or each copy compiles everything again
        shutil.copytree(bytecode, copy / bytecode.relative_to(ROOT), dirs_exist_ok=True)
    os.utime(copy / "requirements.txt", (0, 0))
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A real one, headless."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        yield browser
        browser.close()
