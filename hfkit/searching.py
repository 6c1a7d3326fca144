"""`hfkit tune` at a shell: the trials as a table, what each option is worth, and the best recipe."""

from json import dumps
from pathlib import Path

from hfkit import console
from hfkit.corpus.documents import find_corpus, is_prepared
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.tuning.search import Search, tune


def write(
    corpus: list[str], model: ModelOptions, data: DataOptions, train: TrainOptions, options: TuneOptions, *, json: bool
) -> None:
    """Search, and print what was found."""
    if not is_prepared(Path(corpus[0])):
        find_corpus(corpus)
    found = tune(corpus, model=model, data=data, train=train, options=options)
    if json:
        values = {name: value for name, value in vars(found).items() if name != "run"}
        console.write(dumps(values | {"metrics": found.run.metrics if found.run else None}) + "\n")
        return
    _write_trials(found)
    console.write(f"{found.recipe}\n")


def _write_trials(found: Search) -> None:
    names = list(dict.fromkeys(name for trial in found.trials for name in trial["params"]))
    worth = [f"{name}\n{found.importances[name]:.0%}" if name in found.importances else name for name in names]
    rows = []
    for trial in sorted(found.trials, key=lambda one: (one["loss"] is None, one["loss"] or 0)):
        score = "pruned" if trial["state"] == "pruned" else f"{trial['loss']:.4f}"
        cells = (trial["params"].get(name, "") for name in names)
        shown = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        rows.append((str(trial["number"]), score, *shown))
    console.write_table(("trial", "held-out loss", *worth), rows, 140)
