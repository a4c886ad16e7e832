"""What a run is given, checked before anything is ordered."""

import base64
import binascii
import hashlib
import os
import re
import subprocess

from runner import ProvisioningError, setting

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # Milepost's rule, exactly
IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]{0,254}")  # what a unit file takes without quoting
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
HASHED = "sha256."
PACKAGES = "https://pkgs.tailscale.com/stable/debian"
LONGEST_LINE = 65_000  # bytes; Docker reads lines of at most 64 KiB
PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.*?)-----END \1-----", re.DOTALL)


def identifier(name: str) -> str:
    """Return an input that is safe in a name or a file: what Milepost takes as a job id."""
    value = os.environ.get(name, "")
    if not IDENTIFIER.fullmatch(value):
        raise ProvisioningError(
            f"{name.lower()} is not 1 to 64 letters, digits, '.', '_' or '-', "
            f"the first a letter or digit: {value[:80]!r}"
        )
    return value


def label(value: str) -> str:
    """Return an identifier as Hetzner takes it in a label, one for each.

    https://docs.hetzner.cloud/reference/cloud#labels allows 63 characters, the last a letter or digit.
    """
    if LABEL.fullmatch(value) and not value.startswith(HASHED):
        return value
    return HASHED + hashlib.sha256(value.encode()).hexdigest()[:48]


def hostname(job_id: str) -> str:
    """Return a name that Hetzner, DNS and Tailscale accept unchanged, for any job id."""
    return "agent-" + hashlib.sha256(job_id.encode()).hexdigest()[:12]


def packages_url() -> str:
    """Return where Tailscale's packages for Debian are."""
    return setting("TAILSCALE_PACKAGES_URL", PACKAGES)


def agent_image() -> str:
    """Return AGENT_IMAGE, the reference of the container image that is the agent."""
    image = setting("AGENT_IMAGE")
    if not IMAGE.fullmatch(image):
        raise ProvisioningError(f"AGENT_IMAGE is not an image reference: {image[:80]!r}")
    return image


def agent_environment() -> list[str]:
    """Return AGENT_ENVIRONMENT as lines that `docker run --env-file` takes.

    Its rules: https://github.com/docker/cli/blob/master/pkg/kvfile/kvfile.go. An error names the
    number of a line and never its text, which is a secret.
    """
    lines = [line.lstrip(" \t") for line in os.environ.get("AGENT_ENVIRONMENT", "").splitlines()]
    for number, line in enumerate(lines, 1):
        name, equals, _ = line.partition("=")
        problem = ""
        if not line or line.startswith("#"):
            continue
        if not equals:
            problem = "has no “=”: each line is NAME=value, and a value has one line"
        elif not name:
            problem = "has no name before its “=”"
        elif re.search(r"\s", name):
            problem = "has a space in its name"
        elif len(line.encode(errors="replace")) > LONGEST_LINE or "\0" in line:
            problem = "is longer than 64 KiB or not text"
        if problem:
            raise ProvisioningError(f"AGENT_ENVIRONMENT: line {number} {problem}")
    return lines


def private_key() -> str:
    """Return SSH_PRIVATE_KEY as OpenSSH reads it, however it was pasted.

    Line ends of Windows, `\\n` as two characters, lost line breaks and base64 around it all are mended.
    """
    text = setting("SSH_PRIVATE_KEY").strip().strip("'\"").strip()
    if "-----" not in text and (decoded := _decoded(text)):
        text = decoded
    text = text.replace("\\r", "").replace("\\n", "\n").replace("\r", "\n")
    found = PRIVATE_KEY.search(text)
    if not found:
        raise ProvisioningError(f"SSH_PRIVATE_KEY {_what_it_is(text)}")
    kind, body = found.groups()
    lines = body.strip().split("\n") if ":" in body else body.split()  # headers of old keys have spaces
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", ""])


def public_key() -> str:
    """Return the public half of SSH_PRIVATE_KEY, which never touches a file here."""
    key, command = private_key(), ["ssh-keygen", "-y", "-P", "", "-f", "/dev/stdin"]
    made = subprocess.run(command, input=key, capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return made.stdout.strip()
    if _is_encrypted(key):
        raise ProvisioningError(
            "SSH_PRIVATE_KEY has a passphrase, which nobody can type here: make one with ssh-keygen -N ''"
        )
    raise ProvisioningError(
        "SSH_PRIVATE_KEY begins and ends like a private key, but is damaged or cut: ssh-keygen cannot read it"
    )


def _is_encrypted(key: str) -> bool:
    """Say whether a key has a passphrase: ssh-keygen calls it damaged when it comes through a pipe.

    https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.key: magic, then the cipher's name.
    """
    if "OPENSSH" not in key:
        return "ENCRYPTED" in key
    body = "".join(key.splitlines()[1:-1])
    try:
        begin = base64.b64decode(body[:60])
    except ValueError:
        return False
    return begin.startswith(b"openssh-key-v1\0") and not begin[19:].startswith(b"none")


def _decoded(text: str) -> str:
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return decoded if "-----" in decoded else ""


def _what_it_is(text: str) -> str:
    if re.match(r"(ssh|ecdsa|sk)-\S+ AAAA|.*-----BEGIN (SSH2 |RSA )?PUBLIC KEY|---- BEGIN SSH2", text):
        return "is a public key: the secret is the other file, without .pub"
    if text.startswith("PuTTY-User-Key-File"):
        return "is a key of PuTTY's: export it in OpenSSH's format, or make one with ssh-keygen"
    if "-----BEGIN CERTIFICATE" in text:
        return "is a certificate, not a private key"
    if "PRIVATE KEY-----" in text:
        return "is only a part of a private key: its first or last line is missing"
    return "is not a private key: its first line would be -----BEGIN OPENSSH PRIVATE KEY-----"
