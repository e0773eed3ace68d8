"""SanitizerError: what KVSanitizer and its MoveShadow raise."""


class SanitizerError(RuntimeError):
    """A page is not what a step takes it for: a bug of ours. `check` names the rule that was broken."""

    def __init__(self, check: str, slot: int | None, page: int, expected: str, found: str) -> None:
        super().__init__(f"{check}: slot {slot}, page {page}: expected {expected}, found {found}")
        self.check = check
        self.slot = slot
        self.page = page
        self.expected = expected
        self.found = found
