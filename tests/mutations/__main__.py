"""`python -m tests.mutations [NAME …]`: break a copy of the code, fault by fault, and run what should notice.

The faults stand in faults.toml. It ends with 0 only where every fault was found in the code and noticed by
its tests, and where those tests pass on the code as it is.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.server import ROOT

FAULTS = Path(__file__).with_name("faults.toml")
AT_ONCE = 2
FAILED = 1  # pytest's exit code where tests ran and some failed; another one proves nothing


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` becomes `new`; `tests` are node ids or files, and `database` where they run."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    database: str = "sqlite"

    def apply(self, root: Path) -> str:
        """Break the copy under `root`; why that cannot be, or nothing."""
        path = root / self.file
        if not path.exists():
            return f"{self.file} is gone: the fault needs another place"
        code = path.read_text()
        if (found := code.count(self.old)) != 1:
            return f"{self.file} has the old text {found} times, not once: write the fault anew"
        path.write_text(code.replace(self.old, self.new))
        return ""


@contextmanager
def copy() -> Iterator[Path]:
    """The files that git tracks, as they are now, beside the packages that are installed already."""
    with TemporaryDirectory(prefix="milepost-mutations-") as folder:
        root = Path(folder, "milepost")
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
        for name in tracked.stdout.decode().split("\0"):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        (root / ".venv").symlink_to(ROOT / ".venv")
        yield root


def pytest(root: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *options, *tests]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def judge(fault: Fault) -> str:
    """What became of a fault, in one line; it begins with `caught` where all is well."""
    with copy() as root:
        if trouble := fault.apply(root):
            return f"NOT APPLIED  {fault.name}: {trouble}"
        done = pytest(root, fault.tests, "-x", f"--database={fault.database}")
        if done.returncode == FAILED:
            noticed = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", done.stdout, re.MULTILINE)
            return f"caught       {fault.name}: {noticed[1] if noticed else 'by a failing test'}"
        if done.returncode:
            return f"NOT RUN      {fault.name}: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
        return f"SURVIVED     {fault.name}: {', '.join(fault.tests)}"


def main() -> None:
    faults = [Fault(**entry) for entry in tomllib.loads(FAULTS.read_text())["fault"]]
    chosen = [fault for fault in faults if not sys.argv[1:] or fault.name in sys.argv[1:]]
    for database in ("sqlite", "postgresql"):
        if tests := sorted({test for fault in chosen if fault.database == database for test in fault.tests}):
            with copy() as root:
                before = pytest(root, tests, "-n", "4", "--dist=worksteal", f"--database={database}")
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", before.stdout, re.MULTILINE)
                if failed:  # once more and one by one: the machine may be busy
                    before = pytest(root, failed, f"--database={database}")
            if before.returncode:
                sys.exit(f"These tests fail on the code as it is:\n{before.stdout[-2000:]}{before.stderr}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = []
        for verdict in pool.map(judge, chosen):
            print(verdict, flush=True)
            verdicts.append(verdict)
    caught = sum(verdict.startswith("caught") for verdict in verdicts)
    print(f"{caught} of {len(chosen)} faults caught")
    sys.exit(caught < len(chosen))


main()
