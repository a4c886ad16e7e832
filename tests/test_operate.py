"""The operator's door as a person uses it: signing in, the list, one job."""

import re
from collections.abc import Iterator
from html import unescape

import pytest
import requests
from playwright.sync_api import Browser, expect

from tests.conftest import Serve
from tests.github import GitHub, a_run, github
from tests.milepost import OPERATOR_TOKEN, Events, Server, wait_until


@pytest.fixture(scope="module")
def at_github() -> Iterator[GitHub]:
    with github() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def office(_serve: Serve, at_github: GitHub) -> Server:
    """A Milepost of these tests' own, that may start runs."""
    return _serve(**at_github.settings)


class Operator(requests.Session):
    """A person's browser as far as HTTP goes: cookies, and forms sent as they are shown."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def see(self, path: str = "/") -> str:
        """A page that must be there."""
        answer = self.get(self.server.url + path, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.text

    def submit(self, path: str, on: str = "/", **fields: str) -> requests.Response:
        """Send a form of the page `on`, with its hidden fields."""
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', self.see(on)))
        form = {name: unescape(value) for name, value in hidden.items()} | fields
        return self.post(self.server.url + path, data=form, timeout=30, allow_redirects=False)

    def sign_in(self, token: str = OPERATOR_TOKEN, on: str = "/sign-in") -> requests.Response:
        return self.submit("/sign-in", on, token=token)


@pytest.fixture
def operator(office: Server) -> Operator:
    """Signed in."""
    operator = Operator(office)
    assert operator.sign_in().status_code == 303
    return operator


def jobs_in(page: str) -> list[str]:
    return re.findall(r'data-job="([^"]+)"', page)


def test_nothing_is_shown_before_signing_in(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning")
    stranger = Operator(office)
    for path in ("/", f"/jobs/{job_id}", "/events"):
        answer = stranger.get(office.url + path, allow_redirects=False, timeout=30)
        assert answer.status_code == 303
        assert answer.headers["Location"].startswith("/sign-in")
        assert "provisioning" not in answer.text
    assert (
        stranger.post(f"{office.url}/jobs/{job_id}/revoke", allow_redirects=False, timeout=30).status_code
        == 303
    )
    assert requests.get(office.link(job_id), timeout=30).status_code == 200


def test_the_list_has_the_jobs_newest_first(operator: Operator, office: Server, job_id: str) -> None:
    for n in (1, 2, 3):
        office.report(f"{job_id}-{n}", "provisioning")
    assert jobs_in(operator.see(f"/?q={job_id}")) == [f"{job_id}-{n}" for n in (3, 2, 1)]


def test_a_job_is_started_from_the_form(operator: Operator, at_github: GitHub, job_id: str) -> None:
    answer = operator.submit("/", agent_id="agent-1", region="eu", job_id=job_id, dispatch="on")
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/jobs/{job_id}")
    assert at_github.dispatched(job_id) == 1
    assert "agent-1" in operator.see(f"/jobs/{job_id}")
