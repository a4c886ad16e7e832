"""`python -m tests.screenshots [STATE …]`: every state of the gallery, light and dark, phone and desktop.

They go into .screenshots/; all at once also the README's picture is taken anew.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Page, sync_playwright
from werkzeug.serving import make_server

from tests.support.browser import launch_options
from tests.support.gallery import STATES, create_app

FOLDER = Path(".screenshots")
PICTURE = Path(__file__).parent / "screenshots" / "page.png"
SIZES = {"phone": (360, 740), "desktop": (1280, 800)}
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")


@contextmanager
def served() -> Iterator[str]:
    """The address of a gallery."""
    server = make_server("127.0.0.1", 0, create_app(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def show(page: Page, url: str, state: str) -> None:
    """Open a state, as it looks once its script has run."""
    page.goto(f"{url}/p/{state}")
    if banner := {"offline": "#offline", "gone": "#gone"}.get(state):
        page.locator(banner).wait_for()


def main() -> None:
    states = sys.argv[1:] or list(STATES)
    FOLDER.mkdir(exist_ok=True)
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch_options())
        for scheme in SCHEMES:
            for size, (width, height) in SIZES.items():
                page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
                for state in states:
                    show(page, url, state)
                    page.screenshot(path=FOLDER / f"{state}-{size}-{scheme}.png", full_page=True)
                if states == list(STATES) and (size, scheme) == ("phone", "light"):
                    show(page, url, "configuring")
                    page.screenshot(path=PICTURE)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
