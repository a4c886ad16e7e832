"""Asks GitHub: the only outbound HTTP of the server's own, and every wait and size in it has a bound.

https://docs.github.com/en/rest/actions/workflows#create-a-workflow-dispatch-event
https://docs.github.com/en/rest/actions/workflow-runs
"""

import re
from collections.abc import Container
from datetime import UTC, datetime
from time import time
from typing import Any
from urllib.parse import quote

import requests
from gevent import Timeout
from gevent.lock import BoundedSemaphore
from urllib3.exceptions import HTTPError

from webapp.config import Settings
from webapp.rules.report import BadField, parse

CONNECT, READ, TOTAL = 3.05, 10, 15  # seconds
BOUND = 2 * TOTAL + 5  # seconds after which a dispatch that has no outcome was interrupted
LARGEST_ANSWER = 4 * 1024 * 1024  # bytes; a hundred runs have about two
LONGEST_PAUSE = 3600.0  # seconds; of a rate limit
_asking = BoundedSemaphore(4)  # fewer than gevent's ten threads, which look names up for everybody


class Refused(Exception):
    """GitHub did not do what was asked; the message names the cause and the cure.

    `retry_at` (Unix seconds) is the end of a rate limit.
    """

    def __init__(self, reason: str, retry_at: float = 0) -> None:
        super().__init__(reason)
        self.retry_at = retry_at


def words(title: object) -> list[str]:
    """The words of a run's name; the last that is the id of a known job names the job that it is of."""
    return re.findall(r"[A-Za-z0-9._-]+", title) if isinstance(title, str) else []


def dispatch(settings: Settings, workflow: str, inputs: dict[str, str]) -> dict[str, Any]:
    """Start a run; returns `workflow_run_id` and `html_url` where the server tells them. Raises Refused."""
    path = f"workflows/{quote(workflow, safe='')}/dispatches"
    body = {"ref": settings.dispatch_ref, "inputs": inputs}
    status, said = _ask(settings, "POST", path, json=body | {"return_run_details": True})
    if status == 422 and "return_run_details" in _message(said):  # Enterprise Server up to 3.19
        status, said = _ask(settings, "POST", path, json=body)
    return _checked(settings, workflow, status, said)


def find_run(
    settings: Settings, workflow: str, job_id: str, since: float, known: Container[str] = ()
) -> dict[str, Any]:
    """The newest run since then whose name carries the job id, but none of those known; {} without one.

    Raises Refused.
    """
    path = f"workflows/{quote(workflow, safe='')}/runs"
    created = datetime.fromtimestamp(since - 60, UTC).strftime(">=%Y-%m-%dT%H:%M:%SZ")  # clocks differ
    query = {"event": "workflow_dispatch", "created": created, "per_page": "100"}
    found = _checked(settings, workflow, *_ask(settings, "GET", path, params=query))
    runs = found.get("workflow_runs")
    for run in runs if isinstance(runs, list) else ():
        is_named = isinstance(run, dict) and job_id in words(run.get("display_title"))
        if is_named and str(run.get("id")) not in known:
            return dict(run)
    return {}


def get_run(settings: Settings, run_id: str) -> dict[str, Any]:
    """A run as its latest attempt stands. Raises Refused."""
    return _checked(settings, f"run {run_id}", *_ask(settings, "GET", f"runs/{run_id}"))


def get_workflow(settings: Settings, workflow: str) -> dict[str, Any]:
    """A workflow that a dispatch runs. Raises Refused."""
    path = f"workflows/{quote(workflow, safe='')}"
    return _checked(settings, workflow, *_ask(settings, "GET", path))


def _ask(settings: Settings, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of an answer, {} without a body. Raises Refused."""

    def prove(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {settings.dispatch_token}"  # a netrc would come before
        return request

    url = f"{settings.dispatch_api_url}/repos/{settings.dispatch_repository}/actions/{path}"
    headers = {
        "Accept": "application/vnd.github+json",
        "X-GitHub-Api-Version": "2022-11-28",
        "User-Agent": "milepost",
    }
    try:
        with (
            Timeout(TOTAL, requests.Timeout("")),
            _asking,
            requests.request(
                method,
                url,
                headers=headers,
                auth=prove,
                timeout=(CONNECT, READ),
                allow_redirects=False,  # the token goes to this host alone
                stream=True,
                **options,
            ) as answer,
        ):
            body = answer.raw.read(LARGEST_ANSWER + 1, decode_content=True)
    except requests.Timeout:
        raise Refused(f"GitHub did not answer within {TOTAL} seconds; try again later") from None
    except (requests.RequestException, HTTPError, OSError, ValueError) as error:
        kind = type(error).__name__
        raise Refused(f"GitHub cannot be reached ({kind}); check the network and DISPATCH_API_URL") from None
    if retry_at := _rate_limited_until(answer.status_code, answer.headers, body):
        until = datetime.fromtimestamp(retry_at, UTC).strftime("%H:%M:%S")
        raise Refused(f"GitHub's rate limit is used up; try again after {until} UTC", retry_at)
    return answer.status_code, _object(answer.status_code, body)


def _object(status: int, body: bytes) -> dict[str, Any]:
    """Raises Refused where a success is not what GitHub answers."""
    try:
        return parse(body) if body and len(body) <= LARGEST_ANSWER else {}
    except BadField:
        if status == 200:
            raise Refused(
                "what answered is not GitHub: no JSON object came with its 200; check DISPATCH_API_URL"
            ) from None
        return {}


def _message(said: dict[str, Any]) -> str:
    """One line of what GitHub says of an error."""
    return " ".join(str(said.get("message") or "").split())[:300]


def _checked(settings: Settings, workflow: str, status: int, said: dict[str, Any]) -> dict[str, Any]:
    if status == 204 or (status == 200 and said):
        return said
    raise Refused(_reason(settings, workflow, status, _message(said)))


def _rate_limited_until(status: int, headers: Any, body: bytes) -> float:
    """https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api"""
    if status not in (403, 429):
        return 0
    now = time()
    after, reset = headers.get("Retry-After", ""), headers.get("X-RateLimit-Reset", "")
    if re.fullmatch("[0-9]{1,9}", after):
        return now + min(int(after), LONGEST_PAUSE)
    if headers.get("X-RateLimit-Remaining") == "0" and re.fullmatch("[0-9]{1,11}", reset):
        return min(max(int(reset), now + 1), now + LONGEST_PAUSE)
    return now + 60 if status == 429 or b"rate limit" in body[:10_000] else 0


_UNPROCESSABLE = {  # what a 422 says, and the cure
    "workflow_dispatch' trigger": "{workflow} has no workflow_dispatch trigger on {ref}: add it there",
    "No ref found": "the repository has no branch or tag {ref}: set DISPATCH_REF to one",
    "disabled workflow": "{workflow} is disabled: enable it on the repository's Actions page",
    "Unexpected inputs": "{workflow} does not have all inputs that are sent: add them, or list its own as "
    "`inputs` in the pipeline's file",
    "Required input": "{workflow} requires an input that is not sent: make it optional",
    "not in the list of allowed values": "{workflow} allows other values for an input: add this one there",
    "parse": "{workflow} on {ref} is not a valid workflow: mend it",
}


def _reason(settings: Settings, workflow: str, status: int, message: str) -> str:
    """What an error answer of GitHub's means here, and what to do."""
    repository = settings.dispatch_repository
    if status == 401:
        return "GitHub does not know DISPATCH_TOKEN (401): it is wrong, expired or revoked; set a valid one"
    if status == 403:
        return f"DISPATCH_TOKEN may not do this in {repository} (403): it needs actions: write; {message}"
    if status == 404:
        missing = f"GitHub shows DISPATCH_TOKEN no {workflow} in {repository} (404)"
        return f"{missing}: check DISPATCH_WORKFLOW, DISPATCH_REPOSITORY, and what the token may see"
    if 300 <= status < 400:
        return f"{repository} has moved ({status}): set DISPATCH_REPOSITORY and DISPATCH_API_URL anew"
    if status == 422:
        cures = (cure for said, cure in _UNPROCESSABLE.items() if said.lower() in message.lower())
        cure = next(cures, "check DISPATCH_REF and the inputs of {workflow}")
        return f"GitHub refused (422): {message}; {cure.format(workflow=workflow, ref=settings.dispatch_ref)}"
    if status == 200:
        return "GitHub's answer was empty or too large; check DISPATCH_API_URL"
    return f"GitHub answers {status}; try again later"
