"""Generation, side by side with what a user would write instead: `python tests/benchmarks/generation.py`.

Every figure is a ratio of two measurements that took turns in this one run. Prints a Markdown table; `--fast` makes
fewer rounds.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
PROMPT = "Hello, my name is"
SCRIPT = """
from transformers import GPT2LMHeadModel, GPT2Tokenizer
tokenizer = GPT2Tokenizer.from_pretrained({folder!r})
model = GPT2LMHeadModel.from_pretrained({folder!r}, dtype="float32")
inputs = tokenizer({prompt!r}, return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens={tokens}, do_sample=True, pad_token_id=0)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""


def make_small(folder: Path) -> str:
    """GPT-2-small's sizes with random weights; no end-of-text token, so that every run has the same length."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "<|endoftext|>"]
    words += [f"w{i}" for i in range(50257 - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=words[256]).save_pretrained(folder)
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None))
    model.save_pretrained(folder)
    return str(folder)


def seconds(command: list[str]) -> float:
    """Wall time of a whole process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(rounds: int, plain: Callable[[], float], ours: Callable[[], float]) -> tuple[float, float, float]:
    """Medians of both after a warm-up, and the median of the pairs' ratios plain/ours."""
    plain(), ours()
    pairs = [(plain(), ours()) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def compare_process(rounds: int, folder: str, model: str, tokens: int) -> tuple[float, float, float]:
    script = [sys.executable, "-c", SCRIPT.format(folder=folder, prompt=PROMPT, tokens=tokens)]
    hfkit = [sys.executable, "-m", "hfkit", "generate", PROMPT, "-m", model, "-n", str(tokens), "-q"]
    return in_turn(rounds, lambda: seconds(script), lambda: seconds(hfkit))


def compare_many(rounds: int, folder: str, count: int, tokens: int) -> tuple[float, float, float]:
    """The script's body in a loop over the prompts against hfkit.generate of the list."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    import hfkit

    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype="float32")
    lm = hfkit.load(folder)
    # In this vocabulary a byte is a token, so these are as long as prompts of a line in GPT-2's own.
    prompts = [f"Hello {i}" + " and so" * (i % 3) for i in range(count)]

    def loop() -> None:
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=tokens, do_sample=True, pad_token_id=0)

    def batch() -> None:
        hfkit.generate(prompts, model=lm, max_new_tokens=tokens)

    return in_turn(rounds, lambda: timed(loop), lambda: timed(batch))


def compare_precision(rounds: int, folder: str, quantize: str, tokens: int) -> tuple[float, float, float]:
    """One stream in float32 against the same in 8 or 4 bits."""
    import hfkit

    full, small = hfkit.load(folder), hfkit.load(folder, quantize=quantize)

    def run(lm: hfkit.LanguageModel) -> float:
        return timed(lambda: hfkit.generate(PROMPT, model=lm, max_new_tokens=tokens))

    return in_turn(rounds, lambda: run(full), lambda: run(small))


def perplexity_change(quantize: str) -> float:
    """Relative change of the bundled model's perplexity over 512 tokens of a text that it was not trained on."""
    import torch

    import hfkit

    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    losses = []
    for lm in (hfkit.load("bundled"), hfkit.load("bundled", quantize=quantize)):
        ids = torch.tensor(lm.tokenizer(text, verbose=False)["input_ids"][:512])
        with torch.inference_mode():
            # Token by token, as generation does it: the integer kernel is for few rows.
            cache, loss = None, 0.0
            for token, following in zip(ids, ids[1:], strict=False):
                output = lm.model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                loss -= output.logits[0, -1].log_softmax(-1)[following].item()
        losses.append(loss / (len(ids) - 1))
    return abs(math.exp(losses[1] - losses[0]) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one round each")
    rounds = 1 if parser.parse_args().fast else 3
    print("| what | plain | hfkit | ratio | goal |\n|---|---|---|---|---|", flush=True)

    def row(what: str, figures: tuple[float, float, float], goal: str) -> None:
        plain, ours, ratio = figures
        print(f"| {what} | {plain:.2f} s | {ours:.2f} s | {ratio:.2f} | {goal} |", flush=True)

    from hfkit.models.sources import BUNDLED

    help_command = [sys.executable, "-m", "hfkit", "--help"]
    bare = [sys.executable, "-c", "import typer"]
    row("`hfkit --help`, beside `import typer`", in_turn(rounds, lambda: seconds(bare), lambda: seconds(help_command)),
        "≤ 0.3 s")  # fmt: skip
    row("`hfkit generate`, bundled model, whole process", compare_process(rounds, str(BUNDLED), "bundled", 100),
        "≥ 0.91")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        small = make_small(Path(temporary))
        row("the same, GPT-2-small size", compare_process(rounds, small, small, 100), "≥ 0.95")
        row("64 prompts, GPT-2-small size", compare_many(rounds, small, 64, 16), "≥ 6")
        row("int8 beside float32, one stream", compare_precision(rounds, small, "int8", 100), "≥ 2")
        row("int4 beside float32, one stream", compare_precision(rounds, small, "int4", 100), "")
    for bits in ("int8", "int4"):
        print(f"| perplexity of the bundled model in {bits} | | | moves {perplexity_change(bits):.2%} | |")


if __name__ == "__main__":
    main()
