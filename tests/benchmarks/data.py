"""Preparing a corpus, side by side with `tokenizers` alone: `python tests/benchmarks/data.py`.

Both read the same file in a process of its own, in turn, in this one run. Prints a Markdown table; `--fast` takes a
tenth of the corpus.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
PLAIN = """
import sys
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    while batch := [text for _ in range(1000) if (text := file.read(4000))]:
        tokenizer.encode_batch(batch)
"""


def write_corpus(path: Path, size: int) -> None:
    """So many bytes: the words of Python's own library with their white space, in another order each time."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = "".join(file.read_text("utf-8", "replace") for file in sorted(library.glob("*.py")))
    words = np.array(re.findall(r"\S+\s*", sources), object)
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for part in np.array_split(words[draw.permutation(len(words))], len(words) // 3000):
                file.write("".join(part) + "<|endoftext|>")


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and gigabytes at most of a whole process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1.0, help="gigabytes of text")
    parser.add_argument("--fast", action="store_true", help="a tenth of it")
    options = parser.parse_args()
    size = options.size * (0.1 if options.fast else 1)
    from hfkit.models.sources import BUNDLED

    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.txt"
        write_corpus(corpus, int(size * 1e9))
        plain = [sys.executable, "-c", PLAIN, str(BUNDLED / "tokenizer.json"), str(corpus)]
        figures: dict[str, list[tuple[float, float]]] = {"plain": [], "hfkit": []}
        for number, name in enumerate(("plain", "hfkit", "hfkit", "plain")):
            ours = [sys.executable, "-m", "hfkit", "prepare", str(corpus), "-q", "-o", f"{temporary}/{number}"]
            figures[name].append(measure(plain if name == "plain" else ours))
    (plain_time, plain_memory), (time_, memory) = (np.mean(figures[name], 0) for name in ("plain", "hfkit"))
    print("| what | plain | hfkit | ratio | goal |\n|---|---|---|---|---|")
    print(f"| `hfkit prepare` beside `tokenizers` alone, {size:g} GB | {plain_time:.1f} s | {time_:.1f} s "
          f"| {plain_time / time_:.2f} | ≥ 0.77 |")  # fmt: skip
    print(f"| most memory of these | {plain_memory:.2f} GB | {memory:.2f} GB | | ≤ 2.5 GB |")


if __name__ == "__main__":
    main()
