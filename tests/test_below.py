"""PUBLIC_URL with a path: everything is served below it, stripped by the proxy or passed on."""

import re

import pytest
import requests

from tests.support.server import Serve, Server

pytestmark = pytest.mark.one_database

BELOW = "/status/milepost"


@pytest.fixture(scope="module")
def below(_serve: Serve) -> Server:
    return _serve(PUBLIC_URL=f"https://ci.example{BELOW}")


@pytest.mark.parametrize("prefix", ["", BELOW])
def test_every_address_leads_below_the_path(below: Server, job_id: str, prefix: str) -> None:
    below.report(job_id, "provisioning")
    link = below.api(f"/api/jobs/{job_id}").json()["progress_url"]
    assert link.startswith(f"https://ci.example{BELOW}/p/")
    page = requests.get(below.url + prefix + link.partition(BELOW)[2], timeout=30)
    addresses = re.findall(r'(?:src|href|data-stream|data-steps)="(/[^"]*)"', page.text)
    assert addresses
    for address in addresses:
        assert address.startswith(f"{BELOW}/")
        with requests.get(
            below.url + prefix + address.removeprefix(BELOW), stream=True, timeout=30
        ) as answer:
            assert answer.status_code == 200, address


def test_the_session_is_of_that_path_alone(below: Server) -> None:
    asked = requests.get(f"{below.url}/jobs/x?a=1", allow_redirects=False, timeout=30)
    assert asked.headers["Location"].startswith(f"{BELOW}/sign-in?next={BELOW}/jobs/x")
    form = requests.get(f"{below.url}/sign-in", timeout=30)
    assert f"Path={BELOW}" in form.headers["Set-Cookie"]
    assert f'action="{BELOW}/sign-in"' in form.text
