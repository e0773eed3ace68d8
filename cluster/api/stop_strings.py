"""Stop strings over a stream of text pieces: cut at the first one, hold back what might become one."""

from collections.abc import Sequence


class StopStrings:
    """Scans one choice's text as it grows.

    The first stop string to be complete wins; of several complete at the same character, the longest. That
    depends on the text alone, never on how it was cut into pieces.

         text so far:   [ released | held ]
                                   ^ the longest end that begins some stop string
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "the schema refuses empty stop strings"
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """A stop string is complete: nothing after it is ever released."""
        return self._stopped

    def feed(self, piece: str) -> str:
        """Take the next piece of text, return what may be shown now; call no more once `stopped`."""
        assert not self._stopped
        if not self._stops:
            return piece
        text = self._held + piece
        cut = self._first_stop(text)
        if cut is not None:
            self._stopped = True
            self._held = ""
            return text[:cut]
        shown_len = len(text) - self._held_len(text)
        self._held = text[shown_len:]
        return text[:shown_len]

    def finish(self) -> str:
        """Return what was held back: the text ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Return where the first complete stop string begins."""
        first: tuple[int, int] | None = None  # (end, start): smallest end, then smallest start
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = (start + len(stop), start)
        return None if first is None else first[1]

    def _held_len(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins some stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
