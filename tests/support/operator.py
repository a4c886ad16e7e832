"""A person who signs in and uses the forms."""

import re
from hashlib import sha256
from html import unescape
from http.cookiejar import Cookie
from time import time
from unittest.mock import patch

import requests
from sqlalchemy import create_engine, text

from tests.support.events import Events
from tests.support.server import OPERATOR_TOKEN, Server
from webapp.signing import Links


class Operator(requests.Session):
    """A person's browser as far as HTTP goes: it keeps cookies, and sends forms as they are shown."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def ask(self, path: str = "/") -> requests.Response:
        return self.get(self.server.url + path, timeout=30, allow_redirects=False)

    def see(self, path: str = "/") -> str:
        """A page that has to be there."""
        answer = self.ask(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    def submit(self, path: str, on: str = "/", **fields: str) -> requests.Response:
        """Send a form of the page `on`, with the hidden fields that it has there."""
        hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', self.see(on)))
        form = {name: unescape(value) for name, value in hidden.items()} | fields
        return self.post(self.server.url + path, data=form, timeout=30, allow_redirects=False)

    def sign_in(self, token: str = OPERATOR_TOKEN, on: str = "/sign-in") -> requests.Response:
        return self.submit("/sign-in", on, token=token)

    def listen(self, path: str = "/events") -> Events:
        """A stream, open."""
        headers = {"Cookie": f"{self.cookie.name}={self.cookie.value}"}
        return Events(self.server.url + path, headers=headers)

    @property
    def cookie(self) -> Cookie:
        return next(iter(self.cookies))


def signed_in(server: Server) -> Operator:
    operator = Operator(server)
    answer = operator.sign_in(server.environ["OPERATOR_TOKEN"])
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    return operator


def age_session(operator: Operator, seconds: int) -> None:
    """Make the operator's session this old."""
    change = text("UPDATE sessions SET opened_at = :at WHERE hash = :hash")
    hash = sha256(str(operator.cookie.value).encode()).hexdigest()
    engine = create_engine(operator.server.database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        assert connection.execute(change, {"at": time() - seconds, "hash": hash}).rowcount == 1
    engine.dispose()


def old_link(server: Server, seconds: int) -> str:
    """The path of a sign-in link that was printed so long ago."""
    links = Links("", server.environ["SECRET_KEY"], server.environ["OPERATOR_TOKEN"])
    with patch.object(links._sign_ins, "get_timestamp", lambda: int(time()) - seconds):
        return links.sign_in()
