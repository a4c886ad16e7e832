"""`python -m tests.screenshots [STATE …]`: every state of the gallery, light and dark, phone and desktop.

They go into .screenshots/; all at once also the README's pictures are taken anew.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Literal

import gevent
from gevent.pywsgi import WSGIServer
from playwright.sync_api import Page, sync_playwright

from tests.support.browser import launch_options
from tests.support.gallery import STATES, create_app

FOLDER = Path(".screenshots")
PICTURES = {"page.png": "configuring", "deploy-site.png": "site-building"}
SIZES = {"phone": (360, 740), "desktop": (1280, 800)}
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")


@contextmanager
def served(embedder: str = "") -> Iterator[str]:
    """The address of a gallery, whose pages this origin may frame."""
    started: Queue[WSGIServer] = Queue()

    def run() -> None:  # gevent, as in production: its log knows no threads
        server = WSGIServer(("127.0.0.1", 0), create_app(embedder), log=None)
        server.start()
        started.put(server)
        server.serve_forever()

    thread = Thread(target=run, daemon=True)
    thread.start()
    server = started.get(timeout=30)
    yield f"http://127.0.0.1:{server.server_port}"
    server.loop.run_callback_threadsafe(gevent.spawn, server.stop)  # in its own thread, which may wait
    thread.join(10)


def show(page: Page, url: str, state: str) -> None:
    """Open a state, as it looks once its script has run."""
    page.goto(f"{url}/p/{state}")
    if banner := {"offline": "#offline", "login-page": "#offline", "gone": "#gone"}.get(state):
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
                    for name, state in PICTURES.items():
                        show(page, url, state)
                        page.screenshot(path=Path(__file__).parent / "screenshots" / name)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
