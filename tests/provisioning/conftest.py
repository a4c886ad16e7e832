"""A Milepost, the clouds, and a repository that runs the workflow against both."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds, serving
from tests.provisioning.relay import Relay, relaying
from tests.provisioning.workflow import Runner
from tests.support.server import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chroot", action="store_true", help="only the run into a chroot; needs root")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The run into a chroot takes minutes and root, so it is a command of its own."""
    chroot = bool(config.getoption("--chroot", default=False))
    is_test = collection_path.name.startswith("test_")
    return True if is_test and chroot != (collection_path.name == "test_chroot.py") else None


@pytest.fixture
def clouds() -> Iterator[Clouds]:
    with serving(Clouds()) as clouds:
        yield clouds


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with relaying(server.url) as relay:
        yield relay


@pytest.fixture(scope="session")
def private_key(tmp_path_factory: pytest.TempPathFactory) -> str:
    key = tmp_path_factory.mktemp("ssh") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return key.read_text()


@pytest.fixture
def runner(tmp_path: Path, clouds: Clouds, private_key: str) -> Runner:
    """A runner with a stand-in for ansible-playbook alone; the chroot has the real one."""
    programs = tmp_path / "programs"
    programs.mkdir()
    shutil.copy(Path(__file__).with_name("ansible-playbook"), programs)
    return Runner(tmp_path, clouds, private_key, programs)
