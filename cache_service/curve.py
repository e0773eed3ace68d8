"""The cluster secret and the CURVE keys derived from it: who may talk to a worker or a cache server.

Every process of a cluster that holds the secret derives the same two key pairs, so nothing but the secret's
file has to be distributed. Pure functions; no sockets here.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import zmq
from zmq.utils import z85

SECRET_BYTES = 32

Role = Literal["server", "client"]


class SecretFileError(Exception):
    """The file of the cluster secret cannot be used; the message says why and what to change."""


@dataclass(frozen=True)
class CurveKeys:
    """One CURVE key pair, z85-encoded as zmq wants it."""

    public: bytes
    secret: bytes = field(repr=False)


def curve_keys(cluster_secret: bytes, role: Role) -> CurveKeys:
    """Return the key pair that all holders of `cluster_secret` share for one role."""
    if len(cluster_secret) != SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(cluster_secret)} bytes; it needs {SECRET_BYTES}")
    derived = hashlib.blake2b(
        role.encode(), key=cluster_secret, digest_size=SECRET_BYTES, person=b"eyrie-curve"
    ).digest()
    secret = z85.encode(derived)
    return CurveKeys(zmq.curve_public(secret), secret)


def new_cluster_secret() -> bytes:
    """Return a fresh secret from the operating system's randomness."""
    return secrets.token_bytes(SECRET_BYTES)


def write_cluster_secret(path: Path, cluster_secret: bytes) -> None:
    """Write a secret only its owner can read; raise FileExistsError rather than replace one."""
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(cluster_secret.hex() + "\n", encoding="ascii")


def read_cluster_secret(path: Path) -> bytes:
    """Read what `write_cluster_secret` wrote (or 64 hex digits put there by hand)."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
        cluster_secret = bytes.fromhex(text)
    except OSError as error:
        raise SecretFileError(
            f"secret file {path}: {error.strerror}; every node needs a readable copy"
        ) from None
    except ValueError:
        raise SecretFileError(f"secret file {path}: expected {2 * SECRET_BYTES} hex digits") from None
    if mode & 0o077:
        raise SecretFileError(f"secret file {path}: mode {mode & 0o777:o} lets others in; chmod 600 it")
    if len(cluster_secret) != SECRET_BYTES:
        raise SecretFileError(f"secret file {path}: {len(text)} hex digits; expected {2 * SECRET_BYTES}")
    return cluster_secret
