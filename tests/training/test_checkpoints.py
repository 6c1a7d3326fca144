"""What was saved is whole or it is not used; a run that was interrupted, however, goes on to the bit."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import trials
from support.shell import assert_fails, call
from transformers import TrainerCallback

import hfkit
from hfkit.errors import HfkitError, StoppedError
from hfkit.training.checkpoints import Stop, find_fault, find_newest, list_checkpoints, rotate, step_of
from hfkit.training.loop import StepCallback
from hfkit.training.monitor import HeldOutMonitor

pytestmark = pytest.mark.usefixtures("brisk")
SAVES = {**trials.SMALL, "max_steps": 8, "eval_steps": 4, "save_steps": 1, "num_train_epochs": 3}


def train(corpus, model, folder, **options):
    return hfkit.finetune(corpus, model=model, output_dir=folder, **{**SAVES, **options})


class At(TrainerCallback):
    """Do something at one event of one step."""

    def __init__(self, event: str, step: int, action) -> None:
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                action(kwargs.get("model"))

        setattr(self, event, act)


class Twice(TrainerCallback):
    """Two Ctrl-C before a checkpoint of a step is committed."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            send(signal.SIGINT, times=2)(None)


def send(number: int, times: int = 1):
    """An action: this process gets a signal."""
    return lambda model: [os.kill(os.getpid(), number) for _ in range(times)]


@pytest.fixture(scope="module")
def whole(tiny, corpus, tmp_path_factory) -> dict:
    """What an uninterrupted run comes to."""
    return trials.outcome(train(corpus, tiny, tmp_path_factory.mktemp("runs") / "whole").output_dir)


@pytest.fixture(scope="module")
def stopped(tiny, corpus, tmp_path_factory) -> Path:
    """A run that was stopped after 6 of 8 steps, with checkpoints of its steps 5 and 6, and 4, the best."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(StoppedError) as stop:
        train(corpus, tiny, folder, callbacks=[At("on_step_begin", 5, send(signal.SIGTERM))])
    assert stop.value.exit_code == 143 and "step 6 of 8 is saved" in str(stop.value)
    assert [step_of(path) for path in list_checkpoints(folder / "checkpoints")] == [6, 5, 4]
    return folder


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resume(corpus, model, folder, **options) -> dict:
    return trials.outcome(train(corpus, model, folder, resume=True, **options).output_dir)


# signals


def run_trials(corpus, model, folder: Path, names: list[str], seed: int, seconds: int) -> dict:
    """tests/trials.py in a process of its own."""
    command = ["finetune", corpus, "-m", model, "--no-bf16", "--max-steps", 8, "--eval-steps", 4, "--save-steps", 1]
    task = {"command": [*map(str, command), "--per-device-train-batch-size", "2"], "names": names, "seed": seed}
    (folder / "task.json").write_text(json.dumps({**task, "folder": str(folder)}))
    script = [sys.executable, trials.__file__, str(folder / "task.json")]
    done = subprocess.run(script, capture_output=True, timeout=seconds)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def check_trials(result: dict, name: str, count: int) -> None:
    assert result["outcomes"] and all(outcome == result["whole"] for outcome in result["outcomes"]), result["log"]
    # A signal in the first milliseconds finds no handler yet; for one that comes too late another is sent.
    allowed = {"SIGKILL": {-9, 0}, "SIGTERM": {143, -15, 0}, "SIGINT": {130, -2, 0}, None: {0}}
    assert [end for end in result["ends"] if end[1] not in allowed[end[0]]] == [], result["log"]
    assert [sent for sent, code in result["ends"] if code] == [name] * count
    print(f"signals and exit codes: {Counter((name, code) for name, code in result['ends'])}")
    lines = [line for line in result["log"].splitlines() if line]
    assert all(line.startswith(("hfkit: ", "/")) for line in lines), result["log"]


def test_run_killed_at_random(tiny, corpus, tmp_path):
    """Killed at any moment, a run resumes bit-identically."""
    check_trials(run_trials(corpus, tiny, tmp_path, ["SIGKILL"] * 10, seed=1, seconds=240), "SIGKILL", 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("SIGKILL", 50), ("SIGTERM", 20), ("SIGINT", 20)])
def test_run_signalled_at_random(tiny, corpus, tmp_path, name, count):
    """A signal at any of many moments changes nothing in the result."""
    check_trials(run_trials(corpus, tiny, tmp_path, [name] * count, seed=2, seconds=1800), name, count)


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("on_pre_optimizer_step", signal.SIGTERM),
        ("on_save", signal.SIGTERM),
        ("on_step_begin", signal.SIGINT),
    ],
)
def test_stop_finishes_the_step(tiny, corpus, tmp_path, whole, event, number):
    """A run that is asked to stop finishes its step, saves, and resumes bit-identically."""
    with pytest.raises(StoppedError) as stop:
        train(corpus, tiny, tmp_path, callbacks=[At(event, 3, send(number))])
    # Where the third step was over, it is the fourth.
    assert stop.value.exit_code == 128 + number and "step 4 of 8 is saved" in str(stop.value)
    assert find_fault(list_checkpoints(tmp_path / "checkpoints")[0]) is None
    assert resume(corpus, tiny, tmp_path) == whole


@pytest.mark.parametrize(
    ("step", "said"), [(0, "nothing was saved yet"), (4, "step 4 of 8 is saved"), (8, "step 7 of 8 is saved")]
)
def test_stop_while_measuring(tiny, corpus, tmp_path, whole, monkeypatch, step, said):
    """A run that is asked to stop while it measures stops there, and measures first when it is resumed."""
    measure, asked = HeldOutMonitor.measure, []

    def ask(self, model, tokenizer, history, at_step):
        if at_step == step and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return measure(self, model, tokenizer, history, at_step)

    monkeypatch.setattr(HeldOutMonitor, "measure", ask)
    with pytest.raises(StoppedError, match=said) as stop:
        train(corpus, tiny, tmp_path)
    assert stop.value.exit_code == 143
    assert resume(corpus, tiny, tmp_path) == whole


def test_stop_at_second_ctrl_c(tiny, corpus, tmp_path, whole, capfdbinary):
    """A second Ctrl-C stops at once; the checkpoint before stays."""
    with pytest.raises(StoppedError, match="step 3 of 8 is saved") as stop:
        train(corpus, tiny, tmp_path, callbacks=[At("on_step_begin", 3, send(signal.SIGINT, times=2))])
    assert stop.value.exit_code == 130
    with pytest.raises(StoppedError, match="step 4 of 8 is saved"):  # in the middle of a save
        train(corpus, tiny, tmp_path, resume=True, callbacks=[Twice("on_save", 5)])
    assert resume(corpus, tiny, tmp_path) == whole


def test_stop_at_second_sigterm(tiny, corpus, tmp_path, whole):
    """A second SIGTERM breaks nothing; a run that has saved nothing says so."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(StoppedError, match="step 1 of 8 is saved"):
        train(corpus, tiny, tmp_path, callbacks=[At("on_step_begin", 0, send(signal.SIGTERM, times=3))])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert resume(corpus, tiny, tmp_path) == whole
    with pytest.raises(StoppedError, match="nothing was saved yet"):
        train(corpus, tiny, tmp_path, overwrite=True, callbacks=[At("on_step_begin", 0, send(signal.SIGINT, 2))])


@pytest.mark.parametrize(
    "options",
    [
        {"streaming": True, "max_steps": 26},  # the third time through the corpus
        {"max_steps": 26, "gradient_accumulation_steps": 2},
        {"max_steps": 6, "optim": "muon", "dropout": 0.2},
        {"max_steps": 6, "lora": True},
        {"max_steps": 6, "bf16": True, "activation_checkpointing": True, "lr_scheduler_type": "linear"},
        {"max_steps": 6, "train_sampling_strategy": "group_by_length", "neftune_noise_alpha": 2.0},
    ],
)
def test_resume_every_kind(tiny, corpus, tmp_path, options):
    """Every kind of run resumes bit-identically."""
    held = trials.write_corpus(tmp_path / "held.txt", 3, seed=1)
    options = {"per_device_train_batch_size": 8, "eval_file": held, "eval_steps": 10, "save_steps": None, **options}
    half = options["max_steps"] * 3 // 4
    whole = train(corpus, tiny, tmp_path / "whole", **options)
    with pytest.raises(StoppedError, match=f"step {half + 1} of"):
        train(corpus, tiny, tmp_path / "run", **options, callbacks=[At("on_step_begin", half, send(signal.SIGTERM))])
    assert resume(corpus, tiny, tmp_path / "run", **options) == trials.outcome(whole.output_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_before_training(tiny, corpus, tmp_path, monkeypatch, capfdbinary, number, code):
    """A run that is stopped before it trains leaves nothing in the way of the next one."""

    def tokenize(*arguments):
        os.kill(os.getpid(), number)
        pytest.fail("it went on")

    with monkeypatch.context() as patch:
        patch.setattr("hfkit.training.plan.gather_training_data", tokenize)
        result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", tmp_path / "run")
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")
    assert train(corpus, tiny, tmp_path / "run", max_steps=1)


# damage


def damages(path: Path) -> list:
    """Functions that break the file at `path`: it is gone, cut, or one bit is another."""
    size, draw = path.stat().st_size, random.Random(path.name)

    def cut(length):
        return lambda: os.truncate(path, length)

    def flip(at):
        def act():
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << draw.randrange(8)]))

        return act

    cuts = {0, 1, size // 2, min(size - 1, int(0.999 * size))}
    return [path.unlink, *map(cut, cuts), *(flip(draw.randrange(size)) for _ in range(20))]


def test_find_newest_skips_any_damage(copied, capfd):
    """Any damage to any file is noticed, and the checkpoint before is used."""
    folder = copied / "checkpoints"
    newest, before = list_checkpoints(folder)[:2]
    keep = folder / "kept"
    newest.rename(keep)
    names = sorted(path.name for path in keep.iterdir())
    assert len(names) >= 8 and {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(names)
    for name in names:
        for number in range(len(damages(keep / name))):
            shutil.copytree(keep, newest)
            damages(newest / name)[number]()
            assert find_newest(folder) == before, (name, number)
            noted = capfd.readouterr().err
            assert str(newest) in noted and (name in noted or name == "manifest.json"), noted
            shutil.rmtree(newest)  # it was left there
    shutil.copytree(keep, newest)
    (newest / "extra").touch()
    assert find_newest(folder) == before and "extra is not what was written" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"]
)
def test_resume_without_the_newest(tiny, corpus, copied, whole, name):
    """A run whose newest checkpoint is damaged resumes bit-identically from the one before."""
    random.Random(name).choice(damages(copied / "checkpoints" / "checkpoint-6" / name))()
    assert resume(corpus, tiny, copied) == whole


def test_resume_with_all_damaged(tiny, corpus, copied, capfdbinary):
    """Where all checkpoints are damaged nothing is begun and nothing deleted."""
    for path in list_checkpoints(copied / "checkpoints"):
        os.truncate(path / "optimizer.pt", 1000)
    before = sorted(copied.rglob("*"))
    typed = ["finetune", corpus, "-m", tiny, "-o", copied, "--resume", "-q", "--no-bf16", "--learning-rate", "1e-3"]
    for name in ("max_steps", "eval_steps", "save_steps", "num_train_epochs", "per_device_train_batch_size"):
        typed += [f"--{name}", SAVES[name]]
    for _ in range(2):
        result = call(capfdbinary, *typed)
        words = ["every checkpoint is damaged", str(copied), "checkpoint-6: optimizer.pt", "--overwrite"]
        assert_fails(result, 1, *words)
        assert sorted(copied.rglob("*")) == before


def test_find_kept_skips_a_damaged_best(tiny, corpus, tmp_path, capfd):
    """A run never leaves a best state that is damaged."""
    options = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "eval_steps": 2}

    def damage(model):
        os.truncate(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors", 999)

    run = train(corpus, tiny, tmp_path, **options, callbacks=[At("on_step_begin", 7, damage)])
    measured = {step: loss for step, loss, _ in trials.scores(run.metrics) if step}
    assert min(measured, key=measured.get) == 2 and run.metrics["step"] == 8
    assert "checkpoint-2 is skipped: model.safetensors is not what was written" in capfd.readouterr().err
    hfkit.load(tmp_path)


# a save, operation by operation


@pytest.fixture
def saving(copied):
    """A folder with two whole checkpoints and the files of a third, and what commits that."""
    folder = copied / "checkpoints"
    newest, before, best = list_checkpoints(folder)
    shutil.rmtree(best)
    shutil.copytree(newest, folder / "checkpoint-7")
    (folder / "checkpoint-7" / "manifest.json").unlink()
    (folder / "checkpoint-7" / "training_args.bin").write_bytes(b"a pickle")
    options = hfkit.TrainOptions(eval_steps=100, save_steps=1, save_total_limit=1)
    saver = StepCallback(folder, options, Stop(), lambda: pytest.fail("it measures"))
    return saver, folder


def save(saver: StepCallback) -> None:
    """What Trainer and `saver` do at the end of step 7."""
    state = SimpleNamespace(global_step=7, max_steps=9, log_history=[])
    control = SimpleNamespace(should_training_stop=False)
    with saver.save_errors():
        saver.on_step_end(SimpleNamespace(learning_rate=1), state, control, model=torch.nn.Linear(1, 1))
        assert control.should_save
        saver.on_save(None, state, control)


def digests(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())


def test_save_killed_at_each_operation(saving, tmp_path):
    """Killed at any operation of a save, a run has its old state or its new one."""
    saver, folder = saving
    old, seen = digests(folder / "checkpoint-6"), []
    for _ in trials.killed_at_each(lambda: save(saver), folder, tmp_path / "before"):
        newest = find_newest(folder)
        seen.append(newest.name)
        assert digests(newest) == old  # the same files, since one is a copy of the other
    assert set(seen) == {"checkpoint-6", "checkpoint-7"} and len(seen) > 20
    assert [path.name for path in folder.iterdir()] == ["checkpoint-7"]  # rotated


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_save_failing_at_each_operation(saving, tmp_path, number):
    """An error at any operation of a save is one line, and the old state stays."""
    saver, folder = saving
    old, errors = digests(folder / "checkpoint-6"), []
    for error in trials.failing_at_each(number, lambda: save(saver), folder, tmp_path / "before"):
        if error:
            errors.append(str(error))
            assert isinstance(error, HfkitError) and "\n" not in str(error)
            assert str(folder) in str(error) and os.strerror(number) in str(error)
        newest = find_newest(folder)
        assert newest.name in ("checkpoint-6", "checkpoint-7") and digests(newest) == old
        assert newest == list_checkpoints(folder)[0]  # what was half written is gone
    assert len(errors) > 20 and "cannot delete" in errors[-1]


def test_save_order(saving, monkeypatch):
    """Everything is on the disk before a save counts; old checkpoints are deleted last."""
    saver, folder = saving
    new, done = str(folder / "checkpoint-7"), []
    for name in ("fsync", "replace", "unlink", "rmdir"):
        original = getattr(os, name)

        def wrapped(first, *arguments, name=name, original=original, **keywords):
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            done.append((name, path))
            return original(first, *arguments, **keywords)

        monkeypatch.setattr(os, name, wrapped)
    save(saver)
    commit_at = next(i for i, (name, path) in enumerate(done) if name == "replace" and "manifest.json" in path)
    before = {path for name, path in done[:commit_at] if name == "fsync"}
    files = {str(path) for path in Path(new).iterdir() if path.name != "manifest.json"}
    assert files | {new, str(folder)} < before and any("manifest" in path for path in before - files)
    assert done[commit_at + 1] == ("fsync", new)
    removed = [i for i, (name, path) in enumerate(done) if name in ("unlink", "rmdir") and "training_args" not in path]
    assert removed and min(removed) > commit_at + 1


def test_save_on_a_full_disk(tiny, corpus, copied, whole, monkeypatch):
    """A full disk is one line, and the run can be resumed when there is room."""
    weights, limit = os.path.getsize(Path(tiny) / "model.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (weights // 2, weights + 1000):  # of the weights, of the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(
                HfkitError, match=r"cannot save \(.*checkpoint-7\): .*bytes are free: fix that, then --resume"
            ):
                train(corpus, tiny, copied, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert [step_of(path) for path in list_checkpoints(copied / "checkpoints")] == [6, 5, 4]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        with pytest.raises(HfkitError, match=r"has 10,000 bytes free, [\d,]+ are needed: make room, then --resume"):
            train(corpus, tiny, copied, resume=True)
    assert step_of(list_checkpoints(copied / "checkpoints")[0]) == 6
    assert resume(corpus, tiny, copied) == whole


# rotation


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotate_keeps_the_limit_and_the_best(tiny, corpus, tmp_path, limit):
    """As many checkpoints as asked for are kept, and the best one."""
    seen = []

    class See(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found = list_checkpoints(tmp_path / "checkpoints")
            assert not any(find_fault(path) for path in found)
            seen.append([step_of(path) for path in found])

    # It gets worse at once, so the first that is measured stays the best.
    run = train(corpus, tiny, tmp_path, save_total_limit=limit, eval_steps=2, learning_rate=0.05,
                lr_scheduler_type="constant", warmup_steps=0, callbacks=[See()])  # fmt: skip
    assert run.metrics["step"] == 2 and len(seen) == 8
    for step, found in enumerate(seen, 1):
        assert found == sorted({*range(max(1, step - limit + 1), step + 1), *([2] if step > 2 else [])}, reverse=True)


def test_rotate_deletes_damaged(copied):
    """A damaged checkpoint does not count, and is deleted after the next save."""
    folder = copied / "checkpoints"
    os.truncate(folder / "checkpoint-6" / "scheduler.pt", 5)
    assert step_of(find_newest(folder)) == 5
    assert (folder / "checkpoint-6").is_dir() and find_newest(folder) == folder / "checkpoint-5"
    rotate(folder, 1, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-5"]


# what is no number


def poison(model) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan


def spoil(model) -> None:
    next(model.parameters()).grad[0, 0] = math.inf


@pytest.mark.parametrize(
    ("event", "step", "action", "words", "kept"),
    [
        ("on_step_begin", 0, poison, "the loss is nan at step 1", []),
        ("on_step_begin", 5, poison, "the loss is nan at step 6", [5, 4]),
        ("on_pre_optimizer_step", 5, spoil, "the weights are not finite at step 6", [5, 4]),
        ("on_pre_optimizer_step", 7, spoil, "the weights are not finite at step 8", [7, 6, 4]),
        ("on_save", 4, poison, "the loss is nan at step 5", [4, 3]),
    ],
)
def test_diverged_run(tiny, corpus, tmp_path, whole, event, step, action, words, kept):
    """A loss that is not finite ends the run; the good checkpoints are kept."""
    with pytest.raises(HfkitError, match=f"{words}: lower --learning-rate .it is 0.001. and --overwrite"):
        train(corpus, tiny, tmp_path, callbacks=[At(event, step, action)])
    found = list_checkpoints(tmp_path / "checkpoints")
    assert [step_of(path) for path in found] == kept and not any(find_fault(path) for path in found)
    assert not (tmp_path / "model.safetensors").exists()
    if action is spoil:
        assert resume(corpus, tiny, tmp_path) == whole


def test_diverged_by_the_learning_rate(tiny, corpus, tmp_path, capfdbinary):
    """A learning rate that is too high is reported in one line."""
    typed = ["--learning-rate", "1e30", "--warmup-steps", 0, "--max-steps", 4, "--per-device-train-batch-size", 2]
    result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", tmp_path, "-q", *typed)
    assert_fails(result, 1, "at step ", "lower --learning-rate (it is 1e+30)")


# modes


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_commit_follows_the_umask(tiny, corpus, tmp_path, mask):
    """The modes of all files follow the umask."""
    before, seen = os.umask(mask), {}

    def look(model):
        checkpoint = list_checkpoints(tmp_path / "checkpoints")[0]
        seen.update({path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()})

    try:
        train(corpus, tiny, tmp_path, max_steps=2, eval_steps=1, callbacks=[At("on_step_begin", 1, look)])
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert set((seen | files).values()) == {0o666 & ~mask}, files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".tmp"))] and "optimizer.pt" in seen
