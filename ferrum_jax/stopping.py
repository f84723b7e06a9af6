"""Stop strings in a stream: text is held back while it could still become one."""

from __future__ import annotations

from ferrum_jax.tokenizer import TextStream


class StopText:
    """The text of one row, cut at the first stop string, which is not given out."""

    def __init__(self, stream: TextStream, stop: tuple[str, ...]) -> None:
        """Start empty.

        Args:
          stream: decodes tokens to text, whole characters at a time.
          stop: strings that end the text.
        """
        self.stopped = False
        self._stream, self._stop, self._held = stream, stop, ""

    def push(self, token: int) -> str:
        """Take a token; returns the text that is certain, and sets `stopped` when a stop string is complete."""
        return self._add(self._stream.push(token), final=False)

    def flush(self) -> str:
        """End the text; returns what was held back."""
        return self._add(self._stream.flush(), final=True)

    def _add(self, piece: str, final: bool) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of the whole stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
