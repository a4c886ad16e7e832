"""A Milepost, the clouds, and a repository that runs the workflow against both."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.provisioning.clouds import Clouds, serving
from tests.provisioning.packages import Signer
from tests.provisioning.relay import Relay, relaying
from tests.provisioning.steps import Steps, good
from tests.provisioning.workflow import Runner
from tests.support.preloaded import Preloads
from tests.support.server import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chroot", action="store_true", help="only the run into a chroot; needs root")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The run into a chroot takes minutes and root, so it is a command of its own."""
    chroot = bool(config.getoption("--chroot", default=False))
    is_test = collection_path.name.startswith("test_")
    return True if is_test and chroot != (collection_path.name == "test_chroot.py") else None


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    signer = Signer(tmp_path_factory.mktemp("gpg"))
    yield signer
    signer.close()


@pytest.fixture
def clouds(signer: Signer) -> Iterator[Clouds]:
    with serving(Clouds(keyring=signer.keyring, fingerprint=signer.fingerprint)) as clouds:
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


@pytest.fixture(scope="session")
def ssh_keys(tmp_path_factory: pytest.TempPathFactory, private_key: str) -> dict[str, str]:
    """What people paste instead of a private key."""
    folder = tmp_path_factory.mktemp("keys")

    def made(name: str, *options: str) -> Path:
        subprocess.run(["ssh-keygen", "-q", "-f", folder / name, *options], check=True)
        return folder / name

    lines = private_key.splitlines()
    return {
        "public": made("one", "-N", "").with_suffix(".pub").read_text(),
        "with a passphrase": made("two", "-N", "a passphrase").read_text(),
        "with a passphrase, old": made(
            "three", "-N", "a passphrase", "-t", "rsa", "-b", "2048", "-m", "PEM"
        ).read_text(),
        "half": "\n".join(lines[:3]),
        "damaged": "\n".join([lines[0], *lines[2:]]),
        "PuTTY": "PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n",
        "certificate": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "anything": "hunter2",
    }


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A stand-in for ansible-playbook alone; the chroot has the real one."""
    programs = tmp_path / "programs"
    programs.mkdir()
    shutil.copy(Path(__file__).with_name("ansible-playbook"), programs)
    return programs


@pytest.fixture
def steps(tmp_path: Path, clouds: Clouds, private_key: str, preloaded: Preloads) -> Steps:
    return Steps(tmp_path, good(tmp_path, clouds, private_key), preloaded)


@pytest.fixture
def runner(tmp_path: Path, clouds: Clouds, private_key: str, programs: Path) -> Runner:
    return Runner(tmp_path, clouds, private_key, programs)
