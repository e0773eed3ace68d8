"""The drafts under which tests serve, by name: as what a WorkerConfig says of them."""

from typing import Any

NUM_DRAFTS = 3

DRAFTS: dict[str, dict[str, Any]] = {
    "self": {"draft": "self", "draft_tokens": NUM_DRAFTS},
    "random-eagle3": {"draft": "random-eagle3", "draft_tokens": NUM_DRAFTS},
    "self-tree": {"draft": "self", "draft_tokens": NUM_DRAFTS, "draft_topk": 2},
    "random-eagle3-tree": {"draft": "random-eagle3", "draft_tokens": NUM_DRAFTS, "draft_topk": 3},
}
"""`self`, the target as its own draft, is right always, of a tree its chain; `random-eagle3` by chance."""


def is_perfect(name: str | None) -> bool:
    """Tell whether every token that such a draft guesses is the target's."""
    return name in ("self", "self-tree")


def draft_options(name: str | None, max_tokens_per_step: int) -> dict[str, Any]:
    """Return what a WorkerConfig says of a draft, less deep where steps have no tokens for all of a tree."""
    options = {} if name is None else DRAFTS[name]
    if options.get("draft_topk", 1) * options.get("draft_tokens", 0) >= max_tokens_per_step:
        return options | {"draft_tokens": 1}
    return options
