"""Where a long text may be cut: only where a tokenizer ends a token in any case."""

import re

_PIECE, _LONGEST = 4000, 16_000  # characters of a piece; _LONGEST where there is no good place to cut
_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # as in Unicode
# GPT-2's pre-tokenizer always splits here, so cutting here cannot change the tokens.
_BORDER = re.compile(rf"[^\s](?=[{_SPACE}])|[^\W_](?=[^\w\s])")


def cut_text(text: str, size: int) -> list[str]:
    """Pieces of the first `size` characters of a text that may go on, and then the rest."""
    pieces, start = [], 0
    while size > start + 2 * _PIECE and (end := _find_cut(text, start, size)):
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _find_cut(text: str, start: int, size: int) -> int:
    """Where the piece that starts at `start` ends; 0 if the first `size` characters do not show it."""
    low, high, last = start + _PIECE // 2, start + _PIECE, start + _LONGEST
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, low, high)
        end = low + len(text[low:end].rstrip(_SPACE)) if end > low else low
        if end > low:
            return end
    if border := _BORDER.search(text, high, min(size, last)):
        return border.end()
    return last if size > last else 0
