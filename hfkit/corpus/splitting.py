"""What of a corpus is held out: chosen by content, so that no copy of it is trained on."""

import hashlib

import numpy as np

_MOST = 1e6  # bytes that are held out: more would not make a measurement better
_LEAST = 100  # bytes: less would not be worth a measurement
_DRAWS = 64


def content_of(text: str) -> int:
    """A 64-bit hash of a text without its case and white space: copies have the same."""
    letters = "".join(text.split()).casefold().encode()
    return int.from_bytes(hashlib.blake2b(letters, digest_size=8).digest(), "big", signed=True)


def hold_out(units: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows to train on and rows to hold out.

    About `fraction` of the units is held out, chosen by `seed` so that they are about that fraction of the bytes, too;
    at least one unit and at most a megabyte. Nothing is held out of fewer than four units.

    Args:
        units: (rows,) rows with the same number stay together, such as copies.
        sizes: (rows,) bytes.
    """
    units = np.unique(units, return_inverse=True)[1]
    bulk = np.bincount(units, sizes)
    wanted = min(fraction * sizes.sum(), _MOST)
    if not wanted or len(bulk) < 4:
        return np.arange(len(units)), np.zeros(0, np.int64)
    count = max(1, min(round(len(bulk) * wanted / sizes.sum()), len(bulk) // 2))
    draw = np.random.default_rng(seed)
    chosen, best = np.zeros(0, np.int64), np.inf
    for _ in range(_DRAWS):
        drawn = draw.choice(len(bulk), count, replace=False)
        excess = bulk[drawn].sum() - wanted
        error = max(-excess, 2 * excess)  # too much is worse than too little
        if error < best:
            chosen, best = drawn, error
        if best <= wanted / 4:
            break
    held = np.isin(units, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_texts(
    documents: np.ndarray, contents: np.ndarray, sizes: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Choose what to hold out of texts: whole documents; where documents are few, the end of the largest one.

    Args:
        documents: (rows,) number of the document that each row is a piece of, in order.
        contents: (rows,) `content_of` each row.
        sizes: (rows,) bytes.

    Returns:
        (rows,) which share of each row is held out, at its end: 0 where all of it is trained on, 1 where nothing is.
    """
    shares = np.zeros(len(documents))
    wanted = min(fraction * sizes.sum(), _MOST)
    if wanted < _LEAST:
        return shares
    starts = np.flatnonzero(np.diff(documents, prepend=-1))  # the first row of each document
    units = _number_copies(contents, starts)
    bulk = np.bincount(units, sizes)
    if len(bulk) * wanted >= sizes.sum():  # at least one whole document
        shares[hold_out(units, sizes, fraction, seed)[1]] = 1
        return shares
    largest = np.argmax(bulk / np.bincount(units[starts]))
    copies = documents[starts][units[starts] == largest]
    each = min(wanted, bulk[largest] / 2) / len(copies)
    for copy in copies:
        rows = np.flatnonzero(documents == copy)
        after = sizes[rows][::-1].cumsum()[::-1] - sizes[rows]  # bytes of the document after each row
        shares[rows] = ((each - after) / sizes[rows]).clip(0, 1)
    return shares


def _number_copies(contents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(rows,) the same number for all rows of a document, which begin at `starts`, and of its copies."""
    counts = np.diff(starts, append=len(contents))
    places = np.arange(len(contents)) - np.repeat(starts, counts)
    # Odd factors keep the order of the rows in the sum. 64-bit arithmetic wraps around.
    wholes = np.add.reduceat(contents.astype(np.uint64) * (2 * places + 1).astype(np.uint64), starts)
    return np.repeat(np.unique(wholes, return_inverse=True)[1], counts)
