"""A search finds the best of its trials, can be interrupted like a training, and its recipe gives the same score."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import trials
from support.pages import Page
from support.shell import assert_fails, call

import hfkit
from hfkit import console, storage
from hfkit.errors import HfkitError, OptionError, StoppedError
from hfkit.options import TrainOptions
from hfkit.reporting.pages import make_files, write_report
from hfkit.storage import lock
from hfkit.training.monitor import HeldOutMonitor
from hfkit.tuning import search as search_module
from hfkit.tuning import study as study_module
from hfkit.tuning.space import default_space, read_space

pytestmark = pytest.mark.usefixtures("brisk")
SMALL = {**trials.SMALL, "max_steps": 4, "eval_steps": 2, "learning_rate": None}
SPACE = ["learning_rate=1e-4..1e-2", "weight-decay=0..1"]


def tune(corpus, model, folder, **options):
    """A search of few small trials."""
    given = {**SMALL, "search": SPACE, "n_trials": 2, **options}
    return hfkit.tune(corpus, model=model, output_dir=str(folder), **given)


def typed(corpus, model, folder, *more) -> list:
    flags = ["--max-steps", 4, "--eval-steps", 2, "--per-device-train-batch-size", 2, "--no-bf16"]
    search = [word for one in SPACE for word in ("--search", one)]
    return ["tune", corpus, "-m", model, "-o", folder, "-n", 2, *flags, *search, *more]


def table(found) -> list[tuple]:
    """What trials came to, without the numbers of those that were interrupted."""
    rows = found if isinstance(found, list) else found.trials
    return [(row["state"], row["loss"], row["params"]) for row in rows]


@pytest.fixture(scope="module")
def searched(tiny, corpus, tmp_path_factory):
    return tune(corpus, tiny, tmp_path_factory.mktemp("searches") / "search", n_trials=5)


@pytest.fixture
def copied(searched, tmp_path, monkeypatch) -> Path:
    """A finished search to go on with."""
    monkeypatch.setattr(search_module, "plot_trials", lambda *_: None)
    monkeypatch.setattr(search_module, "to_png", lambda _: b"a picture")
    return Path(shutil.copytree(searched.output_dir, tmp_path / "copied"))


# what is found


def test_tune_keeps_the_best(searched):
    """The best trial is kept with its weights, all others as figures."""
    folder, losses = Path(searched.output_dir), [trial["loss"] for trial in searched.trials]
    assert len(losses) == 5 and searched.loss == min(losses) < max(losses)
    best = searched.trials[losses.index(searched.loss)]
    assert searched.best == best["params"] and all(trial["state"] == "complete" for trial in searched.trials)
    for trial in searched.trials:
        assert set(trial["params"]) == {"learning_rate", "weight_decay"}
        assert 1e-4 <= trial["params"]["learning_rate"] <= 1e-2 and 0 <= trial["params"]["weight_decay"] <= 1
        metrics = json.loads((folder / trial["folder"] / "metrics.json").read_text())
        assert (metrics["loss"], metrics["learning_rate"]) == (trial["loss"], trial["params"]["learning_rate"])
    assert [path.parent.name for path in folder.glob("*/*.safetensors")] == [best["folder"]]
    assert len({trial["params"]["weight_decay"] for trial in searched.trials}) == 5


def test_tune_folder(searched):
    """The result is in the folder."""
    known = json.loads((Path(searched.output_dir) / "tuning.json").read_text(), parse_constant=pytest.fail)
    assert (known["trials"], known["best"], known["loss"]) == (searched.trials, searched.best, searched.loss)
    assert known["importances"] == searched.importances
    assert set(searched.importances) == set(searched.best)
    assert math.isclose(sum(searched.importances.values()), 1)
    assert searched.importances["learning_rate"] > 0.6  # so few steps leave nothing for the decay to do
    assert (Path(searched.output_dir) / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_tune_recipe(searched, tmp_path, capfdbinary):
    """The best recipe, run alone, gives the best score, bit-identically."""
    result = call(capfdbinary, "finetune", "--config", searched.recipe, "-o", tmp_path / "alone", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["loss"] == searched.loss
    best = next(trial for trial in searched.trials if trial["loss"] == searched.loss)
    assert trials.outcome(tmp_path / "alone") == trials.outcome(Path(searched.output_dir) / best["folder"])
    assert Path(searched.recipe).read_text().startswith("# hfkit finetune --config best.yaml -o ")


def test_tune_at_a_shell(tiny, corpus, tmp_path, capfdbinary):
    """At a shell it prints a table and the recipe."""
    result = call(capfdbinary, *typed(corpus, tiny, tmp_path / "run"))
    lines, folder = result.stdout.decode().splitlines(), tmp_path / "run"
    assert (result.returncode, lines[-1]) == (0, f"{folder / 'best.yaml'}"), result.stderr
    assert (
        "held-out loss" in lines[1]
        and any(" 0 (defaults) " in line for line in lines)
        and "learning_rate" in lines[1]
        and "weight_decay" in lines[1]
    )
    *said, gain, last = result.stderr.decode().splitlines()
    assert "the defaults" in gain and last == f"hfkit: next: hfkit finetune --config {folder / 'best.yaml'}"
    assert [line.partition(", ")[0].rpartition(" ")[0] for line in said] == [
        f"hfkit: trial {number}: held-out loss" for number in ("0 (the defaults)", "1")
    ]
    again = call(capfdbinary, *typed(corpus, tiny, folder, "--json"))
    found = json.loads(again.stdout)
    assert again.stderr == b"" and found["loss"] == min(trial["loss"] for trial in found["trials"])
    shown = [line for line in lines if f"{found['loss']:.4f}" in line]
    assert shown == [next(line for line in lines[2:] if "." in line)]  # the best first


# going on


def test_tune_goes_on(searched, tiny, corpus, copied, monkeypatch):
    """A finished search is only read; one of more trials goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "finetune", lambda *_, **__: pytest.fail("it trains"))
        again = tune(corpus, tiny, copied, n_trials=5)
        assert tune(corpus, tiny, copied, n_trials=1).trials == again.trials == searched.trials
    more = tune(corpus, tiny, copied, n_trials=6)
    assert more.trials[:5] == searched.trials and len(more.trials) == 6
    assert more.loss <= searched.loss


def test_tune_stopped(searched, tiny, corpus, tmp_path, monkeypatch):
    """A search that is stopped and started again equals the undisturbed one."""
    measure, calls = HeldOutMonitor.measure, []

    def ask(self, model, tokenizer, history, step):
        measurement = measure(self, model, tokenizer, history, step)
        calls.append(step)
        if len(calls) == 5:  # step 2 of the second trial
            os.kill(os.getpid(), signal.SIGTERM)
        return measurement

    with monkeypatch.context() as patch:
        patch.setattr(HeldOutMonitor, "measure", ask)
        with pytest.raises(StoppedError, match="1 of 3 trials are done .*, the same command goes on") as stop:
            tune(corpus, tiny, tmp_path, n_trials=3)
    assert stop.value.exit_code == 143 and not console.state.quiet
    begun = (tmp_path / "trial-1" / "run.json").stat().st_mtime_ns
    found = tune(corpus, tiny, tmp_path, n_trials=3)
    assert table(found) == table(searched)[:3]
    assert (tmp_path / "trial-1" / "run.json").stat().st_mtime_ns == begun  # it went on, it did not begin anew
    assert sorted(trial["folder"] for trial in found.trials) == sorted(path.name for path in tmp_path.glob("trial-*"))


def run_searches(
    corpus, model, folder: Path, n: int, kills: int, seconds: float, seed: int, processes: int = 1
) -> dict:
    """`trials.run_searches`, and what holds for any search that was killed and is done."""
    command = [*map(str, typed(corpus, model, folder, "-n", n))]
    task = {"command": command, "folder": str(folder), "kills": kills, "seconds": seconds}
    result = trials.run_searches({**task, "processes": processes, "seed": seed})
    assert len(result["kills"]) == kills and set(result["ends"]) == {0}, result["log"]
    assert len(result["final"]) == len(set(result["final"])) == n, result
    for before in result["kills"]:
        assert set(before) <= set(result["final"]), result  # none is lost
    print(f"trials that were finished at each kill: {[len(before) for before in result['kills']]} of {n}")


def check_trials(folder: Path, n: int) -> list[dict]:
    """Every trial is there once, its run is whole, and nothing is left of those that were interrupted."""
    found = json.loads((folder / "tuning.json").read_text())["trials"]
    assert len(found) == len({trial["folder"] for trial in found}) == n
    assert len({json.dumps(trial["params"]) for trial in found}) == n
    assert {trial["folder"] for trial in found} == {path.name for path in folder.glob("trial-*")}
    for trial in found:
        if trial["state"] == "complete":
            assert json.loads((folder / trial["folder"] / "metrics.json").read_text())["loss"] == trial["loss"]
    return found


def test_tune_killed(searched, tiny, corpus, tmp_path):
    """A search that is killed in a trial and started again equals the undisturbed one."""
    run_searches(corpus, tiny, tmp_path, n=3, kills=1, seconds=1, seed=1)
    assert table(check_trials(tmp_path / "run", 3)) == table(searched)[:3]


@pytest.fixture(scope="module")
def twelve(tiny, corpus, tmp_path_factory) -> tuple[list[dict], float]:
    """A search of 12 trials, and the seconds it took."""
    started = time.monotonic()
    found = tune(corpus, tiny, tmp_path_factory.mktemp("searches") / "twelve", n_trials=12)
    return found.trials, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_tune_killed_twice(tiny, corpus, tmp_path, twelve, seed):
    """A search of 12 trials that is killed twice has 12."""
    run_searches(corpus, tiny, tmp_path, n=12, kills=2, seconds=twelve[1], seed=seed)
    assert table(check_trials(tmp_path / "run", 12)) == table(twelve[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_tune_with_one_process_killed(tiny, corpus, tmp_path, twelve, seed):
    """Of two processes one is killed, and the other runs its trials."""
    run_searches(corpus, tiny, tmp_path, n=12, kills=1, seconds=twelve[1], seed=seed, processes=2)
    check_trials(tmp_path / "run", 12)


def test_tune_with_two_processes(tiny, corpus, tmp_path, capsys):
    """Both end with all trials; what one of them does the other does not."""
    task = {"command": [*map(str, typed(corpus, tiny, tmp_path / "run", "-n", 4, "--json", "-q"))]}
    with capsys.disabled():  # so that they print to where they are told
        children = [trials.fork(task, str(tmp_path / "run"), tmp_path / f"said-{number}") for number in range(2)]
    assert [trials.wait(child, 120) for child in children] == [0, 0]
    found = check_trials(tmp_path / "run", 4)
    for number in range(2):
        said = (tmp_path / f"said-{number}").read_text()
        assert json.loads(said)["trials"] == found, said


def take(study, folder, limit=4, defaults=None):
    """A trial that nobody holds any longer, as if its process had died; and how many others are running."""
    shared = study_module.SharedStudy(
        folder=folder,
        optuna_study=study,
        figure="loss",
        space={"learning_rate": (1e-4, 1e-2)},
        defaults={"learning_rate": 3e-3},
        seed=1,
    )
    with shared.take_trial(limit) as taken:
        return taken


@pytest.mark.parametrize("finishes", [False, True])
def test_take_trial_counts_once(tmp_path, monkeypatch, finishes):
    """Else the next one is drawn with the seed of the one after it, which then has the same values."""
    import optuna

    def is_held(*_) -> bool:
        if finishes:
            study.tell(theirs.number, 0.5)
        return True

    monkeypatch.setattr(study_module.SharedStudy, "_is_held", is_held)
    study = optuna.create_study()
    default, _ = take(study, tmp_path, 5)
    study.tell(default, 0.5)
    theirs, _ = take(study, tmp_path, 5)
    ours, busy = take(study, tmp_path, 5)
    study.tell(ours, 0.5)
    finishes = False
    after, _ = take(study, tmp_path, 5)
    assert busy == 1 and len({str(trial.params) for trial in (theirs, ours, after)}) == 3


def test_take_trial_holds_it(tmp_path):
    """A trial is another process's while its lock is held, and the next one's as soon as it is not."""
    import optuna

    study = optuna.create_study()
    first, busy = take(study, tmp_path)
    with lock(tmp_path / ".running" / str(first.number)):
        other, busy = take(study, tmp_path)
        assert busy == 1 and other.params != first.params
        assert take(study, tmp_path, 1) == (None, 1)
    again, busy = take(study, tmp_path)
    assert busy == 0 and again.user_attrs["folder"] == "trial-1" and again.params == other.params


@pytest.mark.parametrize("number", [0, 1])
def test_take_trial_interrupted(tmp_path, monkeypatch, number):
    """Whatever was written when a process died, the next one has the same values to try: the defaults, or others."""
    import optuna
    from optuna import Study
    from optuna.trial import Trial

    expected = None
    for owner, name in (
        (Study, "enqueue_trial"), (Study, "tell"), (Study, "ask"), (Trial, "set_user_attr"), (Trial, "suggest_float"),
        (Study, "get_trials"),
    ):  # fmt: skip
        original = getattr(owner, name)
        for after, is_begun in itertools.product((False, True), (False, True)):
            study = optuna.create_study()
            if number:
                study.tell(take(study, tmp_path)[0], 1.0)
            if is_begun:
                first, _ = take(study, tmp_path)
                expected = expected or first.params

            def die(*arguments, original=original, after=after, **keywords):
                if after:
                    original(*arguments, **keywords)
                raise MemoryError

            with monkeypatch.context() as patch, contextlib.suppress(MemoryError):
                patch.setattr(owner, name, die)
                take(study, tmp_path)
            again, _ = take(study, tmp_path)
            where = (name, after, is_begun)
            assert again.params == (expected or again.params) and ("default" in again.user_attrs) == (not number), (
                where
            )
            assert again.user_attrs["folder"] == f"trial-{number}" or not is_begun, where
            study.tell(again, 1.0)
            other, _ = take(study, tmp_path)
            assert other.params != again.params and other.user_attrs["folder"] != again.user_attrs["folder"], where


def test_tune_killed_at_the_end_of_a_trial(tiny, corpus, tmp_path, monkeypatch):
    """A trial that was killed when only its end was missing is compared like any other."""

    def die(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("optuna.study.Study.tell", die)
        with pytest.raises(MemoryError):
            tune(corpus, tiny, tmp_path, n_trials=1)
    tune(corpus, tiny, tmp_path, n_trials=1)
    first, again = study_module.open_study(tmp_path, figure="loss", prune=True).get_trials()
    assert (first.state.name, again.state.name) == ("FAIL", "COMPLETE")
    assert set(again.intermediate_values) == {5} and again.intermediate_values == first.intermediate_values


# what it compares


def test_tune_begins_with_the_defaults(tiny, tmp_path, capfd):
    """The first trial is what `finetune` does with the same options, with as many epochs for a small text."""
    corpus = trials.write_corpus(tmp_path / "corpus.txt", 8)
    options = {"model": tiny, "bf16": False, "eval_fraction": 0.3, "gradient_accumulation_steps": 8}
    run = hfkit.finetune(corpus, output_dir=tmp_path / "run", **options)
    found = hfkit.tune(corpus, output_dir=tmp_path / "search", n_trials=1, **options)
    (trial,) = found.trials
    assert trial["default"] and trials.outcome(tmp_path / "search" / "trial-0") == trials.outcome(run.output_dir)
    recipe = json.loads((tmp_path / "search" / "trial-0" / "run.json").read_text())["recipe"]
    assert recipe == json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert trial["params"]["num_train_epochs"] == recipe["num_train_epochs"] > 3
    assert {name: recipe[name] for name in trial["params"]} == trial["params"]


def test_tune_compares_by_accuracy(tiny, tmp_path, capfdbinary):
    """Where a model chooses among labels, more right answers beat a lower loss: in the study, the table, the page."""
    rows = [f"text {number},{'good' if number % 3 else 'bad'}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    labels = {"template": "{text} is {label}", "labels": ["good", "bad"], "eval_fraction": 0.3}
    space = ["learning_rate=1e-9,3e-3", "warmup_steps=0..0.5"]
    found = tune(str(tmp_path / "rows.csv"), tiny, tmp_path / "run", n_trials=4, search=space, **labels)
    study = study_module.open_study(tmp_path / "run", figure="accuracy", prune=True)
    assert study.direction.name == "MAXIMIZE"
    assert [trial.value for trial in study.get_trials()] == [trial["accuracy"] for trial in found.trials]
    for trial in found.trials:
        metrics = json.loads((tmp_path / "run" / trial["folder"] / "metrics.json").read_text())
        assert (metrics["accuracy"], metrics["loss"]) == (trial["accuracy"], trial["loss"])
    best = max(found.trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    assert (found.best, found.accuracy, found.loss) == (best["params"], best["accuracy"], best["loss"])
    page = Page(write_report([tmp_path / "run"], tmp_path / "page.html").read_text())
    assert f"Best of 4 trials: held-out accuracy {best['accuracy']:.1%}" in page.text
    assert page.tables[0][0][:3] == ["trial", "held-out accuracy", "held-out loss"]
    assert page.tables[0][1][:2] == [str(best["number"]), f"{best['accuracy']:.1%}"]


# what ends a trial


MEASURED = {"eval_loss": 10.0, "step": 0}


@pytest.fixture
def instant(monkeypatch):
    """Trials that take no time, in a study that is not kept: with a learning rate of 1e-9 the loss is high."""

    def finetune(corpus, *, train, callbacks, **options):
        folder, state = Path(train.output_dir), SimpleNamespace(max_steps=10, global_step=0, log_history=[MEASURED])
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "recipe.yaml").write_text("")
        callbacks[0].on_train_begin(None, state, None)
        for state.global_step in range(11):
            loss = (9.0 if train.learning_rate == 1e-9 else 5.0) - 0.1 * state.global_step
            callbacks[0].on_log(None, state, None, logs={"eval_loss": loss, "eval_accuracy": loss / 10})
        metrics = {"loss": loss, "accuracy": loss / 10, "loss_before": 10.0, "steps": 10, "history": []}
        return hfkit.Run(train.output_dir, metrics)

    import optuna

    study = optuna.create_study()

    def open_study(folder, figure, prune):
        study.pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()
        return study

    monkeypatch.setattr(search_module, "finetune", finetune)
    monkeypatch.setattr(search_module, "open_study", open_study)
    monkeypatch.setattr(search_module, "plot_trials", lambda *_: None)
    monkeypatch.setattr(search_module, "to_png", lambda _: b"a picture")


def test_prune_poor_trials(tiny, corpus, tmp_path, capfd, instant):
    """Poor trials are pruned once there is something to compare them with."""
    options = {"search": ["learning_rate=3e-3,1e-9"], "n_trials": 12}
    found = tune(corpus, tiny, tmp_path / "run", **options)
    pruned = [trial for trial in found.trials if trial["state"] == "pruned"]
    assert pruned and all(trial["params"] == {"learning_rate": 1e-9} for trial in pruned)
    assert all(trial["loss"] is None for trial in pruned) and found.best["learning_rate"] != 1e-9
    assert all(trial["state"] == "complete" for trial in found.trials[:5])
    assert not [trial for trial in pruned if (tmp_path / "run" / trial["folder"] / "checkpoints").exists()]
    said = capfd.readouterr().err
    assert said.count(": pruned, learning_rate 1e-09") == len(pruned) and said.count("hfkit: trial ") == 12
    more = tune(corpus, tiny, tmp_path / "run", **{**options, "n_trials": 20}, prune=False).trials[12:]
    assert {trial["state"] for trial in more} == {"complete"} and 1e-9 in [t["params"]["learning_rate"] for t in more]


@pytest.mark.slow
def test_prune_leaves_no_weights(tiny, corpus, tmp_path):
    """Pruned trainings leave no weights."""
    found = tune(corpus, tiny, tmp_path, search=["learning_rate=3e-3,1e-9"], n_trials=12, eval_steps=1)
    pruned = [trial for trial in found.trials if trial["state"] == "pruned"]
    assert pruned and all(trial["params"] == {"learning_rate": 1e-9} for trial in pruned)
    for trial in pruned:
        left = {path.name for path in (tmp_path / trial["folder"]).iterdir()}
        assert "recipe.yaml" in left and not {"checkpoints", "metrics.json", "model.safetensors"} & left


def test_watch_compares_shares():
    """Trials of unequal lengths are compared at the same share of their steps."""
    import optuna

    study = optuna.create_study()
    for steps in (10, 20, 50, 100, 200, 1000):
        trial = study.ask()
        watch = search_module._Watch(trial, "loss")
        state = SimpleNamespace(max_steps=steps, global_step=0)
        for step in range(0, steps + 1, steps // 10):
            state.global_step = step
            watch.on_log(None, state, None, logs={"eval_loss": 5.0 - step / steps})
        study.tell(trial, 4.0)
    assert [sorted(trial.intermediate_values) for trial in study.get_trials()] == [list(range(1, 10))] * 6


def test_tune_diverged_trial(tiny, corpus, tmp_path, capfd):
    """A trial that diverges is one of the trials."""
    found = tune(corpus, tiny, tmp_path, search=["learning_rate=1e-3,1e30"], n_trials=4, warmup_steps=0)
    states = {trial["params"]["learning_rate"]: (trial["state"], trial["loss"] is None) for trial in found.trials}
    default = found.trials[0]["params"]["learning_rate"]
    assert states == dict.fromkeys((default, 1e-3), ("complete", False)) | {1e30: ("diverged", True)}
    assert found.best["learning_rate"] < 1 and "diverged, learning_rate 1e+30" in capfd.readouterr().err


def test_tune_timeout(tiny, corpus, tmp_path, monkeypatch, instant):
    """No trial is begun after the timeout, and a search goes on without it."""
    clock, begun = [0.0], []
    real = search_module._run_trial

    def run_trial(*arguments):
        begun.append(clock[0])
        clock[0] += 40
        return real(*arguments)

    monkeypatch.setattr(search_module, "_run_trial", run_trial)
    # Not time.monotonic itself: a server's event loop in another thread would sleep for hours.
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    assert len(tune(corpus, tiny, tmp_path, n_trials=9, timeout=100).trials) == 3 and begun == [0, 40, 80]
    assert len(tune(corpus, tiny, tmp_path, n_trials=4).trials) == 4


# options


def test_tune_train_best(searched, tiny, corpus, copied):
    """The best settings are trained with once."""
    run = tune(corpus, tiny, copied, n_trials=5, train_best=True).run
    assert run.output_dir == str(copied / "best") and run.metrics["loss"] == searched.loss
    best = next(trial for trial in searched.trials if trial["loss"] == searched.loss)
    assert trials.outcome(copied / "best") == trials.outcome(copied / best["folder"]) and hfkit.load(run.output_dir)
    before = (copied / "best" / "metrics.json").stat().st_mtime_ns
    assert tune(corpus, tiny, copied, n_trials=5, train_best=True).run == run
    assert (copied / "best" / "metrics.json").stat().st_mtime_ns == before
    (copied / "best" / "metrics.json").unlink()  # of another search, or half of this
    facts = json.loads((copied / "best" / "run.json").read_text())
    facts["recipe"]["learning_rate"] = 1.0
    (copied / "best" / "run.json").write_text(json.dumps(facts))
    assert tune(corpus, tiny, copied, n_trials=5, train_best=True).run.metrics["loss"] == searched.loss


def test_tune_lora(tiny, corpus, tmp_path):
    """Rank and dropout of an adapter are searched."""
    found = tune(corpus, tiny, tmp_path, lora=True, search=["lora_r=2,4", "lora_dropout=0..0.5"])
    best = next(trial["folder"] for trial in found.trials if trial["params"] == found.best)
    config = json.loads((tmp_path / best / "adapter_config.json").read_text())
    assert (config["r"], config["lora_dropout"]) == (found.best["lora_r"], found.best["lora_dropout"])
    assert len({trial["params"]["lora_dropout"] for trial in found.trials}) == 2
    space = default_space(TrainOptions(lora=True), DECIDED)
    assert {"lora_r", "lora_dropout"} < set(space) and not {"lora_r"} & set(default_space(TrainOptions(), DECIDED))


def test_tune_by_recipe(tiny, corpus, tmp_path, capfdbinary):
    """A recipe may hold the ranges."""
    corpus = hfkit.prepare(corpus, model=tiny, output_dir=tmp_path / "prepared").folder
    recipe = tmp_path / "search.yaml"
    recipe.write_text(
        f"corpus: {corpus}\nmodel: {tiny}\nmax_steps: 2\nbf16: false\nn_trials: 2\nsearch:\n"
        "  - learning_rate=1e-4..1e-2\n  - dropout=0,0.5\n  - warmup_steps=0..2\n"
    )
    result = call(capfdbinary, "tune", "--config", recipe, "-o", tmp_path / "a ?#%20ä", "--json", "-n", 2)
    assert result.returncode == 0, result.stderr
    default, params = (trial["params"] for trial in json.loads(result.stdout)["trials"])
    assert set(params) == {"learning_rate", "dropout", "warmup_steps"} and default["warmup_steps"] == 0.05
    assert params["dropout"] in (0, 0.5) and params["warmup_steps"] in (0, 1, 2)
    assert (tmp_path / "a ?#%20ä" / "study.db").is_file()


DECIDED = TrainOptions(learning_rate=2e-4, per_device_train_batch_size=3, num_train_epochs=3.0)


def test_default_space():
    """What is left open is searched, around the values that are set or that `finetune` would take."""
    space = default_space(TrainOptions(), DECIDED)
    names = {"learning_rate", "weight_decay", "warmup_steps", "per_device_train_batch_size", "num_train_epochs"}
    assert set(space) == names | {"dropout"}
    assert space["learning_rate"] == pytest.approx((2e-5, 2e-3)) and space["num_train_epochs"] == [1, 2, 3, 5]
    assert space["per_device_train_batch_size"] == [2, 3, 4, 8, 16]
    given = {"learning_rate": 1e-3, "weight_decay": 0.5, "max_steps": 9, "per_device_train_batch_size": 3}
    left = default_space(TrainOptions(**given), TrainOptions(**given))
    assert left == {"learning_rate": (1e-4, 1e-2)} | {name: space[name] for name in ("warmup_steps", "dropout")}


def test_default_space_of_a_small_corpus():
    """Where `finetune` makes 30 epochs, a trial makes as many, or a share of them, not three."""
    epochs = default_space(TrainOptions(), replace(DECIDED, num_train_epochs=30.0))["num_train_epochs"]
    assert 30 in epochs and min(epochs) == 10


@pytest.mark.parametrize(
    ("given", "name", "values"),
    [
        ("learning_rate=1e-5..1e-3", "learning_rate", (1e-5, 1e-3)),
        ("--learning-rate=1e-5..1e-3", "learning_rate", (1e-5, 1e-3)),
        ("weight_decay=0..1", "weight_decay", (0.0, 1.0)),
        ("dropout=0...5", "dropout", (0.0, 0.5)),
        ("num_train_epochs=1..5", "num_train_epochs", (1, 5)),
        ("warmup_steps=0..100", "warmup_steps", (0, 100)),
        ("dataloader_num_workers=0..1", "dataloader_num_workers", (0, 1)),
        ("optim=adamw_torch,muon", "optim", ["adamw_torch", "muon"]),
        ("bf16=true,false", "bf16", [True, False]),
        ("gradient_accumulation_steps=1,2", "gradient_accumulation_steps", [1, 2]),
    ],
)
def test_read_space_values(given, name, values):
    """A range is read as it is meant."""
    found = read_space([given], TrainOptions())[name]
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("learning_rate=1e-3..1e-5", "write NAME=LOW..HIGH"),
        ("learning_rate=", "write NAME=LOW..HIGH"),
        ("learning_rate=1..1", "write NAME=LOW..HIGH"),
        ("bf16=false..true", "write NAME=LOW..HIGH"),
        ("lr=1..2", "is not a training option"),
        ("=1..2", "is not a training option"),
        ("block_size=16,32", "is not a training option"),
        ("seed=1,2", "cannot be searched"),
        ("output_dir=a,b", "cannot be searched"),
        ("learning_rate=fast,slow", "--learning-rate is 'fast'"),
        ("learning_rate=-1..1", "it must be more than 0"),
        ("lora_r=4..8", "add --lora"),
        ("dropout=0..{", "it must be a number"),
    ],
)
def test_read_space_refuses(given, words, corpus, tiny, tmp_path, capfdbinary):
    """A range that is not valid is a usage error."""
    result = call(capfdbinary, "tune", corpus, "-m", tiny, "-o", tmp_path / "run", "--search", given)
    assert_fails(result, 2, words)
    assert not (tmp_path / "run").exists()


# what is in the way


def test_claim_refuses_other_settings(tiny, corpus, copied, capfdbinary):
    """Other settings in the same folder are refused, and overwritten when asked."""
    before = sorted(copied.rglob("*"))
    for more, words in ((["--search", "dropout=0..0.1"], "search dropout"), (["--max-steps", 5], "max_steps")):
        assert_fails(call(capfdbinary, *typed(corpus, tiny, copied, *more)), 1, f"other settings ({words})")
    assert sorted(copied.rglob("*")) == before
    with lock(copied / ".running" / "0"):
        assert_fails(call(capfdbinary, *typed(corpus, tiny, copied, "--overwrite")), 1, "is in use by process")
    (copied / "tuning.png").write_text("stale")
    found = tune(corpus, tiny, copied, n_trials=1, overwrite=True, max_steps=1)
    assert (
        len(found.trials) == 1
        and (copied / "tuning.png").read_bytes() != b"stale"
        and not (copied / "trial-1").exists()
    )


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_claim_refuses_foreign_files(tiny, corpus, tmp_path, capfdbinary, flags):
    """A folder with anything else is left alone."""
    (tmp_path / "thesis.txt").write_text("ten years")
    assert_fails(
        call(capfdbinary, *typed(corpus, tiny, tmp_path, *flags)), 1, "holds thesis.txt, which hfkit did not write"
    )
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_claim_killed_while_overwriting(tmp_path):
    """Killed while it is overwritten, a folder never has half of a search."""
    folder, old, new = tmp_path / "run", {"a": 1}, {"b": 1}
    (folder / "trial-0").mkdir(parents=True)
    for name in ("study.db", "trial-0/run.json", "trial-0/metrics.json"):
        (folder / name).write_text("old")
    (folder / "tuning.json").write_text(json.dumps({"settings": old}))
    storage.add_owned(folder, ["tuning.json", "study.db", "trial-0"])
    storage.add_owned(folder / "trial-0", ["run.json", "metrics.json"])
    whole, seen = sorted(path.name for path in folder.rglob("*") if not path.name.startswith(".")), set()
    overwrite = lambda: study_module.claim(folder, new, overwrite=True)  # noqa: E731
    for _ in trials.killed_at_each(overwrite, folder, tmp_path / "backup"):
        state = json.loads((folder / "tuning.json").read_text()).get("settings", {})
        left = sorted(path.name for path in folder.rglob("*") if not path.name.startswith("."))
        assert left == (["tuning.json"] if state == new else whole if state == old else left)
        for asked in (old, new):
            if state != asked:
                with pytest.raises(HfkitError, match="--overwrite"):
                    study_module.claim(folder, asked, overwrite=False)
        seen.add(json.dumps(state))
    assert len(seen) == 3


def test_tune_with_an_edited_corpus(tiny, tmp_path):
    """A search does not go on with a corpus that was edited."""
    corpus = trials.write_corpus(tmp_path / "corpus.txt")
    first = tune(corpus, tiny, tmp_path / "run", n_trials=1)
    text = Path(corpus).read_text()
    Path(corpus).write_text(text.replace("rain", "hail"))
    with pytest.raises(HfkitError, match=r"other settings \(corpus_sha256\)"):
        tune(corpus, tiny, tmp_path / "run")
    Path(corpus).write_text(text)
    found = tune(corpus, tiny, tmp_path / "run")
    assert len(found.trials) == 2 and found.trials[0] == first.trials[0]


def test_tune_bad_requests(tiny, corpus, tmp_path, capfdbinary, monkeypatch, searched):
    """Bad requests are one line before anything is trained."""
    monkeypatch.setattr(search_module, "finetune", lambda *_, **__: pytest.fail("it trains"))
    place = tmp_path / "run"
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place, "--eval-fraction", 0)), 2, "add --eval-file")
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place, "-n", 0)), 2, "n-trials")
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place, "--timeout", 0)), 2, "--timeout is 0")
    falling = ("--lr-scheduler-kwargs", '{"num_decay_steps": 2}')
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place, *falling)), 2, "cosine takes num_cycles")
    both = ("--search", "lr_scheduler_type=warmup_stable_decay,linear")
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place, *falling, *both)), 2, "linear takes no arguments")
    assert_fails(call(capfdbinary, *typed(corpus, "/no/such/model", place)), 1, "/no/such/model")
    assert_fails(call(capfdbinary, *typed("/no/such/corpus", tiny, place)), 1, "/no/such/corpus")
    assert_fails(call(capfdbinary, *typed(corpus, tiny, "/dev/null")), 1, "cannot write to /dev/null")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_fails(call(capfdbinary, *typed(corpus, tiny, place)), 1, "tune needs optuna: pip install 'hfkit[tune]'")
    assert not place.exists()


def test_tune_too_small_a_corpus(tiny, tmp_path):
    """A corpus that is too small to hold anything out is refused."""
    (tmp_path / "corpus.txt").write_text("one line")
    with pytest.raises(HfkitError, match="nothing is held out"):
        tune(str(tmp_path / "corpus.txt"), tiny, tmp_path / "run")
    with pytest.raises(OptionError, match="--n-trials is 0"):
        tune(str(tmp_path / "corpus.txt"), tiny, tmp_path / "run", n_trials=0)


def test_tune_one_small_text(tiny, tmp_path):
    """A text of three pages can be searched on: its end is held out."""
    (tmp_path / "corpus.txt").write_text(" ".join(trials.WORDS * 70))
    found = tune(str(tmp_path / "corpus.txt"), tiny, tmp_path / "run")
    assert len(found.trials) == 2 and found.loss == min(trial["loss"] for trial in found.trials)


def test_tune_of_nothing_held_out_trains_nothing(tiny, tmp_path, monkeypatch):
    """It is reported before the first step, with a way out that leads somewhere."""
    (tmp_path / "corpus.txt").write_text("one line")
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(HfkitError, match="raise --eval-fraction, or name another text with --eval-file"):
        tune(str(tmp_path / "corpus.txt"), tiny, tmp_path / "run")
    monkeypatch.undo()
    held = trials.write_corpus(tmp_path / "held.txt", 4)
    assert tune(str(tmp_path / "corpus.txt"), tiny, tmp_path / "other", eval_file=held).loss


def test_card_of_a_trial_without_weights(tiny, corpus, tmp_path, monkeypatch):
    """It says how to train the trial again, not how to load it."""
    monkeypatch.setattr("hfkit.training.runs.make_files", make_files)
    monkeypatch.setattr("hfkit.tuning.search.make_files", make_files)
    found = tune(corpus, tiny, tmp_path, n_trials=3)
    for trial in found.trials:
        folder = tmp_path / trial["folder"]
        has_weights = (folder / "model.safetensors").is_file()
        assert has_weights == (trial["params"] == found.best)
        card, metrics = (folder / "README.md").read_text(), json.loads((folder / "metrics.json").read_text())
        assert metrics.get("has_weights", True) == has_weights
        assert (f"hfkit generate -m {folder} " in card) == has_weights
        assert (f"hfkit finetune --config {folder}/recipe.yaml" in card) != has_weights


@pytest.mark.parametrize("shape", ["[]", "null", "[" * 100_000, "{", '{"settings": 3}', '{"settings": []}', "\xff"])
def test_claim_where_the_file_has_another_shape(tmp_path, shape):
    """A damaged search is refused, not searched on with other settings; it can be overwritten."""
    asked = {"a": [1]}
    study_module.claim(tmp_path, asked, overwrite=False)
    (tmp_path / "tuning.json").write_text(shape, encoding="latin-1")
    with pytest.raises(HfkitError, match="holds a search with other settings .*: --overwrite"):
        study_module.claim(tmp_path, asked, overwrite=False)
    study_module.claim(tmp_path, asked, overwrite=True)
    study_module.claim(tmp_path, asked, overwrite=False)
