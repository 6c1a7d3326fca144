"""`hfkit finetune`, `pretrain`, `prepare` and `tune`; and the same command on several processes, one for each GPU."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hfkit
from hfkit import console, processes
from hfkit.cli.flags import CORPUS, JSON, flags
from hfkit.corpus.files import find_corpus, prepared_folder
from hfkit.declaration import option
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, LaunchOptions, ModelOptions, SizeOptions, TrainOptions, TuneOptions

if TYPE_CHECKING:
    from hfkit.training.runs import Run
    from hfkit.tuning.search import Search

_DRY_RUN = option(False, "Print what the run would be and cost, then stop.")


@flags
def finetune(
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    corpus: list[str] = CORPUS,
    dry_run: bool = _DRY_RUN,
    json: bool = JSON,
) -> None:
    """Continue training a model on a corpus; print its new folder.

    Examples:
        hfkit finetune corpus.txt
        hfkit finetune corpus.txt -m gpt2 --lora --num-train-epochs 5
        hfkit finetune --config generation-stories
    """
    _check_inputs(corpus, data, model)
    _check_folder("finetune", corpus, train, [*(data.eval_file or []), *filter(None, [model.model])], dry_run)
    if not launch_processes(launch):
        _print_run(hfkit.finetune(corpus, model=model, data=data, train=train, dry_run=dry_run), json)


@flags
def pretrain(
    size: SizeOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    corpus: list[str] = CORPUS,
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ..."),
    dry_run: bool = _DRY_RUN,
    json: bool = JSON,
) -> None:
    """Train a tokenizer and a GPT-2 from nothing; print the folder.

    Examples:
        hfkit pretrain corpus.txt --size mini
    """
    _check_inputs(corpus, data)
    _check_folder("pretrain", corpus, train, data.eval_file or [], dry_run)
    if not launch_processes(launch):
        run = hfkit.pretrain(corpus, size=size, data=data, train=train, device=device, dry_run=dry_run)
        _print_run(run, json)


def _check_inputs(corpus: list[str], data: DataOptions, model: ModelOptions | None = None) -> None:
    """HfkitError if a corpus or the model does not exist. Call it before torch is imported."""
    if processes.count > 1:
        return  # the launcher has checked them
    for paths, options in ((corpus, data), (data.eval_file, None)):
        if paths and not prepared_folder(paths):
            find_corpus(paths, options)
    if model:
        find_model(model)


def _check_folder(command: str, corpus: list[str], train: TrainOptions, inputs: list[str], dry_run: bool) -> None:
    """HfkitError if the run's folder is not free. Call it before torch is imported."""
    from hfkit.training import run_folder

    if processes.count == 1:  # else the launcher has checked it
        with run_folder.reserve(command, corpus, train, inputs, dry_run=dry_run):
            pass


def _print_run(run: Run | None, json: bool) -> None:
    """Print the result of a run. There is none after a dry run."""
    if run is None or processes.rank > 0:
        return
    if json:
        console.write_json(run.metrics)
    else:
        console.write(f"{run.output_dir}\n")


@flags
def prepare(
    model: ModelOptions,
    data: DataOptions,
    corpus: list[str] = CORPUS,
    output_dir: Path | None = option(None, "Folder to keep the tokens in.", short="-o"),
    show: int | None = option(None, "Print the first N sequences as the model sees them. [default: 1, cut]", min=0),
    json: bool = JSON,
) -> None:
    """Tokenize a corpus; print what is in it and what training costs.

    Examples:
        hfkit prepare corpus.txt
    """
    _check_inputs(corpus, data, model)
    count = (0 if json else 1) if show is None else show
    preparation = hfkit.prepare(corpus, model=model, data=data, output_dir=output_dir, show=count)
    if json:
        console.write_json(preparation.to_dict())
        return
    console.write("".join(f"{line}\n" for line in preparation.lines(brief=show is None)))
    from hfkit.training.run_folder import command_line

    command = command_line("finetune", str(output_dir) if output_dir else corpus, data)
    console.note(f"next: {command}" + (f" -m {shlex.quote(model.model)}" if model.model else ""))


@flags
def tune(
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    options: TuneOptions,
    corpus: list[str] = CORPUS,
    json: bool = JSON,
) -> None:
    """Search for good training options; print trials and best recipe.

    Examples:
        hfkit tune corpus.txt -n 20
        hfkit tune corpus.txt --search learning_rate=1e-5..1e-3
    """
    _check_inputs(corpus, data, model)
    search = hfkit.tune(corpus, model=model, data=data, train=train, options=options)
    if json:
        values = {name: value for name, value in vars(search).items() if name != "run"}
        console.write_json(values | {"metrics": search.run.metrics if search.run else None})
        return
    _print_trials(search)
    console.write(f"{search.recipe}\n")
    from hfkit.reporting.pages import explain_search

    if gain := explain_search(search.trials):
        console.note(gain[0].lower() + gain[1:].rstrip("."))
    console.note(f"next: hfkit finetune --config {shlex.quote(str(search.recipe))}")


def _print_trials(search: Search) -> None:
    """Print a table of the trials, the best one first. A column's head gives the importance of its option."""
    from hfkit.reporting.summaries import ranked, show_figure, show_value

    names = list(dict.fromkeys(name for trial in search.trials for name in trial["params"]))
    heads = [f"{name}\n{search.importances[name]:.0%}" if name in search.importances else name for name in names]
    measures = ("loss",) if search.accuracy is None else ("accuracy", "loss")
    rows = []
    for trial in ranked(search.trials):
        number = f"{trial['number']}{' (defaults)' if trial['default'] else ''}"
        scores = [show_figure(trial[measure], measure) for measure in measures]
        if trial["loss"] is None:
            scores[0] = trial["state"]
        rows.append((number, *scores, *(show_value(trial["params"].get(name, "")) for name in names)))
    console.write_table(("trial", *(f"held-out {measure}" for measure in measures), *heads), rows, 140)


def launch_processes(options: LaunchOptions) -> bool:
    """Run this command line on `options.num_processes` processes; return False if there is nothing to launch.

    Raises:
        HfkitError: a process was killed.
        SystemExit: a process failed and has printed why, or all of them were asked to stop.
    """
    if options.num_processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    if options.num_processes % options.num_machines:
        raise OptionError("--num-processes is of all machines together: it must be a multiple of --num-machines")
    if options.num_machines > 1 and not options.main_process_ip:
        raise OptionError("--num-machines needs --main-process-ip, the address of machine 0")
    local_count = options.num_processes // options.num_machines
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_count)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")  # seconds to save before a process is killed
    logging.disable()  # the launcher's log repeats what the processes print themselves
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if options.num_machines == 1:
        arguments = ["--standalone"]
    else:
        arguments = ["--nnodes", str(options.num_machines), "--node-rank", str(options.machine_rank)]
        arguments += ["--master-addr", str(options.main_process_ip), "--master-port", str(options.main_process_port)]
    arguments += ["--nproc-per-node", str(local_count), "-m", "hfkit", *sys.argv[1:]]
    try:
        run.run(run.parse_args(arguments))  # type: ignore[no-untyped-call]  # torch leaves both untyped
        return True
    except SignalException as stop:
        code = 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        code = failure.exitcode
        if code < 0:
            reason = f"process {rank} was killed ({signal.Signals(-code).name})"
            raise HfkitError(f"{reason}; --resume continues from the newest checkpoint") from error
    sys.exit(code)
