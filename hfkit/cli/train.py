"""The same command on several processes, one for each GPU, through torch's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hfkit
from hfkit import console, processes
from hfkit.cli.flags import CorpusArgument, Json, flags
from hfkit.corpus.documents import find_corpus, is_prepared
from hfkit.errors import HfkitError, OptionError
from hfkit.options import DataOptions, LaunchOptions, ModelOptions, SizeOptions, TrainOptions, TuneOptions

if TYPE_CHECKING:
    from hfkit.tuning.search import Search

_Show = Annotated[int, typer.Option(metavar="N", min=0, help="Print the first N sequences as the model sees them.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the run would be and cost, and stop there.")]


@flags
def finetune(
    corpus: CorpusArgument,
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    dry_run: _DryRun = False,
    json: Json = False,
) -> None:
    """Go on training a model on a corpus; print the folder of the result."""
    from hfkit.training import run_folder

    inputs = [*(data.eval_file or []), *filter(None, [model.model])]
    run_folder.check_request(corpus, train, inputs=inputs, dry_run=dry_run)
    if launch_processes(launch):
        return
    _print_run(hfkit.finetune(corpus, model=model, data=data, train=train, dry_run=dry_run), json)


@flags
def pretrain(
    corpus: CorpusArgument,
    size: SizeOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dry_run: _DryRun = False,
    json: Json = False,
) -> None:
    """Train a tokenizer and a GPT-2 from nothing; print the folder of the result."""
    from hfkit.training import run_folder

    run_folder.check_request(corpus, train, inputs=data.eval_file or [], dry_run=dry_run)
    if launch_processes(launch):
        return
    _print_run(hfkit.pretrain(corpus, size=size, data=data, train=train, device=device, dry_run=dry_run), json)


@flags
def prepare(
    corpus: CorpusArgument,
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Folder to keep the tokens in.")] = None,
    show: _Show = 0,
    json: Json = False,
) -> None:
    """Tokenize a corpus once; print what is in it, and what training on it would cost here."""
    from json import dumps

    from hfkit.corpus.documents import find_corpus

    find_corpus(corpus)  # so that a mistake is told before torch is imported
    found = hfkit.prepare(corpus, model=model, data=data, output_dir=output, show=show)
    console.write((dumps(found.to_dict()) if json else "\n".join(found.lines())) + "\n")


@flags
def tune(
    corpus: CorpusArgument,
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    options: TuneOptions,
    json: Json = False,
) -> None:
    """Search for good training options; print the trials and the best recipe."""

    write_search(corpus, model, data, train, options, json=json)


def _print_run(run: Any, json: bool) -> None:
    from json import dumps

    if run and processes.rank == 0:
        console.write((dumps(run.metrics) if json else run.output_dir) + "\n")


def launch_processes(options: LaunchOptions) -> bool:
    """Run this command line on `options.num_processes` processes; False if there is nothing to launch.

    Raises:
        HfkitError: a process was killed.
        SystemExit: a process failed, or all were asked to stop; they have said why.
    """
    if options.num_processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    if options.num_processes % options.num_machines:
        raise OptionError("--num-processes is of all machines together: it must be a multiple of --num-machines")
    if options.num_machines > 1 and not options.main_process_ip:
        raise OptionError("--num-machines needs --main-process-ip, the address of machine 0")
    here = options.num_processes // options.num_machines
    for name, value in {
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // here),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 60,  # seconds to save, before they are killed
    }.items():
        os.environ.setdefault(name, str(value))
    logging.disable()  # of the launcher: the processes say themselves what matters
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if options.num_machines == 1:
        arguments = ["--standalone"]
    else:
        arguments = ["--nnodes", str(options.num_machines), "--node-rank", str(options.machine_rank)]
        arguments += ["--master-addr", str(options.main_process_ip), "--master-port", str(options.main_process_port)]
    try:
        run.run(run.parse_args([*arguments, "--nproc-per-node", str(here), "-m", "hfkit", *sys.argv[1:]]))
        return True
    except SignalException as stop:
        code = 128 + stop.sigval
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failed: failed[1].timestamp)
        code = first.exitcode
        if code < 0:
            why = f"process {rank} was killed ({signal.Signals(-code).name})"
            raise HfkitError(f"{why}; --resume goes on from the newest checkpoint") from error
    sys.exit(code)


def write_search(
    corpus: list[str], model: ModelOptions, data: DataOptions, train: TrainOptions, options: TuneOptions, *, json: bool
) -> None:
    """Search, and print what was found."""
    from hfkit.tuning.search import tune

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
