"""A person who signs in and uses the forms."""

import re
from html import unescape
from http.cookiejar import Cookie
from time import time

import requests
from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from itsdangerous import TimestampSigner

from tests.support.server import OPERATOR_TOKEN, Server


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

    class Earlier(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(time()) - seconds

    app = Flask("")
    app.secret_key = operator.server.environ["SECRET_KEY"]
    serializer = SecureCookieSessionInterface().get_signing_serializer(app)
    assert serializer
    said = serializer.loads(str(operator.cookie.value))
    serializer.signer = Earlier
    operator.cookie.value = serializer.dumps(said)
