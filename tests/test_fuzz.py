"""Whatever is sent to a door is answered in the contract's words: never a 5xx, never a traceback.

A few seconds in `make test`; `make fuzz` goes on for as many examples as it is asked for.
"""

import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from tests.support.databases import Databases
from tests.support.server import CALLBACKS, KEY, OPERATOR_TOKEN, sign
from webapp.app import create_app
from webapp.storage.tables import db

pytestmark = [pytest.mark.one_database, pytest.mark.fuzz]

SETTINGS = {
    "GITHUB_CALLBACK_SECRET": KEY,
    "GITHUB_WEBHOOK_SECRET": KEY,
    "SECRET_KEY": "the secret key of the tests",
    "OPERATOR_TOKEN": OPERATOR_TOKEN,
}


def names(text: str) -> list[str]:
    return text.split()


FIELDS = names(
    "job_id status type step failed_step error subject note repository pipeline result_url server_left"
    " server_id server_ip tailscale_ip workflow_run_id run_attempt sent_at other"
)
RUN = names(
    "id run_attempt status conclusion event name display_title path head_branch html_url created_at"
    " run_started_at updated_at"
)
PARAMETERS = names("status condition agent_id pipeline run_id since limit before other")
WORDS = names("provisioning running failed heartbeat completed success vm_created job-1 0 -1")

texts = st.sampled_from(WORDS) | st.text(max_size=80)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8)
callbacks = st.dictionaries(st.sampled_from(FIELDS), values)
likely = st.fixed_dictionaries(
    {"job_id": st.sampled_from(["job-1", "job-2"]), "status": st.sampled_from(WORDS[:3])},
    optional=dict.fromkeys(FIELDS[2:], values),
)
asked = st.dictionaries(st.sampled_from(names("agent_id region job_id dispatch pipeline other")), values)
runs = st.dictionaries(st.sampled_from(RUN), values)
deliveries = st.fixed_dictionaries(
    {"action": texts}, optional={"workflow_run": runs | values, "repository": values, "workflow": values}
)


@pytest.fixture(scope="module")
def client(database: Databases) -> Iterator[FlaskClient]:
    """Of an app in this process: thousands of requests in little time."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**SETTINGS, "DATABASE_URL": database.migrated()}.items():
            environment.setenv(name, value)
        app = create_app()
    yield app.test_client()
    with app.app_context():
        db.engine.dispose()


def check(client: FlaskClient, path: str, body: bytes, expected: set[int], **headers: str) -> None:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post(path, data=body, headers=sent)
    assert answer.status_code in expected, (answer.status_code, answer.text)
    assert answer.get_json().keys() == {"error"} or answer.status_code in (200, 201)


@given(body=st.binary(max_size=200) | (callbacks | likely).map(lambda said: json.dumps(said).encode()))
def test_any_callback_is_answered_in_the_contracts_words(client: FlaskClient, body: bytes) -> None:
    check(client, CALLBACKS, body, {200, 400, 401}, X_Signature=sign(body))


@given(event=st.sampled_from(["workflow_run", "workflow_job", "ping", "push"]), payload=deliveries | values)
def test_any_delivery_is_answered_in_the_contracts_words(
    client: FlaskClient, event: str, payload: object
) -> None:
    body = json.dumps(payload).encode()
    signature = f"sha256={sign(body)}"
    check(client, CALLBACKS, body, {200, 400}, X_GitHub_Event=event, X_Hub_Signature_256=signature)


@given(query=st.dictionaries(st.sampled_from(PARAMETERS), texts, max_size=3))
def test_any_query_of_the_api_is_answered_in_the_contracts_words(
    client: FlaskClient, query: dict[str, str]
) -> None:
    parameters = "&".join(f"{name}={quote(value, errors='surrogatepass')}" for name, value in query.items())
    headers = {"Authorization": f"Bearer {OPERATOR_TOKEN}"}
    answer = client.get(f"/api/jobs?{parameters}", headers=headers)
    assert answer.status_code in (200, 400), (answer.status_code, answer.text)


@given(
    body=st.binary(max_size=80) | st.dictionaries(texts, values).map(lambda said: json.dumps(said).encode())
)
def test_any_job_asked_for_is_answered_in_the_contracts_words(client: FlaskClient, body: bytes) -> None:
    check(client, "/api/jobs", body, {200, 201, 400, 409}, Authorization=f"Bearer {OPERATOR_TOKEN}")


@given(path=st.text(max_size=60))
def test_any_link_is_a_404_but_our_own(client: FlaskClient, path: str) -> None:
    token = quote(path, safe="", errors="surrogatepass") or "x"
    for end in ("", "/steps", "/events", "/badge.svg"):
        assert client.get(f"/p/{token}{end}").status_code in (404, 405, 308)
