"""The pages for readers: the README is short and leads to all of them, and every link leads somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.server import ROOT
from webapp.config import NAMES

DOCS = ROOT / ".github" / "docs"
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
)
PAGES = [ROOT / name for name in TRACKED.stdout.split()]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_the_pages_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 110
    for page in [*DOCS.glob("*.md"), ROOT / ".github/CONTRIBUTING.md", ROOT / ".github/SECURITY.md"]:
        assert f"]({page.relative_to(ROOT)})" in readme, page.name


def test_the_page_of_settings_has_each_of_them() -> None:
    named = re.findall(r"`([A-Z][A-Z_]+)`", (DOCS / "settings.md").read_text())
    assert set(named) >= NAMES


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_each_page_says_in_its_first_sentence_for_whom_it_is(page: Path) -> None:
    assert page.read_text().split("\n\n")[1].startswith("For ")
