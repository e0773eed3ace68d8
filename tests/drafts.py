"""The drafts under which tests serve, by name: as what a WorkerConfig says of them."""

from typing import Any

NUM_DRAFTS = 3

DRAFTS: dict[str, dict[str, Any]] = {
    "self": {"draft": "self", "draft_tokens": NUM_DRAFTS},
    "random-eagle3": {"draft": "random-eagle3", "draft_tokens": NUM_DRAFTS},
}
"""`self`, the target as its own draft, is right always; `random-eagle3` by chance alone."""


def is_perfect(name: str | None) -> bool:
    """Tell whether every token that such a draft guesses is the target's."""
    return name == "self"
