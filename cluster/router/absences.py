"""Absences: how long replicas are away, as those that came back have shown: when to send a request again.

Used on the event loop.
"""

from workers.protocol import ReplicaId

FIRST_GUESS_S = 10.0
"""Until one has come back: a small model on CPU takes so long."""
LEAST_S = 1.0


class Absences:
    """Replicas that have lost their worker, from `left` to `returned`."""

    def __init__(self) -> None:
        self._usual_s = FIRST_GUESS_S
        self._left_s: dict[ReplicaId, float] = {}

    def left(self, replica_id: ReplicaId, now_s: float) -> None:
        """Note that a replica is lost, or that its restart has failed and begins anew."""
        self._left_s[replica_id] = now_s

    def returned(self, replica_id: ReplicaId, now_s: float) -> None:
        """Note that its next worker serves."""
        left_s = self._left_s.pop(replica_id, None)
        if left_s is not None:
            self._usual_s = now_s - left_s

    def retry_after_s(self, now_s: float) -> float:
        """Return when the first of those away may be back; never below LEAST_S."""
        first_s = min(self._left_s.values(), default=now_s)
        return max(LEAST_S, first_s + self._usual_s - now_s)
