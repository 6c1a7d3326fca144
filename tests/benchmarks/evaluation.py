"""Evaluation, side by side with what a user would write instead: `python tests/benchmarks/evaluation.py`.

A GPT-2 of the small size with random weights reads source code of Python's own library in windows of 1024 tokens: by a
loop over the windows in float32, one at a time, by `hfkit.evaluate`, and by that in float32. They take turns in one
process. Prints a Markdown table; `--fast` takes a twentieth of the text, once. For figures leave the machine alone.
"""

import argparse
import math
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
WINDOW = 1024


def make_small(folder: Path) -> str:
    """GPT-2-small's sizes, random weights, the bundled model's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    import hfkit

    tokenizer = hfkit.load("bundled").tokenizer
    end = tokenizer.eos_token_id
    set_seed(0)
    GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_text(path: Path, size: int) -> Path:
    """So many bytes, or nearly, as one document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = "".join(file.read_text("ascii", "ignore") for file in sorted(library.glob("*.py")))
    path.write_text(sources[:size])
    return path


def plain(model: Any, tokenizer: Any, path: Path) -> float:
    """The perplexity of a text by a loop over the same windows; the last one reaches back."""
    import torch
    from torch.nn.functional import cross_entropy

    ids = [tokenizer.bos_token_id, *tokenizer(path.read_text(), verbose=False)["input_ids"]]
    total, done = 0.0, 0
    with torch.inference_mode():
        while done < len(ids) - 1:
            end = min(max(done + WINDOW, WINDOW), len(ids) - 1)
            start = max(0, end - WINDOW)
            logits = model(torch.tensor([ids[start:end]])).logits[0, done - start :]
            total += cross_entropy(logits, torch.tensor(ids[done + 1 : end + 1]), reduction="sum").item()
            done = end
    return math.exp(total / done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=300_000, help="bytes of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="a twentieth of the text, one round")
    options = parser.parse_args()
    size, rounds = (options.size // 20, 1) if options.fast else (options.size, options.rounds)

    from generation import in_turn, timed  # beside this file

    import hfkit

    with tempfile.TemporaryDirectory() as temporary:
        folder, path = make_small(Path(temporary)), write_text(Path(temporary) / "text.txt", size)
        reference = hfkit.load(folder, device="cpu", dtype="float32")
        print("| what | plain | hfkit | ratio | goal | perplexity | goal |\n|---|---|---|---|---|---|---|", flush=True)
        for dtype, faster, closer in (("auto", 1.8, 2e-3), ("float32", 1.0, 1e-4)):
            asked = hfkit.ModelOptions(model=folder, device="cpu", dtype=dtype)
            found: dict[str, Any] = {}

            def loop(found: dict[str, Any] = found) -> None:
                found["plain"] = plain(*reference, path)

            def ours(found: dict[str, Any] = found, asked: hfkit.ModelOptions = asked) -> None:
                found["ours"] = hfkit.evaluate(path, model=asked)

            before, after, ratio = in_turn(rounds, lambda: timed(loop), lambda: timed(ours))  # noqa: B023
            apart = abs(found["ours"].perplexity / found["plain"] - 1)
            what = (
                f"`hfkit evaluate`, --dtype {dtype}, which was {found['ours'].dtype}, {found['ours'].tokens:,} tokens"
            )
            print(f"| {what} | {before:.1f} s | {after:.1f} s | {ratio:.2f} | ≥ {faster} | {apart:.1e} apart "
                  f"| ≤ {closer:.0e} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
