"""The machine's door: each answer, field and order of the contract, over HTTP and over a bare socket."""

import json
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from threading import Barrier
from typing import Any

import psycopg
import pytest
import requests

from tests.support.server import CALLBACKS, KEY, OPERATOR_TOKEN, ROOT, Serve, Server, new_job_id, sign
from webapp.signing import is_signed

LIMIT = 65_536
GITHUB_KEY = "It's a Secret to Everybody"
GITHUB_DIGEST = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
OLD_KEY = "the key before the rotation"


@pytest.fixture(scope="module")
def lenient(_serve: Serve) -> Iterator[Server]:
    """In the middle of a rotation of its keys, and with the skew off."""
    server = _serve(GITHUB_CALLBACK_SECRET=f"{KEY}, {OLD_KEY},{GITHUB_KEY}", CALLBACK_MAX_SKEW="0")
    yield server
    server.stop()


def callback(job_id: object, **fields: object) -> bytes:
    return json.dumps({"job_id": job_id, "status": "provisioning"} | fields).encode()


def padded(job_id: str, size: int) -> bytes:
    body = callback(job_id, remark="")
    return body.replace(b'"remark": ""', b'"remark": "' + b"x" * (size - len(body)) + b'"')


def is_known(server: Server, job_id: str) -> bool:
    return server.api(f"/api/jobs/{job_id}").ok


def check_refusal(answer: requests.Response, status: int, names: str = "") -> None:
    """An error as the contract has it: JSON of one text that shows nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json()
    assert error.keys() == {"error"}
    assert names in error["error"]
    assert not re.search(r"Traceback|File \"|Error\b|sqlalchemy|werkzeug|0x", error["error"])
    assert answer.headers.keys().isdisjoint({"Location", "Set-Cookie"})


# Method


@pytest.mark.one_database
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
def test_only_post_is_taken(server: Server, job_id: str, method: str) -> None:
    body = b"x" * (LIMIT + 1) if method == "PUT" else callback(job_id)
    answer = requests.request(
        method, server.url + CALLBACKS, data=body, headers={"X-Signature": sign(body)}, timeout=30
    )
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    if method == "HEAD":
        assert (answer.content, answer.headers["Content-Type"]) == (b"", "application/json")
    else:
        check_refusal(answer, 405)
    assert not is_known(server, job_id)


@pytest.mark.one_database
def test_another_path_is_no_door_and_never_a_redirect(server: Server, job_id: str) -> None:
    body = callback(job_id)
    for path in (f"{CALLBACKS}/", f"{CALLBACKS}/x"):
        answer = requests.post(
            server.url + path,
            data=body,
            headers={"X-Signature": sign(body)},
            allow_redirects=False,
            timeout=30,
        )
        check_refusal(answer, 404)
    assert not is_known(server, job_id)


# Size


def chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


@pytest.mark.one_database
@pytest.mark.parametrize("send", [bytes, chunks], ids=["declared", "streamed"])
def test_the_limit_is_exact(server: Server, job_id: str, send: Callable[[bytes], Any]) -> None:
    largest, larger = padded(job_id, LIMIT), padded(f"{job_id}x", LIMIT + 1)
    for body, signature, status in ((larger, sign(larger), 413), (larger, "", 413), (largest, "", 401)):
        answer = requests.post(
            server.url + CALLBACKS, data=send(body), headers={"X-Signature": signature}, timeout=30
        )
        check_refusal(answer, status)
    assert not is_known(server, job_id) and not is_known(server, f"{job_id}x")
    headers = {"X-Signature": sign(largest)}
    assert requests.post(server.url + CALLBACKS, data=send(largest), headers=headers, timeout=30).ok
    assert is_known(server, job_id)


@pytest.mark.one_database
def test_a_body_far_over_the_limit_is_answered_before_it_is_read(server: Server) -> None:
    for head in (b"Content-Length: 99999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3B9ACA00\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"POST {CALLBACKS} HTTP/1.1\r\nHost: x\r\n".encode() + head)
            connection.sendall(b" " * (20 * LIMIT))
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


# Signature


@pytest.mark.one_database
@pytest.mark.parametrize(
    "wrap", [str, str.upper, "sha256={}".format, lambda s: f"sha256={s.upper()}", "{} ".format]
)
def test_a_signature_may_be_of_either_case_with_or_without_its_prefix(
    server: Server, job_id: str, wrap: Callable[[str], str]
) -> None:
    body = callback(job_id)
    assert server.post(body, **{"X-Signature": wrap(sign(body))}).json() == {
        "received": True,
        "duplicate": False,
        "progress_url": server.link(job_id),
    }


@pytest.mark.one_database
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: "",
        lambda s: "sha256=",
        lambda s: s[:-1],
        lambda s: s + "0",
        lambda s: s[:32] + " " + s[32:],
        lambda s: s + " garbage",
        lambda s: s + "," + s,
        lambda s: "sha1=" + s,
        lambda s: "SHA256=" + s,
        lambda s: "sha256=sha256=" + s,
        lambda s: "sha256= " + s,
        lambda s: "0x" + s[2:],
        lambda s: s[:-1] + "g",
        lambda s: s[:-1] + "\u00e9",
        lambda s: "\u00ff" * 64,
        lambda s: "\u00b2" * 64,
        lambda s: ("0" if s[0] != "0" else "1") + s[1:],
        lambda s: "0" * 64,
        lambda s: sign(b"", ""),
        lambda s: "A" * 8000,
    ],
)
def test_a_signature_that_is_malformed_or_wrong_is_a_401(
    server: Server, job_id: str, spoil: Callable[[str], str]
) -> None:
    body = callback(job_id)
    answer = server.post(body, KEY, **{"X-Signature": spoil(sign(body)).encode("latin-1")})
    check_refusal(answer, 401)
    assert not is_known(server, job_id)


@pytest.mark.one_database
def test_a_signature_is_of_its_bytes_alone_and_a_401_says_nothing_of_jobs(
    server: Server, job_id: str
) -> None:
    server.report(job_id, "provisioning")
    known, unknown = (callback(id, status="running") for id in (job_id, new_job_id()))
    answers = [
        server.post(known, key="a key that nobody has"),
        server.post(unknown, key="a key that nobody has"),
        server.post(known, **{"X-Signature": sign(known + b"\n")}),
        requests.post(server.url + CALLBACKS, data=unknown, timeout=30),
    ]
    for answer in answers:
        check_refusal(answer, 401)
    assert len({answer.content for answer in answers}) == 1
    assert server.page(job_id)["status"] == "provisioning"


@pytest.mark.one_database
def test_during_a_rotation_each_key_is_good(lenient: Server, job_id: str) -> None:
    for key, milestone in ((KEY, "provisioning"), (OLD_KEY, "running"), (GITHUB_KEY, "failed")):
        assert lenient.post(callback(job_id, status=milestone), key).ok
    for key in (f"{KEY}, {OLD_KEY}", f" {OLD_KEY}", ""):
        check_refusal(lenient.post(callback(job_id), key), 401)


def test_githubs_published_vector_is_taken_for_signed(lenient: Server) -> None:
    body = b"Hello, World!"
    assert is_signed(body, f"sha256={GITHUB_DIGEST}", [GITHUB_KEY.encode()])
    check_refusal(lenient.post(body, **{"X-Signature": f"sha256={GITHUB_DIGEST}"}), 400, "JSON")
    check_refusal(lenient.post(body + b"!", **{"X-Signature": f"sha256={GITHUB_DIGEST}"}), 401)


@pytest.mark.parametrize(
    ("key", "data", "digest"),
    [
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
        (
            bytes(range(1, 26)),
            b"\xcd" * 50,
            "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
        ),
        (
            b"\xaa" * 131,
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
        (
            b"\xaa" * 131,
            b"This is a test using a larger than block-size key and a larger than block-size data. "
            b"The key needs to be hashed before being used by the HMAC algorithm.",
            "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
        ),
    ],
)
def test_rfc_4231s_vectors_are_taken_for_signed(key: bytes, data: bytes, digest: str) -> None:
    assert is_signed(data, digest, [b"another", key])
    assert not is_signed(data + b"\0", digest, [b"another", key])


# Strict JSON


def nested(depth: int) -> str:
    """A value for a member of the body, which is itself the first level."""
    return "[" * (depth - 1) + "]" * (depth - 1)


@pytest.mark.parametrize(
    "value",
    [
        nested(32),
        "[" + ",".join(["{}"] * 100) + "]",
        str(2**63 - 1),
        str(-(2**63)),
        "-0",
        "1e308",
        "1e-999",
        "0." + "1" * 5000,
        r'"\ud83d\ude00 \"\\ \u00e9"',
        '"é \x7f \uffff 😀"',
        r'"\\u0000"',
        '{"remark": {"remark": 1}}',
        "true",
    ],
)
def test_what_json_knows_is_taken(server: Server, job_id: str, value: str) -> None:
    body = f' \n{{"job_id": "{job_id}", "status": "provisioning", "remark": {value}}}\r\n\t'
    assert server.post(body.encode()).ok
    assert is_known(server, job_id)


@pytest.mark.one_database
@pytest.mark.parametrize(
    "value",
    [
        nested(33),
        nested(33).replace("[", '{"a":', 1).replace("]", "}", 1).replace("[]", "[]"),
        nested(30_000),
        '{"a":' * 9000 + "1" + "}" * 9000,
        "[" * 60_000,
        str(2**63),
        str(-(2**63) - 1),
        "1" * 30_000,
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "01",
        "1.",
        "+1",
        "0x1",
        r'"\u0000"',
        r'["\u0000"]',
        r'{"a\u0000": 1}',
        '"\0"',
        '"\n"',
        r'"\ud83d"',
        r'"\ude00"',
        r'"\ude00\ud83d"',
        r'{"\ud83d": 1}',
        r'"\x"',
        "'a'",
        '{"a": 1, "a": 1}',
        r'[{"a": 1, "\u0061": 2}]',
        "[1,]",
        "1 // one",
        "",
        '1, "status": "running"',
    ],
)
def test_what_json_does_not_know_is_a_400(server: Server, job_id: str, value: str) -> None:
    body = f'{{"job_id": "{job_id}", "status": "provisioning", "remark": {value}}}'.encode()
    check_refusal(server.post(body), 400, "body")
    assert not is_known(server, job_id)


@pytest.mark.one_database
@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: b"",
        lambda body: b" ",
        lambda body: b"\xef\xbb\xbf" + body,
        lambda body: body.decode().encode("utf-16"),
        lambda body: body.decode().encode("utf-16-le"),
        lambda body: body.decode().encode("utf-32"),
        lambda body: body.replace(b"provisioning", b"\xff"),
        lambda body: body.replace(b"provisioning", b"\xed\xa0\x80"),
        lambda body: body.replace(b"provisioning", b"\xc0\x80"),
        lambda body: b"[" + body + b"]",
        lambda body: b'"' + body.replace(b'"', b'\\"') + b'"',
        lambda body: body + body,
        lambda body: body + b" x",
        lambda body: body + b"\0",
        lambda body: body + b"\x0c",
        lambda body: body + b"\xc2\xa0",
        lambda body: body[:-1],
        lambda body: b"null",
        lambda body: b"1",
        lambda body: b"payload=" + body,
    ],
)
def test_what_is_not_one_object_in_utf_8_is_a_400(
    server: Server, job_id: str, spoil: Callable[[bytes], bytes]
) -> None:
    check_refusal(server.post(spoil(callback(job_id))), 400, "body")
    assert not is_known(server, job_id)


@pytest.mark.one_database
def test_the_content_type_is_not_judged_and_a_content_encoding_is(server: Server, job_id: str) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/x", "?"):
        assert server.post(callback(job_id), **{"Content-Type": kind}).ok
    assert server.post(callback(job_id), **{"Content-Encoding": "Identity"}).ok
    for coding in ("gzip", "br", "identity, gzip"):
        answer = server.post(callback(f"{job_id}x"), **{"Content-Encoding": coding})
        check_refusal(answer, 400, "Content-Encoding")
    assert not is_known(server, f"{job_id}x")


# The order of the checks


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("body", "is_right", "status", "names"),
    [
        (b"{" * (LIMIT + 1), False, 413, "larger"),
        (b'{"job_id": "!"', False, 401, "signature"),
        (b'{"job_id": "!", "sent_at": 1', True, 400, "body"),
        (b'{"job_id": "!", "sent_at": "now"}', True, 400, "sent_at"),
        (b'{"job_id": "!", "sent_at": 1}', True, 401, "sent_at"),
        (b'{"job_id": "!", "status": "running"}', True, 400, "job_id"),
    ],
)
def test_the_first_fault_in_the_contracts_order_is_answered(
    server: Server, body: bytes, is_right: bool, status: int, names: str
) -> None:
    check_refusal(server.post(body, KEY if is_right else "a key that nobody has"), status, names)


# sent_at


@pytest.mark.one_database
@pytest.mark.parametrize("apart", [-290, 290, 0])
def test_a_sent_at_within_the_skew_is_taken(server: Server, job_id: str, apart: float) -> None:
    at = time.time() + apart
    assert server.post(callback(job_id, sent_at=at)).ok
    assert server.job(job_id)["steps"][1]["started_at"][:19] == iso(at)


@pytest.mark.one_database
@pytest.mark.parametrize("apart", [-310, 310, 1e300, -1e300])
def test_a_sent_at_outside_the_skew_is_a_401(server: Server, job_id: str, apart: float) -> None:
    check_refusal(server.post(callback(job_id, sent_at=time.time() + apart)), 401, "sent_at")
    assert not is_known(server, job_id)


@pytest.mark.one_database
@pytest.mark.parametrize("value", [True, False, "1", "now", [], {}, [time.time()]])
def test_a_sent_at_that_is_no_number_is_a_400(server: Server, job_id: str, value: object) -> None:
    check_refusal(server.post(callback(job_id, sent_at=value)), 400, "sent_at")
    assert not is_known(server, job_id)


def test_with_the_skew_off_any_time_there_is_is_taken(lenient: Server, job_id: str) -> None:
    for at in (0, 1.5, 253_402_300_799):
        assert lenient.post(callback(f"{job_id}-{at}", sent_at=at)).ok
        assert lenient.job(f"{job_id}-{at}")["steps"][1]["started_at"][:19] == iso(at)
    for at in (-1, 253_402_300_800, 1e300, 2**63 - 1):
        check_refusal(lenient.post(callback(job_id, sent_at=at)), 400, "sent_at")
    assert not is_known(lenient, job_id)


def iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


# The table of fields

NAMES = ("step", "failed_step", "error", "server_id", "server_ip", "tailscale_ip", "sent_at")


@pytest.mark.parametrize("nothing", [None, ""])
def test_null_and_the_empty_text_mean_absent(server: Server, job_id: str, nothing: object) -> None:
    fields = dict.fromkeys((*NAMES, "type", "workflow_run_id", "run_attempt"), nothing)
    assert server.post(callback(job_id, **fields)).ok
    job = server.job(job_id)
    assert [step["state"] for step in job["steps"]][:2] == ["completed", "active"]
    assert [job[name] for name in ("server_id", "server_ip", "tailscale_ip", "error")] == [None] * 4
    fields.pop("type")
    beat = {"job_id": job_id, "type": "heartbeat", "status": nothing} | fields
    assert server.post(json.dumps(beat).encode()).ok
    check_refusal(server.post(callback(job_id, status=nothing)), 400, "status")
    check_refusal(server.post(callback(nothing)), 400, "job_id")


@pytest.mark.parametrize("shape", ["a", "0", "{}._-", "A.b-C_9", "{}" + "x" * 100])
def test_a_job_id_is_1_to_64_of_its_alphabet(server: Server, job_id: str, shape: str) -> None:
    assert server.post(callback(shape.format(job_id)[:64])).ok
    assert server.job(shape.format(job_id)[:64])["status"] == "provisioning"


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("job_id", ["x" * 65, "-a", ".a", "_a", "a b", "a/b", "a~1", "a\n", "\u00e9", "\u0661", 1, True, []]),
        ("status", ["queued", "Running", "provisioning ", "vm_created", 1, True, [], {}]),
        ("type", ["Heartbeat", "milestone", 1, True, [], {}]),
        ("step", ["x" * 65, 1, True, ["vm_created"], {}]),
        ("failed_step", ["x" * 65, 1, False, []]),
        ("error", [1, True, ["no"], {"no": 1}]),
        ("workflow_run_id", ["-1", -1, "+1", "1.0", 1.0, 1.5, "1e3", " 1", "0x1", "\u0661", True, False, []]),
        ("run_attempt", [0, "0", "00", -1, "x", 1.5, True, []]),
    ],
)
def test_a_field_that_breaks_its_rule_is_a_400_that_names_it(
    server: Server, job_id: str, field: str, values: list[object]
) -> None:
    for value in values:
        body = callback(job_id, workflow_run_id=1) if field == "run_attempt" else callback(job_id)
        check_refusal(server.post(json.dumps(json.loads(body) | {field: value}).encode()), 400, field)
    assert not is_known(server, job_id)


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"status": "running"}, "job_id"),
        ({"job_id": "a"}, "status"),
        ({"job_id": "a", "step": "vm_created"}, "status"),
        ({"job_id": "a", "type": "heartbeat", "status": "running"}, "status"),
    ],
)
def test_job_id_and_either_status_or_type_are_required(
    server: Server, fields: dict[str, str], names: str
) -> None:
    check_refusal(server.post(json.dumps(fields).encode()), 400, names)


@pytest.mark.one_database
def test_steps_that_are_called_like_ends_are_told_apart(server: Server, job_id: str) -> None:
    for step in ("running", "step:running", "step:step:running", "step:else", "failed"):
        assert not server.report(job_id, "provisioning", step=step)
        assert server.report(job_id, "provisioning", step=step)


@pytest.mark.one_database
@pytest.mark.parametrize("path", ["//api/webhooks/github", "/api//webhooks/github", "/api/webhooks/github/"])
def test_an_address_that_is_nearly_the_doors_is_a_404(server: Server, job_id: str, path: str) -> None:
    body = callback(job_id)
    answer = requests.post(server.url + path, data=body, headers={"X-Signature": sign(body)}, timeout=30)
    check_refusal(answer, 404)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("step", ["x" * 64, "running", "failed", "queued", "VM_CREATED", "<b>", "\U0001f600"])
def test_an_unknown_step_is_kept_and_a_sign_of_life_and_moves_nothing(
    server: Server, job_id: str, step: str
) -> None:
    server.report(job_id, "vm_created")
    before = server.page(job_id)
    assert not server.report(job_id, "provisioning", step=step)
    after = server.page(job_id)
    assert after["last_signal_at"] > before["last_signal_at"]
    assert (after["steps"], after["status"]) == (before["steps"], before["status"])
    assert server.report(job_id, "provisioning", step=step), "kept, so the same again is a duplicate"


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("fields", "failed_step"),
    [
        ({"step": "provision", "failed_step": "configure_full"}, "configure_full"),
        ({"step": "provision"}, "provision"),
        ({"step": "vm_created", "failed_step": ""}, "vm_created"),
        ({"failed_step": "x" * 64}, "x" * 64),
        ({}, None),
    ],
)
def test_failed_step_wins_over_step(
    server: Server, job_id: str, fields: dict[str, str], failed_step: str | None
) -> None:
    server.report(job_id, "failed", **fields)
    assert server.page(job_id)["failed_step"] == failed_step


def test_of_an_error_the_last_2000_characters_are_kept(server: Server, job_id: str) -> None:
    text = "<b>é\U0001f600" * 400
    server.report(job_id, "failed", error="!" * 10_000 + text)
    assert server.page(job_id)["error"] == text


def test_an_error_is_kept_without_escape_sequences_and_controls(server: Server, job_id: str) -> None:
    server.report(job_id, "failed", error="\x1b[1;31mno\x1b[0m\r\n\tx\x07\x1b]0;title\x07 room\x85\x9b1m")
    assert server.page(job_id)["error"] == "no\n\tx room"


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("value", "kept"),
    [
        *zip(("4711", 4711, 0, -1, 2**63 - 1), ("4711", "4711", "0", "-1", str(2**63 - 1)), strict=True),
        *zip((True, 1.5, [], ["1"], {}), repeat(None)),
    ],
)
def test_a_server_id_is_text_or_an_integer_or_dropped(
    server: Server, job_id: str, value: object, kept: str | None
) -> None:
    server.report(job_id, "vm_created", server_id=value)
    assert server.job(job_id)["server_id"] == kept


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8::7", "2001:db8::7"),
        *zip(("192.0.2", "192.0.2.7/24", "host", "fe80::1%eth0", " ", 3232235521, True, []), repeat(None)),
    ],
)
def test_an_address_that_is_none_is_dropped(
    server: Server, job_id: str, value: object, kept: str | None
) -> None:
    server.report(job_id, "vm_created", server_ip=value, tailscale_ip=value)
    job = server.job(job_id)
    assert (job["server_ip"], job["tailscale_ip"]) == (kept, kept)
    assert "server_ip" not in server.page(job_id)


def test_what_a_callback_does_not_say_again_stays_known(server: Server, job_id: str) -> None:
    server.report(job_id, "vm_created", server_id=1, server_ip="192.0.2.7")
    server.report(job_id, "running", server_id=[], server_ip="", tailscale_ip="100.64.0.7", new={"field": 1})
    job = server.job(job_id)
    assert [job[name] for name in ("server_id", "server_ip", "tailscale_ip")] == [
        "1",
        "192.0.2.7",
        "100.64.0.7",
    ]


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"workflow_run_id": 7}, {"workflow_run_id": "007"}),
        ({"workflow_run_id": "7", "run_attempt": "1"}, {"workflow_run_id": 7}),
        ({"workflow_run_id": 7, "run_attempt": 2}, {"workflow_run_id": "7", "run_attempt": "0002"}),
        ({"workflow_run_id": 0}, {"workflow_run_id": "000"}),
        ({"workflow_run_id": 2**63 - 1}, {"workflow_run_id": str(2**63 - 1)}),
        ({"workflow_run_id": "9" * 20}, {"workflow_run_id": "9" * 20, "run_attempt": 1}),
        ({"run_attempt": 0}, {"run_attempt": "alone it is ignored"}),
        ({"run_attempt": 2}, {}),
    ],
)
def test_a_run_is_a_number_however_it_is_written(
    server: Server, job_id: str, one: dict[str, object], same: dict[str, object]
) -> None:
    assert not server.report(job_id, "provisioning", **one)
    assert server.report(job_id, "provisioning", **same)
    assert server.page(job_id)["attempt"] == 1


# Malformed HTTP


def say(server: Server, request: bytes) -> bytes:
    """What comes back for these bytes, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        answer = b""
        with suppress(ConnectionResetError, BrokenPipeError):  # by a server that has heard enough
            connection.sendall(request)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65_536):
                answer += part
    return answer


@pytest.mark.one_database
@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: {less}\r\n\r\n{body}",
        "Content-Length: {more}\r\n\r\n{body}",
        "Content-Length: x\r\n\r\n{body}",
        "Content-Length: -1\r\n\r\n{body}",
        "Content-Length: +{size}\r\n\r\n{body}",
        "Content-Length: {size}, {size}\r\n\r\n{body}",
        "Content-Length: {size}\r\nContent-Length: {more}\r\n\r\n{body}",
        "Content-Length: {size}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\r\n\r\n",
        "\r\n{body}",
        "Transfer-Encoding: chunked\r\n\r\n{body}",
        "Transfer-Encoding: chunked\r\n\r\nxyz\r\n{body}\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n-1\r\n{body}\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}",
        "Transfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}x\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffff\r\n{body}\r\n0\r\n\r\n",
        "Transfer-Encoding: x\r\n\r\n{body}",
        "X-Giant: {giant}\r\nContent-Length: {size}\r\n\r\n{body}",
        "Bad Header: x\r\nContent-Length: {size}\r\n\r\n{body}",
        "X-Nul: \0\r\nContent-Length: {size}\r\n\r\n{body}",
    ],
)
def test_malformed_http_is_never_a_200_and_stores_nothing(server: Server, job_id: str, framing: str) -> None:
    body = callback(job_id).decode()
    head = (
        f"POST {CALLBACKS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Signature: {sign(body.encode())}\r\n"
    )
    size = len(body)
    sizes = {"size": size, "hex": f"{size:x}", "less": size - 1, "more": size + 1}
    answer = say(server, (head + framing.format(body=body, giant="x" * 100_000, **sizes)).encode())
    assert b" 200 OK" not in answer and b"Traceback" not in answer
    assert not is_known(server, job_id)
    server.report(job_id, "provisioning")


@pytest.mark.one_database
@pytest.mark.parametrize(
    "line",
    [
        "POST {path}?{giant} HTTP/1.1",
        "POST {path} HTTP/9.9",
        "POST {path}",
        "POST",
        "P@ST {path} HTTP/1.1",
        "post {path} HTTP/1.1",
    ],
)
def test_a_malformed_request_line_is_never_a_200(server: Server, job_id: str, line: str) -> None:
    body = callback(job_id)
    head = line.format(path=CALLBACKS, giant="x" * 10_000)
    headers = f"Host: x\r\nConnection: close\r\nX-Signature: {sign(body)}\r\nContent-Length: {len(body)}"
    answer = say(server, f"{head}\r\n{headers}\r\n\r\n".encode() + body)
    assert b" 200 OK" not in answer and b"Traceback" not in answer
    assert not is_known(server, job_id)


# The database


@contextmanager
def held(database_url: str) -> Iterator[None]:
    """Somebody else has the database for as long as this lasts."""
    other: sqlite3.Connection | psycopg.Connection[Any]
    if database_url.startswith("sqlite"):
        other = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
    else:
        other = psycopg.connect(database_url)
        other.execute("LOCK TABLE jobs")
    yield
    other.rollback()
    other.close()


@pytest.mark.slow
def test_a_database_that_cannot_take_it_now_is_a_503_with_nothing_written(
    server: Server, job_id: str
) -> None:
    with held(server.database_url):
        answer = server.post(callback(job_id))
    check_refusal(answer, 503, "database")
    assert int(answer.headers["Retry-After"]) > 0
    assert not is_known(server, job_id)
    assert not server.report(job_id, "provisioning"), "not a duplicate: it was not kept"


def test_who_waits_for_anothers_transaction_holds_up_nobody_else(server: Server, job_id: str) -> None:
    with ThreadPoolExecutor(1) as runner, held(server.database_url):
        answer = runner.submit(server.post, callback(job_id))
        for _ in range(50):  # the first may come before the callback does
            assert requests.get(f"{server.url}/sign-in", timeout=30).ok
        assert not answer.done(), "the pages were answered while the callback waited"
    assert answer.result().ok
    assert is_known(server, job_id)


# Many at once


def together(server: Server, bodies: list[bytes]) -> list[bool]:
    """Send them all at the same moment; for each, whether it was a duplicate."""
    start = Barrier(len(bodies))

    def send(body: bytes) -> bool:
        start.wait()
        answer = server.post(body)
        assert answer.ok, answer.text
        return bool(answer.json()["duplicate"])

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(send, bodies))


def test_of_the_same_milestone_sent_32_times_at_once_one_counts(server: Server, job_id: str) -> None:
    duplicates = together(server, [callback(job_id, remark=number) for number in range(32)])
    assert sorted(duplicates) == [False] + [True] * 31


def test_32_jobs_at_once_are_all_kept(server: Server, job_id: str) -> None:
    ids = [f"{job_id}-{number}" for number in range(32)]
    assert not any(together(server, [callback(id) for id in ids]))
    assert all(server.job(id)["status"] == "provisioning" for id in ids)


def test_all_milestones_of_a_job_at_once_give_the_page_of_the_last(server: Server, job_id: str) -> None:
    steps = ["vm_created", "network_configured", "ansible_started", "ansible_complete"]
    bodies = [callback(job_id), *(callback(job_id, step=step) for step in steps)]
    assert not any(together(server, [*bodies, callback(job_id, status="running")]))
    assert server.states(job_id) == ["completed"] * 5


# What a workflow runs

SNIPPET = r"""
BODY=$(jq -n --arg job_id "$JOB_ID" --arg error "$ERROR" '{job_id: $job_id, status: "failed", error: $error}')
SIGNATURE=$(echo -n "$BODY" | openssl dgst -sha256 -hmac "$GH_CALLBACK_SECRET" -hex | awk '{print $NF}')
curl -sf -X POST "$CALLBACK_URL" \
  -H "Content-Type: application/json" \
  -H "X-Signature: $SIGNATURE" \
  -d "$BODY"
"""


def bash(server: Server, job_id: str, script: str) -> str:
    missing = [tool for tool in ("bash", "jq", "openssl", "curl") if not shutil.which(tool)]
    assert not missing, (
        f"The workflow's snippet needs {', '.join(missing)}: apt-get install {' '.join(missing)}"
    )
    said = {"JOB_ID": job_id, "GH_CALLBACK_SECRET": KEY, "CALLBACK_URL": server.url + CALLBACKS}
    environ = {"PATH": server.environ["PATH"], "ERROR": '"quoted" $(id) \'é\\n😀\nnext line'} | said
    done = subprocess.run(
        ["bash", "-eu", "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.one_database
def test_the_snippet_of_a_workflow_is_taken_as_it_is(server: Server, job_id: str) -> None:
    assert json.loads(bash(server, job_id, SNIPPET))["received"] is True
    assert json.loads(bash(server, job_id, SNIPPET))["duplicate"]
    assert server.page(job_id)["error"] == '"quoted" $(id) \'é\\n😀\nnext line'


@pytest.mark.one_database
def test_the_readmes_snippet_works(server: Server, job_id: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if "openssl" in block)
    bash(server, job_id, snippet)
    assert server.states(job_id)[1] == "completed"


# Last, after all of the above


@pytest.mark.one_database
def test_no_secret_and_no_link_is_in_the_log(server: Server, job_id: str) -> None:
    server.report(job_id, "failed", error="an error that may hold a secret")
    link = server.link(job_id)
    requests.get(link, timeout=30)
    for request in (
        f"GET {link} HTTP/9.9\r\n\r\n",
        f"GET {link}\r\n\r\n",
        f"GET {link}/{'x' * 9000}\r\n\r\n",
    ):
        say(server, request.encode())
    for value in (
        f"Bearer {OPERATOR_TOKEN}\0",
        f"Bearer {OPERATOR_TOKEN}\r x",
        "x" * 99_000 + OPERATOR_TOKEN,
    ):
        say(server, f"GET /api/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: {value}\r\n\r\n".encode())
    requests.get(server.url, headers={"Authorization": f"Bearer {OPERATOR_TOKEN}"}, timeout=30)
    log = server.log.read_text()
    assert job_id in log, "a line says which job a callback was about"
    told = (KEY, OPERATOR_TOKEN, server.environ["SECRET_KEY"], link.rsplit(".", 1)[1], sign(b""), "may hold")
    assert [secret for secret in told if secret in log] == []
    assert "Traceback" not in log


@pytest.mark.one_database
def test_no_spelling_of_the_path_is_redirected(server: Server, job_id: str) -> None:
    body = json.dumps({"job_id": job_id, "status": "provisioning"}).encode()
    headers = {"X-Signature": sign(body)}
    answer = requests.post(
        server.url + "/api//webhooks/github", data=body, headers=headers, allow_redirects=False, timeout=30
    )
    assert answer.status_code == 404
