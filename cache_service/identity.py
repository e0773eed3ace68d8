"""Who a cluster is: all that hold one secret."""

import hashlib


def cluster_id_of(cluster_secret: bytes) -> str:
    """Return the name under which holders of the secret find each other's files; it tells nothing of it."""
    return hashlib.blake2b(cluster_secret, digest_size=8, person=b"eyrie-cluster-id").hexdigest()
