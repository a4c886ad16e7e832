"""The operator's sessions: opened at a sign-in, ended at a sign-out, known to every process.

The database has hashes alone: whoever reads it, or a backup, cannot sign in with what it says.
"""

import hashlib
from time import time

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from webapp.storage.tables import sessions
from webapp.storage.transaction import Transaction
from webapp.storage.writer import Writer

LASTS = 12 * 3600  # seconds


def hash_of(secret: str) -> str:
    """What the database keeps of a random secret of ours."""
    return hashlib.sha256(secret.encode()).hexdigest()


def open_session(writer: Writer, secret: str, fingerprint: str, key: str | None, replaced: str) -> bool:
    """Open a session, in place of the one that this client has; False where the link's key was used before.

    Rows stay until a link that opened them has long expired, so that no key works twice.
    """
    now, key_hash = time(), hash_of(key) if key else None
    row = {"hash": hash_of(secret), "key_hash": key_hash, "fingerprint": fingerprint, "opened_at": now}

    def change(transaction: Transaction) -> None:
        transaction.connection.execute(sessions.delete().where(sessions.c.opened_at < now - LASTS))
        end_session(transaction, replaced)
        transaction.connection.execute(sessions.insert(), row)

    try:
        writer.run(change)
    except IntegrityError:  # the unique key_hash, whichever process stored it
        return False
    return True


def end_session(transaction: Transaction, secret: str) -> None:
    """Sign out."""
    which = (sessions.c.hash == hash_of(secret)) & sessions.c.ended_at.is_(None)
    transaction.connection.execute(sessions.update().where(which).values(ended_at=time()))


def is_open(connection: Connection, secret: str, fingerprint: str) -> bool:
    """Whether a session goes on: not ended, not too old, and opened with the operator token of today."""
    which = (sessions.c.hash == hash_of(secret)) & sessions.c.ended_at.is_(None)
    which &= (sessions.c.fingerprint == fingerprint) & (sessions.c.opened_at > time() - LASTS)
    return connection.scalar(select(sessions.c.hash).where(which)) is not None
