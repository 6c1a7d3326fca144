"""From Enter to the end of the process: `python tests/benchmarks/start.py`, on a machine that does nothing else.

Medians of 7 rounds (`--rounds`); in each round every command runs once, in turn. Prints wall time and processor time
of whole processes as a Markdown table. The plain script loads the same model with GPT2LMHeadModel and GPT2Tokenizer in
float32, and draws the same tokens. A warm command's processor time is that of its client and of its child.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generation import make_small

os.environ["HF_HUB_OFFLINE"] = "1"
PROMPT, TOKENS, SEED = "Hello, my name is", 50, 1
HFKIT = [sys.executable, "-m", "hfkit"]
PLAIN = f"""
import sys
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer
tokenizer = GPT2Tokenizer.from_pretrained(sys.argv[1])
model = GPT2LMHeadModel.from_pretrained(sys.argv[1], dtype=torch.float32)
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
torch.manual_seed({SEED})
output = model.generate(**inputs, max_new_tokens={TOKENS}, do_sample=True, top_k=0, pad_token_id=0)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def measure(command: list[str], env: dict[str, str], resident: int | None) -> tuple[float, float, str]:
    """Wall and processor time of a whole process in seconds, and its stdout."""
    with tempfile.TemporaryFile() as out:
        before, started = child_time(resident), time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env={**os.environ, **env})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} ended with {process.returncode}")
        time.sleep(0.2 if resident else 0)  # until its parent has counted the child
        out.seek(0)
        return wall, usage.ru_utime + usage.ru_stime + child_time(resident) - before, out.read().decode()


def child_time(resident: int | None) -> float:
    """Processor time of the children that have ended, in seconds."""
    if not resident:
        return 0.0
    fields = Path(f"/proc/{resident}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def generate(model: str, *more: str) -> list[str]:
    return [*HFKIT, "generate", PROMPT, "-m", model, "-n", str(TOKENS), "-s", str(SEED), "-q", *more]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fast", action="store_true", help="one round")
    options = parser.parse_args()
    from hfkit.models.sources import BUNDLED

    with tempfile.TemporaryDirectory() as temporary:
        small = make_small(Path(temporary))
        cold, warm = {"XDG_RUNTIME_DIR": f"{temporary}/none"}, {"XDG_RUNTIME_DIR": temporary}
        start = subprocess.run(
            [*HFKIT, "warm"], env={**os.environ, **warm}, capture_output=True, text=True, check=True
        )
        pid = int(start.stderr.split("process ")[1].split()[0])
        plain, plain_small = ([sys.executable, "-c", PLAIN, folder] for folder in (str(BUNDLED), small))
        full = {**cold, "HFKIT_FULL_IMPORTS": "1"}
        # What, command, environment, whether it is warm, what it is compared with, goal of the ratio or the seconds.
        rows = [
            ("plain script, bundled model", plain, {}, False, None, None),
            ("`hfkit generate`, cold", generate("bundled"), cold, False, 0, 0.55),
            ("the same, HFKIT_FULL_IMPORTS=1", generate("bundled"), full, False, 0, None),
            ("the same, warm", generate("bundled"), warm, True, 0, 0.12),
            ("plain script, GPT-2-small size", plain_small, {}, False, None, None),
            ("`hfkit generate`, cold", generate(small), cold, False, 4, 0.75),
            ("the same, warm", generate(small), warm, True, 4, None),
            ("`hfkit --help`, cold", [*HFKIT, "--help"], cold, False, None, 0.2),
            ("`hfkit generate --help`, cold", [*HFKIT, "generate", "--help"], cold, False, None, 0.25),
            ("`hfkit generate --help`, warm", [*HFKIT, "generate", "--help"], warm, True, None, None),
        ]
        try:
            rounds = []
            for number in range(1 + (1 if options.fast else options.rounds)):
                results = [measure(command, env, pid if is_warm else None) for _, command, env, is_warm, *_ in rows]
                if len({text for *_, text in results[:4]}) > 1 or len({text for *_, text in results[4:7]}) > 1:
                    sys.exit("the texts differ")
                rounds += [results] if number else []  # the first one fills the caches of the disk
        finally:
            subprocess.run([*HFKIT, "warm", "--stop"], env={**os.environ, **warm}, capture_output=True)
    print("| what | wall | ratio | processor | ratio | goal |\n|---|---|---|---|---|---|")
    for index, (what, _, _, _, other, goal) in enumerate(rows):
        cells = []
        for clock in (0, 1):
            seconds = statistics.median(results[index][clock] for results in rounds)
            ratio = "" if other is None else statistics.median(r[index][clock] / r[other][clock] for r in rounds)
            cells += [f"{seconds:.2f} s", f"{ratio:.3f}" if ratio else ""]
        wanted = "" if goal is None else f"≤ {goal}" + (" s" if other is None else "")
        print(f"| {what} | {' | '.join(cells)} | {wanted} |")


if __name__ == "__main__":
    main()
