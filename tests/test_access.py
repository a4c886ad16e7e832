"""Who may come in, and for how long: sessions, sign-in links, tries, and tokens that open one thing."""

import json
import os
import re
import secrets
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from time import time
from urllib.parse import unquote, urlencode

import pytest
import requests

from tests.support.github import GitHub
from tests.support.operator import Operator, age_session, old_link, signed_in
from tests.support.preloaded import Preloads
from tests.support.server import OPERATOR_TOKEN, ROOT, Serve, Server, wait_until
from webapp.check import weak_secrets
from webapp.config import SECRETS, load

BEHIND_PROXY = {"TRUSTED_PROXIES": "1"}


def guess(server: Server, address: str, token: str = "not the token") -> int:
    """A try at the API that a proxy passes on for this address."""
    headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": address}
    return requests.get(f"{server.url}/api/jobs", headers=headers, timeout=30).status_code


# Sessions


@pytest.mark.one_database
def test_nothing_is_shown_before_signing_in(office: Server, job_id: str) -> None:
    office.report(job_id, "provisioning")
    stranger = Operator(office)
    for path in ("/", f"/jobs/{job_id}", "/jobs/nobody", "/events", f"/jobs/{job_id}/events"):
        answer = stranger.ask(path)
        assert answer.status_code == 303
        assert answer.headers["Location"].startswith("/sign-in")
        assert "provisioning" not in answer.text
    live = stranger.get(f"{office.url}/?q=x", headers={"HX-Request": "true"}, timeout=30)
    assert (live.status_code, live.headers["HX-Redirect"]) == (401, "/sign-in?next=/?q%3Dx")


@pytest.mark.one_database
def test_a_wrong_token_is_refused_and_told_beside_its_field(office: Server) -> None:
    stranger = Operator(office)
    answer = stranger.sign_in("not the operator token")
    assert answer.status_code == 403
    assert "The token is wrong" in answer.text
    assert "not the operator token" not in answer.text
    assert stranger.ask().status_code == 303


@pytest.mark.one_database
def test_the_session_is_out_of_reach_of_scripts_and_of_other_sites(office: Server) -> None:
    cookie = signed_in(office).cookie
    assert (cookie.has_nonstandard_attr("HttpOnly"), cookie.get_nonstandard_attr("SameSite")) == (True, "Lax")
    assert not cookie.secure
    assert cookie.expires
    assert abs(cookie.expires - time() - 12 * 3600) < 60


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("url", "name", "path"),
    [
        ("https://milepost.example", "__Host-milepost", "/"),
        ("https://a.example/m", "__Secure-milepost", "/m"),
    ],
)
def test_under_https_the_cookie_is_bound_to_this_host_or_path(
    serve: Serve, url: str, name: str, path: str
) -> None:
    given = Operator(serve(PUBLIC_URL=url)).ask("/sign-in").headers["Set-Cookie"]
    assert given.startswith(f"{name}=")
    assert {"Secure", "HttpOnly", f"Path={path}", "SameSite=Lax"} <= set(given.split("; "))
    assert "Domain" not in given


def test_a_session_ends_and_signing_in_returns_to_the_page_asked_for(
    operator: Operator, office: Server, job_id: str
) -> None:
    office.report(job_id, "provisioning")
    age_session(operator, 12 * 3600 - 60)
    assert operator.ask(f"/jobs/{job_id}").status_code == 200
    age_session(operator, 12 * 3600 + 60)
    page = f"/?q={job_id}&status="
    sent_to = operator.ask(page).headers["Location"]
    assert operator.sign_in(on=sent_to).headers["Location"] == page
    age_session(operator, 12 * 3600 + 60)
    form = operator.post(f"{office.url}/jobs/{job_id}/retry", timeout=30, allow_redirects=False)
    assert operator.sign_in(on=form.headers["Location"]).headers["Location"] == f"/jobs/{job_id}"


@pytest.mark.one_database
@pytest.mark.parametrize(
    "elsewhere",
    ["//evil.example", "/\\evil.example", "https://evil.example", "/\t/evil.example", "evil", " /"],
)
def test_nobody_is_sent_to_another_site(office: Server, elsewhere: str) -> None:
    answer = Operator(office).submit("/sign-in", "/sign-in", token=OPERATOR_TOKEN, next=elsewhere)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")


def test_after_sign_out_the_old_cookie_opens_nothing(operator: Operator, office: Server, job_id: str) -> None:
    kept = {operator.cookie.name: str(operator.cookie.value)}
    csrf = re.findall(r'name="csrf" value="([^"]+)"', operator.see())[0]
    assert operator.submit("/sign-out").status_code == 303
    assert operator.ask().status_code == 303
    form = {"csrf": csrf, "agent_id": f"agent-{job_id}", "job_id": job_id}
    answers = [
        requests.request(
            method, office.url + path, cookies=kept, data=form, allow_redirects=False, timeout=30, stream=True
        )
        for method, path in (("GET", "/"), ("GET", "/events"), ("POST", "/"), ("POST", "/sign-out"))
    ]
    assert [answer.status_code for answer in answers] == [303] * 4
    assert all(answer.headers["Location"].startswith("/sign-in") for answer in answers)
    assert office.api(f"/api/jobs/{job_id}").status_code == 404


def test_sign_out_ends_the_streams_of_that_session_alone_in_all_processes(serve: Serve, job_id: str) -> None:
    server = serve(WEB_CONCURRENCY="2")
    server.report(job_id, "provisioning")
    leaving, staying = signed_in(server), signed_in(server)
    ending = [leaving.listen(path) for path in ("/events", f"/jobs/{job_id}/events") for _ in range(4)]
    lasting = [staying.listen(path) for path in ("/events", f"/jobs/{job_id}/events")]
    for stream in ending + lasting:
        stream.next()
    assert leaving.submit("/sign-out").status_code == 303
    for stream in ending:
        stream.be_patient(3)  # or a comment would keep the test waiting for the end
        list(stream)
    server.report(job_id, "ansible_started")
    assert any('data-step="configuring" data-state="active"' in str(event) for event in lasting[1])
    for stream in lasting:
        stream.close()


def test_a_stream_ends_with_the_twelve_hours_of_its_session(operator: Operator) -> None:
    stream = operator.listen()
    stream.next()
    age_session(operator, 12 * 3600 + 1)
    stream.be_patient(3)
    assert [event for event in stream if event["event"] == "done"] == []


def test_who_signs_in_anew_has_one_session_and_not_two(operator: Operator, office: Server) -> None:
    before = {operator.cookie.name: str(operator.cookie.value)}
    assert operator.sign_in().status_code == 303
    assert operator.ask().status_code == 200
    answer = requests.get(office.url, cookies=before, allow_redirects=False, timeout=30)
    assert answer.status_code == 303


@pytest.mark.one_database
def test_a_secret_that_a_stranger_has_planted_never_becomes_a_session(office: Server) -> None:
    victim = Operator(office)
    victim.cookies.set("milepost", "planted", domain="127.0.0.1", path="/")
    assert victim.sign_in().status_code == 303
    planted = requests.get(office.url, cookies={"milepost": "planted"}, allow_redirects=False, timeout=30)
    assert planted.status_code == 303


@pytest.mark.slow
def test_a_new_operator_token_signs_everyone_out_and_ends_the_links(serve: Serve) -> None:
    new = "another operator token of the tests"
    before = serve()
    operator, link = signed_in(before), before.flask("sign-in").stdout.strip()
    before.stop()
    after = serve(OPERATOR_TOKEN=new, DATABASE_URL=before.database_url)
    operator.server = after
    assert operator.ask().status_code == 303
    page = operator.see("/sign-in?" + link.partition("?")[2])
    assert "flask sign-in prints a new one" in page
    assert operator.submit("/sign-in", "/sign-in", key=link.partition("=")[2]).status_code == 403
    assert operator.sign_in(new).status_code == 303
    assert operator.ask().status_code == 200


def test_below_a_path_a_person_signs_in_and_out(serve: Serve, job_id: str) -> None:
    public = "http://127.0.0.1/ci/milepost"
    server = serve(PUBLIC_URL=public)
    server.url += "/ci/milepost"
    operator, link = Operator(server), server.flask("sign-in").stdout.strip()
    sent_to = operator.ask(f"/jobs/{job_id}").headers["Location"].removeprefix("/ci/milepost")
    assert operator.sign_in(on=sent_to).headers["Location"] == f"/ci/milepost/jobs/{job_id}"
    assert operator.cookie.path == "/ci/milepost"
    assert operator.ask("/").status_code == 200
    assert operator.submit("/sign-out").headers["Location"] == "/ci/milepost/sign-in"
    assert not operator.cookies and operator.ask("/").status_code == 303
    answer = operator.submit("/sign-in", link.removeprefix(public))
    assert answer.headers["Location"] == "/ci/milepost/"
    assert operator.ask("/").status_code == 200


# Sign-in links


@pytest.mark.one_database
def test_a_printed_link_signs_in_once_by_its_button_and_never_by_a_look(office: Server) -> None:
    link = office.flask("sign-in").stdout.strip()
    assert link.startswith(f"{office.url}/sign-in?key=")
    page, operator, other = link.removeprefix(office.url), Operator(office), Operator(office)
    for _ in range(3):
        assert 'name="token"' not in other.see(page)
    assert operator.submit("/sign-in", page).status_code == 303
    assert operator.ask().status_code == 200
    again = other.submit("/sign-in", page)
    assert again.status_code == 403
    assert "flask sign-in prints a new one" in again.text
    assert operator.submit("/sign-out").status_code == 303
    assert other.submit("/sign-in", page).status_code == 403  # nor after the sign-out
    assert other.ask().status_code == 303


@pytest.mark.one_database
def test_a_used_link_does_not_work_in_another_spelling_of_its_key(office: Server) -> None:
    page = office.flask("sign-in").stdout.strip().removeprefix(office.url)
    assert Operator(office).submit("/sign-in", page).status_code == 303
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    near = alphabet[alphabet.index(page[-1]) ^ 1]  # base64's last letter has two bits that say nothing
    for other in (page[:-1] + near, page + "=", page + "%20"):
        key = unquote(other.partition("=")[2])
        assert Operator(office).submit("/sign-in", "/sign-in", key=key).status_code == 403


def test_a_link_is_used_once_by_however_many_at_the_same_time(serve: Serve) -> None:
    server = serve(WEB_CONCURRENCY="2")
    page = server.flask("sign-in").stdout.strip().removeprefix(server.url)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: Operator(server).submit("/sign-in", page).status_code, range(12)))
    assert sorted(answers)[0] == 303
    assert answers.count(303) == 1
    assert set(answers) <= {303, 403, 429}


def test_a_link_that_is_eleven_minutes_old_is_over(office: Server) -> None:
    operator = Operator(office)
    assert operator.submit("/sign-in", old_link(office, 9 * 60)).status_code == 303
    late = old_link(office, 11 * 60)
    stranger = Operator(office)
    assert "flask sign-in prints a new one" in stranger.see(late)
    assert stranger.submit("/sign-in", "/sign-in", key=late.partition("=")[2]).status_code == 403


def test_two_links_of_the_same_second_both_work(office: Server) -> None:
    for link in (old_link(office, 60), old_link(office, 60)):
        assert Operator(office).submit("/sign-in", link).status_code == 303


# Tries


@pytest.mark.one_database
def test_after_ten_wrong_tokens_an_address_waits_but_the_right_one_enters(serve: Serve, job_id: str) -> None:
    server = serve()
    stranger = Operator(server)
    assert [stranger.sign_in(f"guess {n}").status_code for n in range(10)] == [403] * 10
    refused = stranger.sign_in("one more")
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    at_the_api = requests.get(
        f"{server.url}/api/jobs", headers={"Authorization": "Bearer one more"}, timeout=30
    )
    assert at_the_api.status_code == 429
    assert 0 < int(at_the_api.headers["Retry-After"]) <= 60
    assert "error" in at_the_api.json()
    assert server.report(job_id, "provisioning") is False
    assert server.job(job_id)["status"] == "provisioning"
    assert requests.get(f"{server.url}/api/jobs", timeout=30).status_code == 401  # no try at all
    assert stranger.sign_in().status_code == 303
    link = server.flask("sign-in").stdout.strip().removeprefix(server.url)
    assert Operator(server).submit("/sign-in", link).status_code == 303


@pytest.mark.one_database
def test_ten_wrong_tokens_at_the_api_are_401_and_more_are_429(serve: Serve) -> None:
    server = serve(**BEHIND_PROXY)
    assert [guess(server, "192.0.2.1") for _ in range(12)] == [401] * 10 + [429] * 2
    assert guess(server, "192.0.2.2") == 401
    assert guess(server, "192.0.2.1", OPERATOR_TOKEN) == 200


@pytest.mark.one_database
def test_of_sixty_bodies_held_back_and_let_go_together_ten_are_looked_at(serve: Serve) -> None:
    server = serve()
    stranger = Operator(server)
    csrf = re.findall(r'name="csrf" value="([^"]+)"', stranger.see("/sign-in"))[0]
    answers = []
    with ExitStack() as clients:
        held = []
        for n in range(60):
            body = urlencode({"csrf": csrf, "token": f"guess {n:02}"}).encode()
            head = (
                "POST /sign-in HTTP/1.1\r\nHost: milepost\r\nConnection: close\r\n"
                "Content-Type: application/x-www-form-urlencoded\r\n"
                f"Cookie: {stranger.cookie.name}={stranger.cookie.value}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            client.sendall(head.encode() + body[:-1])
            held.append((client, body[-1:]))
        for client, rest in held:
            client.sendall(rest)
        for client, _ in held:
            answers.append(client.makefile("rb").readline().split()[1])
    assert (answers.count(b"403"), answers.count(b"429")) == (10, 50)


@pytest.mark.one_database
def test_all_addresses_of_an_ipv6_network_count_as_one(serve: Serve) -> None:
    server = serve(**BEHIND_PROXY)
    assert [guess(server, f"2001:db8:1:2:{n:x}::{n}") for n in range(1, 11)] == [401] * 10
    assert guess(server, "2001:db8:1:2:ffff::1") == 429
    assert guess(server, "2001:db8:1:3::1") == 401
    assert [guess(server, f"::ffff:192.0.2.{n}") for n in range(12)] == [401] * 12  # these are IPv4's


@pytest.mark.one_database
def test_each_of_two_processes_refuses_after_ten(serve: Serve) -> None:
    server = serve(WEB_CONCURRENCY="2", **BEHIND_PROXY)
    answers = [guess(server, "192.0.2.1") for _ in range(60)]
    assert 10 <= answers.count(401) <= 20
    assert wait_until(lambda: guess(server, "192.0.2.1") == 429)
    assert {guess(server, "192.0.2.1", OPERATOR_TOKEN) for _ in range(10)} == {200}


# Tokens that open one thing


@pytest.mark.one_database
def test_a_badge_opens_the_badge_alone_and_a_page_no_badge(server: Server, job_id: str) -> None:
    server.report(job_id, "ansible_started")
    page, badge = server.link(job_id), server.job(job_id)["badge_url"]
    assert requests.get(badge, timeout=30).headers["Content-Type"].startswith("image/svg+xml")
    of_badge = badge.removesuffix("/badge.svg")
    assert of_badge != page
    for path in ("", "/steps", "/events"):
        assert requests.get(of_badge + path, timeout=30).status_code == 404
    assert requests.get(f"{page}/badge.svg", timeout=30).status_code == 404
    server.api(f"/api/jobs/{job_id}/revoke", method="POST")
    assert requests.get(badge, timeout=30).status_code == 404
    assert requests.get(server.job(job_id)["badge_url"], timeout=30).status_code == 200


@pytest.mark.slow
def test_a_revoked_link_stays_dead_when_its_job_is_pruned_and_returns(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "running")
    never_revoked = f"{job_id}-2"
    server.report(never_revoked, "running")
    lasting = server.link(never_revoked)
    dead = []
    for _ in range(2):
        dead.append(server.link(job_id))
        assert server.api(f"/api/jobs/{job_id}/revoke", method="POST").status_code == 200
        now = server.link(job_id)
        assert server.flask("prune", "--older-than", "0").stdout.startswith("2 jobs")
        server.report(job_id, "running")
        server.report(never_revoked, "running")
        assert server.link(job_id) == now
        assert requests.get(now, timeout=30).status_code == 200
        assert [requests.get(link, timeout=30).status_code for link in dead] == [404] * len(dead)
    assert requests.get(lasting, timeout=30).status_code == 200


# What nobody reads


@pytest.mark.one_database
def test_no_page_of_the_operator_is_compressed_beside_what_was_asked_for(server: Server, job_id: str) -> None:
    server.report(job_id, "provisioning")
    operator = signed_in(server)
    for path in (f"/?q={job_id}", f"/jobs/{job_id}", f"/sign-in?next=/{job_id}", "/jobs/nobody"):
        answer = operator.ask(path)
        assert answer.request.headers["Accept-Encoding"].startswith("gzip")
        assert "Content-Encoding" not in answer.headers
    assert requests.get(server.link(job_id), timeout=30).headers["Content-Encoding"] == "gzip"


@pytest.mark.one_database
def test_browsers_are_bound_to_https_where_the_host_is_ours_alone(serve: Serve) -> None:
    sent = {
        url: requests.get(f"{serve(PUBLIC_URL=url).url}/sign-in", timeout=30).headers
        for url in ("https://a.example", "https://a.example/m", "http://a.example")
    }
    assert [headers.get("Strict-Transport-Security") for headers in sent.values()] == [
        "max-age=31536000",
        None,
        None,
    ]


def test_a_watcher_reads_nothing_of_the_operators_token(
    office: Server, at_github: GitHub, job_id: str
) -> None:
    at_github.refuse(401, "Bad credentials")
    asked = office.api("/api/jobs", json={"agent_id": f"agent-{job_id}", "job_id": job_id})
    assert asked.status_code == 502
    assert "DISPATCH_TOKEN" in asked.json()["error"]
    link = asked.json()["progress_url"]
    as_json = requests.get(link, headers={"Accept": "application/json"}, timeout=30)
    assert as_json.json()["error"] == "GitHub did not start the workflow. The operator can see the reason."
    seen = [as_json.text, requests.get(link, timeout=30).text, requests.get(f"{link}/steps", timeout=30).text]
    seen.append(str(office.events(job_id).next()))
    for said in seen:
        assert "GitHub did not start the workflow" in said
        assert "DISPATCH" not in said and "token" not in said.replace("data-token", "").lower()
    assert "GitHub does not know DISPATCH_TOKEN" in signed_in(office).see(f"/jobs/{job_id}")


def test_no_line_of_the_log_has_a_links_token_whatever_goes_wrong(serve: Serve, job_id: str) -> None:
    server = serve()
    server.report(job_id, "provisioning")
    token = server.link(job_id).rpartition("/")[2]
    badge = server.job(job_id)["badge_url"].split("/")[-2]
    key = server.flask("sign-in").stdout.strip().rpartition("=")[2]
    for path in (f"/p/{token}", f"/p/{badge}/badge.svg", f"/sign-in?key={key}"):
        for request in (
            f"GET {path} HTTP/1.1\r\nHost: milepost\r\n\r\n",
            f"GET {path} HTTP/9.9\r\n\r\n",
            f"GET {path} HTTP/1.1\r\nHost: m\r\nbad header\r\n\r\n",
            f"GET {path} HTTP/1.1\r\nHost: m\r\nContent-Length: x\r\n\r\n",
            f"GET {path}{'x' * 9000} HTTP/1.1\r\nHost: m\r\n\r\n",
            f"gEt {path}\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            f"GET {path} HTTP/1.1\r\nHost: m\r\nReferer: http://m{path}\r\nX-\xe9: {path}\r\n\r\n",
        ):
            with (
                suppress(OSError),  # some are hung up on
                socket.create_connection(("127.0.0.1", server.port), timeout=30) as client,
            ):
                client.sendall(request.encode("latin-1"))
                client.shutdown(socket.SHUT_WR)
                while client.recv(65_536):
                    pass
    server.stop()
    log = server.log.read_text()
    assert '"route": "/p/<token>"' in log
    for secret in (token, badge, key):
        assert secret not in log and secret.rpartition(".")[2] not in log


@pytest.mark.parametrize("umask", [0o000, 0o022])
@pytest.mark.slow
def test_the_databases_files_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    server = Server(tmp_path, f"sqlite:///{tmp_path}/data/milepost.db")
    before = os.umask(umask)
    try:
        server.flask("db", "upgrade")
        server.start()
    finally:
        os.umask(before)
    server.report("a-job", "provisioning")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "data").iterdir()}
    server.stop()
    assert modes == dict.fromkeys(("milepost.db", "milepost.db-wal", "milepost.db-shm"), 384)


def test_a_database_that_others_could_read_is_closed_to_them(preloaded: Preloads, tmp_path: Path) -> None:
    server = Server(tmp_path, f"sqlite:///{tmp_path}/milepost.db", preloaded)
    server.flask("db", "upgrade")
    (tmp_path / "milepost.db").chmod(0o644)
    server.start()
    mode = stat.S_IMODE((tmp_path / "milepost.db").stat().st_mode)
    server.stop()
    assert mode == 0o600


def test_a_folder_that_is_taken_for_the_database_is_not_closed(preloaded: Preloads, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    said = Server(tmp_path, f"sqlite:///{shared}", preloaded).refuses_to_start()
    assert f"DATABASE_URL must name a file: {shared} is none" in said
    assert stat.S_IMODE(shared.stat().st_mode) == 0o777


def test_secrets_that_are_equal_or_trivial_are_named_but_never_told() -> None:
    good = {name: secrets.token_urlsafe(32) for name in SECRETS}
    assert weak_secrets(load(good)) == []
    weak = {
        "OPERATOR_TOKEN": ["a" * 30, "abc" * 10, "change-me-change-me-now-please", "01" * 16, "Password" * 4],
        "SECRET_KEY": ["0" * 16, "qwertyuiopasdfgh", good["OPERATOR_TOKEN"]],
        "GITHUB_CALLBACK_SECRET": [f"{good['GITHUB_CALLBACK_SECRET']},{'x' * 20}", good["SECRET_KEY"]],
        "GITHUB_WEBHOOK_SECRET": [good["GITHUB_CALLBACK_SECRET"], "12345678901234567890"],
    }
    for name, values in weak.items():
        for value in values:
            [said] = weak_secrets(load({**good, name: value}))
            assert any(other in said for other in (name, *SECRETS)) and value not in said


# What is sent again


def sent(job_id: str, at: float | None, **fields: object) -> bytes:
    return json.dumps({"job_id": job_id, **fields, **({"sent_at": at} if at else {})}).encode()


def test_where_sent_at_is_required_nothing_can_be_sent_again_later(serve: Serve, job_id: str) -> None:
    server = serve(REQUIRE_SENT_AT="yes", CALLBACK_MAX_SKEW="2", QUIET_AFTER="1", LOST_AFTER="2")
    start = time()
    timeless = [sent(job_id, None, type="heartbeat"), sent(job_id, None, status="running")]
    for body in timeless:
        answer = server.post(body)
        assert (answer.status_code, "sent_at" in answer.json()["error"]) == (401, True)
    assert server.api(f"/api/jobs/{job_id}").status_code == 404
    assert server.post(sent(job_id, start, status="provisioning", workflow_run_id=7)).ok
    caught = sent(job_id, start + 0.5, type="heartbeat", workflow_run_id=7)
    assert server.post(caught).json()["duplicate"] is False
    assert server.post(caught).json()["duplicate"] is True  # at once: no new sign of life
    wait_until(lambda: server.job(job_id)["condition"] == "lost" and time() > start + 3)
    assert server.post(caught).status_code == 401
    assert server.job(job_id)["condition"] == "lost"


def test_an_old_end_that_names_its_run_does_not_end_the_next_attempt(server: Server, job_id: str) -> None:
    old = sent(job_id, time(), status="running", workflow_run_id=7, run_attempt=1)
    assert server.post(sent(job_id, time(), status="provisioning", workflow_run_id=7)).ok
    assert server.post(old).ok
    assert server.post(sent(job_id, time(), status="provisioning", workflow_run_id=8)).ok
    assert server.post(old).json()["duplicate"] is True
    job = server.job(job_id)
    assert (job["attempt"], job["status"], job["condition"]) == (2, "provisioning", "live")


# What the docs say


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / ".github/docs/threat-model.md").read_text())
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.one_database
def test_trace_is_refused(server: Server) -> None:
    for path in ("/", "/sign-in", "/api/webhooks/github", "/static/milepost.js"):
        assert requests.request("TRACE", server.url + path, timeout=30).status_code in (404, 405)
