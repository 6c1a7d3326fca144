"""A folder belongs to one run and to one process, says what was asked for, and never mixes two runs."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from support import trials
from support.shell import assert_fails, call
from transformers import TrainerCallback

import hfkit
from hfkit.errors import HfkitError, LockedError
from hfkit.options import DataOptions, ModelOptions, SizeOptions, TrainOptions
from hfkit.recipes import read_values
from hfkit.storage import LIST, LOCK, lock, write_text
from hfkit.training import run_folder
from hfkit.training.checkpoints import commit, find_fault

pytestmark = pytest.mark.usefixtures("brisk")
BEGUN = {**trials.SMALL, "eval_steps": 2}


def train(corpus, model, folder, **options):
    return hfkit.finetune(corpus, model=model, output_dir=folder, **{**BEGUN, **options})


class PowerCut(TrainerCallback):
    """The run ends after its fourth step, without a word."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise RuntimeError("the power is cut")


@pytest.fixture(scope="module")
def finished(tiny, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(corpus, tiny, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tiny, corpus, tmp_path_factory) -> Path:
    """A run with checkpoints, which is not finished."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(RuntimeError, match="power"):
        train(corpus, tiny, folder, callbacks=[PowerCut()])
    return folder


# one process


def test_lock_is_held_by_one(tmp_path):
    """Of many processes that want a folder one has it, and the others say which."""
    for _ in range(6):
        over, let_go = os.pipe()
        start, results = time.monotonic() + 0.2, {}
        for _ in range(10):
            read, write = os.pipe()
            if not (child := os.fork()):
                os.close(let_go)
                time.sleep(max(0.0, start - time.monotonic()))
                try:
                    with lock(tmp_path):
                        os.write(write, b"won")
                        os.read(over, 1)  # until all have tried
                except LockedError as error:
                    os.write(write, str(error).encode())
                finally:
                    os._exit(0)
            os.close(write)
            results[child] = read
        # All answer while the winner holds the folder.
        said = {child: os.read(read, 1000).decode() for child, read in results.items()}
        os.close(let_go), os.close(over)
        for child, read in results.items():
            os.waitpid(child, 0), os.close(read)
        winners = [child for child, text in said.items() if text == "won"]
        assert len(winners) == 1, said
        for child in set(said) - set(winners):
            assert f"in use by process {winners[0]} on {socket.gethostname()}" in said[child]


def test_lock_ends_with_its_process(tmp_path):
    """A folder is free again when its process is killed."""
    read, write = os.pipe()
    if not (child := os.fork()):
        with lock(tmp_path):
            os.write(write, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(read, 4) == b"held"
    with pytest.raises(HfkitError, match=f"process {child} on"), lock(tmp_path):
        pass
    os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
    with lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).read_text()


@pytest.fixture
def no_loading(monkeypatch):
    """Fail where a model is loaded."""
    for name in ("finetuning.load_tokenizer", "pretraining.train_tokenizer"):
        monkeypatch.setattr(f"hfkit.training.{name}", lambda *_: pytest.fail("it loads"))


def test_lock_refuses_a_second_run(tiny, corpus, tmp_path, capfdbinary, no_loading):
    """A second run in the same folder is refused while the first one holds it."""
    with lock(tmp_path):
        result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", tmp_path)
    assert_fails(result, 1, str(tmp_path), f"process {os.getpid()} on {socket.gethostname()}")


# one run


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_check_free_names_both_ways_out(state, corpus, tiny, tmp_path, request, capfdbinary):
    """A folder with a run is refused, with both ways out."""
    folder = shutil.copytree(request.getfixturevalue(state), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".hfkit.lock"}
    result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", folder)
    assert_fails(result, 1, str(folder), "--resume continues it", "--overwrite starts over")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".hfkit.lock"} == before


def test_check_free_refuses_foreign_files(corpus, tiny, tmp_path, capfdbinary):
    """A folder with anything else is refused, even to be overwritten."""
    (tmp_path / "thesis.txt").write_text("ten years")
    for flags in [], ["--overwrite"], ["--resume"]:
        result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", tmp_path, *flags)
        assert_fails(result, 1, "holds thesis.txt, which hfkit did not write")
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_begin_overwrites(finished, tiny, corpus, tmp_path):
    """An overwritten folder is as new."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").touch()
    run = train(corpus, tiny, folder, overwrite=True, seed=7)
    assert run.metrics["seed"] == 7 and not (folder / "tensorboard").exists()
    assert trials.outcome(folder) == trials.outcome(train(corpus, tiny, tmp_path / "new", seed=7).output_dir)


def test_resume_of_nothing_and_of_a_finished_run(finished, tiny, corpus, tmp_path, capfd):
    """Resuming nothing begins a run; resuming a finished run only says so."""
    train(corpus, tiny, tmp_path / "new", resume=True)
    assert trials.outcome(tmp_path / "new") == trials.outcome(finished)
    before = (finished / "metrics.json").stat().st_mtime_ns
    (finished / "checkpoints" / "checkpoint-6").mkdir(parents=True)  # as if it was killed after all was done
    again = train(corpus, tiny, finished, resume=True)
    assert again.metrics == json.loads((finished / "metrics.json").read_text())
    assert (finished / "metrics.json").stat().st_mtime_ns == before and not (finished / "checkpoints").exists()
    assert "is finished: there is nothing to resume" in capfd.readouterr().err


CHANGES = {
    "corpus": {"corpus": "other"},
    "model": {"model": "still"},
    "seed": {"seed": 7},
    "max_steps": {"max_steps": 9},
    "learning_rate": {"learning_rate": 2e-3},
    "per_device_train_batch_size": {"per_device_train_batch_size": 1},
    "block_size": {"block_size": 32},
    "eval_fraction": {"eval_fraction": 0.2},
    "bf16": {"bf16": True},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_check_same_settings(stopped, tiny, still, corpus, tmp_path, name, capfd):
    """A run is resumed with the same settings only."""
    asked = {"corpus": corpus, "model": tiny, **CHANGES[name]}
    asked["model"] = {"still": still}.get(asked["model"], asked["model"])
    if name == "corpus":
        asked["corpus"] = trials.write_corpus(tmp_path / "corpus.txt", seed=5)
    with pytest.raises(
        HfkitError, match=f"begun with other settings .*{name} was .*, is .*: --config .*recipe.yaml has those, or"
    ):
        train(asked.pop("corpus"), asked.pop("model"), stopped, resume=True, **asked)
    assert (stopped / "checkpoints" / "checkpoint-4").is_dir()


def test_resume_on_a_changed_base(tiny, corpus, tmp_path, copy):
    """A run is not resumed on another model of the same name, such as the bundled one of another version."""
    model = copy(tiny)
    with pytest.raises(RuntimeError, match="power"):
        train(corpus, str(model), tmp_path / "run", callbacks=[PowerCut()])
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(HfkitError, match=f"^{model} has changed since .*run was begun on it: --overwrite starts over"):
        train(corpus, str(model), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("falling", "other"),
    [('{"num_decay_steps": 6}', '{"num_decay_steps": 3, "decay_type": "linear"}'), (None, None)],
    ids=["asked", "default"],
)
def test_resume_with_another_length(tiny, corpus, tmp_path, capfd, falling, other):
    """Where the learning rate only falls at the end, a run may end at another step, as if it had been begun so."""
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1}
    long = schedule | {"max_steps": 12, "lr_scheduler_kwargs": falling}
    short = schedule | {"max_steps": 8, "lr_scheduler_kwargs": other}
    with pytest.raises(RuntimeError, match="power"):
        train(corpus, tiny, tmp_path / "run", **long, callbacks=[PowerCut()])
    train(corpus, tiny, tmp_path / "run", **short, resume=True)
    assert "the run gets another length: max_steps was 12, is 8" in capfd.readouterr().err
    train(corpus, tiny, tmp_path / "whole", **short)
    assert trials.outcome(tmp_path / "run") == trials.outcome(tmp_path / "whole")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == (tmp_path / "whole" / "recipe.yaml").read_text()


def test_resume_a_finished_run_with_another_length(tiny, corpus, tmp_path, capfdbinary):
    """A finished run has fallen to the end: it keeps its length and its files, and the command fails."""
    folder = tmp_path / "run"
    train(corpus, tiny, folder, lr_scheduler_type="warmup_stable_decay", warmup_steps=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}
    command = ["finetune", "--config", folder / "recipe.yaml", "-o", folder, "--resume"]
    for steps in (12, 4):
        words = f"{folder} ended at 6 steps (max_steps was 6, is {steps}): a finished run cannot get another length; "
        assert_fails(call(capfdbinary, *command, "-q", "--max-steps", steps), 1, words)
    result = call(capfdbinary, *command)
    assert result.returncode == 0 and b"is finished: there is nothing to resume" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK} == before


def test_resume_by_recipe(stopped, finished, tmp_path, capfdbinary):
    """A run's recipe is enough to resume it."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    result = call(capfdbinary, "finetune", "--config", folder / "recipe.yaml", "-o", folder, "--resume")
    assert (result.returncode, result.stdout.decode()) == (0, f"{folder}\n"), result.stderr
    assert trials.outcome(folder) == trials.outcome(finished)


def test_metrics_of_a_resumed_run(stopped, finished, tiny, corpus, tmp_path):
    """Whatever metrics.json says of the training holds for the whole run: it is the same without an interruption."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    resumed = train(corpus, tiny, folder, resume=True).metrics
    whole = json.loads((finished / "metrics.json").read_text())
    timed = {"seconds", "tokens_per_second", "folder", "command"}
    for metrics in (resumed, whole):
        metrics["history"] = [
            {name: value for name, value in entry.items() if name != "seconds"} for entry in metrics["history"]
        ]
    assert resumed["history"] == whole["history"]
    assert len(trials.losses(resumed)) == resumed["steps"] == 6
    assert not [name for entry in resumed["history"] for name in entry if name.startswith("train_")]
    assert {name for name in whole if resumed[name] != whole[name]} <= timed


def test_resume_with_an_edited_corpus(stopped, tiny, corpus, tmp_path, monkeypatch):
    """A corpus that was edited is another one."""
    path = Path(corpus)
    before = path.read_text()
    try:
        path.write_text(before.replace("rain", "hail"))
        with pytest.raises(HfkitError, match="corpus_sha256 was"):
            train(corpus, tiny, stopped, resume=True)
    finally:
        path.write_text(before)


def test_resume_with_another_tokenizer(tiny, corpus, tmp_path):
    """A model with another tokenizer is another one."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    with pytest.raises(RuntimeError, match="power"):
        train(corpus, str(model), tmp_path / "run", callbacks=[PowerCut()])
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HfkitError, match="tokenizer_sha256 was"):
        train(corpus, str(model), tmp_path / "run", resume=True)


def test_settle_keeps_decisions(tiny, corpus, tmp_path, monkeypatch):
    """Where the machine has become another one, or a new version decides otherwise."""
    options = {"max_steps": 6, "eval_steps": 2}
    monkeypatch.setattr("hfkit.models.architecture.has_bfloat16_units", lambda: True)
    with pytest.raises(RuntimeError, match="power"):
        hfkit.finetune(corpus, model=tiny, output_dir=tmp_path, **options, callbacks=[PowerCut()])
    monkeypatch.setattr("hfkit.models.architecture.has_bfloat16_units", lambda: False)
    monkeypatch.setattr("hfkit.training.plan._learning_rate", lambda *_: 1.0)
    run = hfkit.finetune(corpus, model=tiny, output_dir=tmp_path, **options, resume=True)
    assert run.metrics["precision"] == "bfloat16"
    names = [*TrainOptions.names(), "corpus", *ModelOptions.names(), *DataOptions.names()]
    assert float(read_values(tmp_path / "recipe.yaml", names)["learning_rate"]) < 1


# killed, operation by operation


@pytest.mark.parametrize("old", [None, "old" * 5000])
def test_write_text_killed(tmp_path, old):
    """Killed while it is written, a file is the old one or the new one."""
    folder, new, seen = tmp_path / "run", "new" * 9000, set()
    folder.mkdir()
    if old:
        (folder / "metrics.json").write_text(old)
    act = lambda: write_text(folder / "metrics.json", new)  # noqa: E731
    for _ in trials.killed_at_each(act, folder, tmp_path / "backup"):
        seen.add((folder / "metrics.json").read_text() if (folder / "metrics.json").exists() else None)
    assert seen == {old, new}
    for number in (errno.ENOSPC, errno.EIO):
        shutil.rmtree(tmp_path / "backup")
        for error in trials.failing_at_each(number, act, folder, tmp_path / "backup"):
            assert error is None or isinstance(error, HfkitError) and "metrics.json" in str(error)
            assert [path.name for path in folder.iterdir()] == ["metrics.json"]
            assert (folder / "metrics.json").read_text() == new


def test_begin_killed(tmp_path):
    """A folder whose run was killed while it began can be used without further flags."""
    folder = tmp_path / "run"
    folder.mkdir()
    count = 0
    for _ in trials.killed_at_each(lambda: begin(folder), folder, tmp_path / "backup"):
        count += 1
        run_folder.check_run_folder(folder, resume=False, overwrite=False)
        assert not run_folder.is_begun(folder)
    assert count > 10
    begin(folder)
    assert sorted(path.name for path in folder.iterdir()) == [LIST, "checkpoints", "recipe.yaml", "run.json"]


def begin(folder: Path) -> None:
    def keep(folder):
        (folder / "checkpoints" / "kept").mkdir()

    run_folder.begin(folder, "finetune", {"corpus": ["new"], "seed": 1}, {"corpus_sha256": "0"}, keep)


def test_begin_killed_while_overwriting(finished, tmp_path):
    """Killed while it overwrites a run, the folder has the old run or none."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    old, count = trials.outcome(folder), 0
    for _ in trials.killed_at_each(lambda: begin(folder), folder, tmp_path / "backup"):
        count += 1
        run_folder.check_run_folder(folder, resume=False, overwrite=True)
        if run_folder.read_metrics(folder):
            assert trials.outcome(folder) == old
    assert count > 10 and not run_folder.is_begun(folder)


def test_finish_killed(tmp_path):
    """A run that is killed while it finishes is finished when it is resumed."""
    folder, metrics = tmp_path / "run", {"perplexity": 7.0}
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_text(name)
    commit(checkpoint)

    def finish() -> None:
        run_folder.finish(folder, checkpoint, {"README.md": "a card", "loss.png": b"a picture"}, metrics)

    ends = []
    for _ in trials.killed_at_each(finish, folder, tmp_path / "backup"):
        ends.append(bool(run_folder.read_metrics(folder)))
        if not ends[-1]:
            assert find_fault(checkpoint) is None  # so it can be finished again
            finish()
        run_folder.clear(folder)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert json.loads(found.pop("metrics.json")) == metrics
        assert {*json.loads(found.pop(LIST))["files"]} == {*found}
        assert found == {"model.safetensors": "model.safetensors", "config.json": "config.json", "README.md": "a card",
                         "loss.png": "a picture"}  # fmt: skip
    assert set(ends) == {True, False} and len(ends) > 20


NOT_PUBLISHED = ["optimizer.pt", "scheduler.pt", "rng_state_1.pth", "trainer_state.json", "manifest.json", "README.md",
                 "pytorch_model.bin", "training_args.bin", "new_in_the_next_version.json", "scaler.pt",
                 "latest"]  # fmt: skip


def test_finish_publishes_the_model_only(tmp_path):
    """A file of a checkpoint that nobody has thought of is not published."""
    model = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
             "adapter_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
             "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
             "merges.txt", "spiece.model", "chat_template.jinja"]  # fmt: skip
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    for name in [*model, *NOT_PUBLISHED]:
        (checkpoint / name).touch()
    run_folder.finish(folder, checkpoint, {}, {})
    assert {path.name for path in folder.iterdir()} == {*model, "metrics.json", LIST}


# places


def bad_places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("/no/such/place/at/all")
    return {
        "a file": f"{tmp_path}/file",
        "below a file": f"{tmp_path}/file/run",
        "a long name": f"{tmp_path}/{'x' * 256}",
        "a long path": f"{tmp_path}/{'/'.join(['x' * 200] * 25)}",
        "a loop": f"{tmp_path}/loop",
        "below a loop": f"{tmp_path}/loop/run",
        "NUL": f"{tmp_path}/a\0b",
        "proc": "/proc/run",
        "a device": "/dev/null",
        "below a device": "/dev/null/run",
    }


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_check_free_unwritable(tiny, corpus, tmp_path, capfdbinary, no_loading, command):
    """A folder that cannot be written is one line before a model is loaded."""
    for what, place in bad_places(tmp_path).items():
        model = ["-m", tiny] if command == "finetune" else []
        result = call(capfdbinary, command, corpus, *model, "-o", place)
        assert_fails(result, 1, "cannot write to ", "name another --output-dir")
        assert result.stderr.decode().isprintable or what


def test_check_free_on_a_full_disk(tiny, corpus, tmp_path, capfdbinary, no_loading):
    """A full disk is noticed before a model is loaded."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        result = call(capfdbinary, "finetune", corpus, "-m", tiny, "-o", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_fails(result, 1, "cannot write to ", str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["mit Umlaut ä und 空", "two\nlines", "-dash", "a'b\"c", "100%"])
def test_folder_with_an_odd_name(tiny, corpus, tmp_path, name):
    """A folder with an odd name works."""
    run = train(corpus, tiny, tmp_path / name, max_steps=1)
    assert hfkit.load(run.output_dir)
    again = hfkit.finetune(
        **json.loads((tmp_path / name / "run.json").read_text())["recipe"], output_dir=tmp_path / "2"
    )
    assert trials.outcome(again.output_dir) == trials.outcome(run.output_dir)


def test_folder_for_no_name(tiny, corpus, tmp_path, monkeypatch, capfdbinary):
    """Without a name, the folder is runs/ and the name of the corpus."""
    monkeypatch.chdir(tmp_path)
    result = call(capfdbinary, "finetune", corpus, "-m", tiny, "--max-steps", 1, "--no-bf16", "-q")
    assert (result.stdout, result.stderr) == (b"runs/corpus\n", b"") and Path(
        "runs/corpus/model.safetensors"
    ).is_file()


# the recipe


ODD = [
    "1e5",
    "010",
    "no",
    "~",
    "null",
    "1.5",
    "a: b",
    "- a",
    "# a",
    "'",
    '"',
    "ä 空 🙂",
    "two\nlines",
    "\t",
    "{}",
    " x ",
]


@pytest.mark.parametrize("text", ODD)
def test_recipe_is_read_back(tmp_path, text):
    """A recipe says what was asked for, whatever the text."""
    train_options = TrainOptions(sample_prompt=text, run_name=text, lora_target_modules=[text], learning_rate=1e-05)
    data = DataOptions(text_column=text, eval_fraction=0.25)
    recipe = run_folder.make_recipe("corpus.txt", ModelOptions(model="gpt2"), data, train_options)
    run_folder.begin(tmp_path, "finetune", recipe, {}, lambda folder: None)
    values = read_values(tmp_path / "recipe.yaml", recipe)
    found = {"corpus": values["corpus"]}
    for group in (ModelOptions, DataOptions, TrainOptions):
        read = group.read({name: value for name, value in values.items() if name in group.names()})
        found |= {name: getattr(read, name) for name in values if name in group.names()}
    assert found == recipe == json.loads((tmp_path / "run.json").read_text())["recipe"]
    assert (found["sample_prompt"], found["lora_target_modules"], found["learning_rate"]) == (text, [text], 1e-05)


def test_make_recipe_is_absolute(tmp_path, monkeypatch):
    """A recipe means the same in any folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    options = ModelOptions(model="model"), DataOptions(eval_file=["held.txt", "hf://name"])
    train_options = TrainOptions(resume=True, overwrite=True)
    recipe = run_folder.make_recipe(["a.txt", "*.md", "hf://owner/name"], *options, train_options)
    here = str(tmp_path)
    assert recipe["corpus"] == [f"{here}/a.txt", f"{here}/*.md", "hf://owner/name"]
    assert recipe["model"] == f"{here}/model" and recipe["eval_file"] == [f"{here}/held.txt", "hf://name"]
    assert not {"resume", "overwrite", "output_dir"} & set(recipe)
    assert run_folder.make_recipe("a", replace(options[0], model="gpt2"))["model"] == "gpt2"
    assert run_folder.make_recipe("a", SizeOptions())["size"] == "mini"


def test_recipe_names_the_default_model(tiny, corpus, tmp_path, monkeypatch):
    """The recipe names the model that was the default."""
    monkeypatch.setenv("HFKIT_MODEL", tiny)
    hfkit.finetune(corpus, output_dir=tmp_path, max_steps=1, bf16=False)
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["model"] == tiny
