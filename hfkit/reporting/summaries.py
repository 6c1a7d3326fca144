"""What the metrics of a finished run say, as texts: the same on its card, on its page and beside other runs."""

import json
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkit.console import counted, duration, printable, with_error

_COMMANDS = {
    "classification": 'hfkit classify -m {folder} "A text"',
    "question-answering": 'hfkit answer -m {folder} "A question?" --context text.txt',
    "messages": "hfkit chat -m {folder}",
}
_SENTENCE_END = re.compile(r"""[.!?…。！？]["'”’»)]*(?=\s|$)""")


def ranked(trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials of a search, the best one first; those without a score last."""
    return sorted(trials, key=lambda trial: merit(trial.get("accuracy"), trial["loss"]))


def merit(accuracy: float | None, loss: float | None) -> tuple[float, float]:
    """Sorts results, the best first: by accuracy where that is measured, and those of equal accuracy by loss."""
    return -(accuracy or 0.0), math.inf if loss is None else loss


def compared_by(trials: Iterable[dict[str, Any]]) -> str:
    """The figure that trials of a search are compared by: their accuracy where that is measured, else the loss."""
    return "accuracy" if any(trial.get("accuracy") is not None for trial in trials) else "loss"


def show_figure(value: float | None, name: str) -> str:
    """A loss, an accuracy or a perplexity as a text."""
    return "–" if value is None else format(value, {"accuracy": ".1%", "loss": ".4f"}.get(name, ",.2f"))


def show_value(value: Any) -> str:
    """The value of a training option as a text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote."""

    title: str
    prompt: str
    text: str  # up to the end of a sentence
    rest: str  # of a sentence that was cut off at the limit of tokens

    @property
    def whole(self) -> str:
        return self.prompt + self.text + self.rest


@dataclass(frozen=True)
class Summary:
    """A run in texts."""

    name: str
    kind: str  # of task: only runs of one kind can be compared
    unit: str  # of the loss
    headline: str  # what was gained, in a few words
    explanation: str
    command: str  # that uses the model; trains it again if its weights are gone
    has_weights: bool
    template: str  # of its task, as JSON
    scores: list[tuple[str, str, str, str]]  # what, before, after, difference with its error
    before_after: list[Sample]
    samples: list[Sample]
    copying: str  # what the samples took from the corpus
    settings: dict[str, str]


def summarize(metrics: dict[str, Any]) -> Summary:
    """Raises LookupError, TypeError, ValueError or AttributeError where `metrics` are not those of a run."""
    task, prompt = metrics.get("task"), metrics.get("prompt") or ""
    samples = [
        _cut(f"Sample {number}", prompt if text.startswith(prompt) else "", text.removeprefix(prompt))
        for number, text in enumerate(metrics.get("samples") or [], 1)
    ]
    unit = "nats per example" if metrics.get("head") else "nats per token"
    headline, explanation = _judge(metrics, unit)
    return Summary(
        name=str(metrics["folder"]).rstrip("/").rpartition("/")[2],
        kind=metrics.get("head") or (f"task {task['template'].strip()}" if task else "text"),
        unit=unit,
        headline=headline,
        explanation=explanation,
        command=_command(metrics),
        has_weights=metrics.get("has_weights", True),
        template=json.dumps(task["template"], ensure_ascii=False) if task else "",
        scores=_scores(metrics, unit),
        before_after=_before_and_after(metrics),
        samples=samples,
        copying=_copying(metrics, len(samples)),
        settings=_settings(metrics),
    )


def _judge(metrics: dict[str, Any], unit: str) -> tuple[str, str]:
    """What the run gained: a headline, and a sentence that explains it."""
    if metrics.get("loss") is None:
        return "Not measured", (
            "Nothing was held out, so no figure says whether the model learned the language of the corpus or only its "
            "text: give --eval-file, or a larger corpus."
        )
    name = "accuracy" if metrics.get("accuracy") is not None else "perplexity"
    before, after = metrics.get(f"{name}_before"), metrics.get(name)
    headline = f"Held-out {name}: {show_figure(before, name)} → {show_figure(after, name)}"
    gain, error = metrics.get("loss_gain"), metrics.get("loss_gain_stderr")
    if baseline := metrics.get("baseline"):
        verdict = "better" if after is not None and after > baseline["accuracy"] else "not better"
        always = f"always answering {baseline['label']!r}, which is right in {baseline['accuracy']:.1%}"
        return headline, f"On what it was not trained on the model is {verdict} than {always}."
    if gain is None:
        return headline, f"{'Higher' if name == 'accuracy' else 'Lower'} is better."
    by = f"{with_error(abs(gain), error, '.4f')} {unit}"
    if gain > 2 * (error or 0.0):
        return headline, f"The model predicts what it was not trained on better than before: its loss fell by {by}."
    if gain < -2 * (error or 0.0):
        return headline, f"The model got worse: its loss rose by {by}. Try a lower learning rate, or fewer epochs."
    return headline, f"That is no clear gain: the loss changed by {by}, which is within its error."


def _command(metrics: dict[str, Any]) -> str:
    task = metrics.get("task")
    folder = shlex.quote(" ".join(printable(metrics["folder"]).split()))
    if not metrics.get("has_weights", True):
        return f"hfkit finetune --config {folder}/recipe.yaml"
    kind = "classification" if task and task.get("labels") else metrics.get("head") or metrics.get("corpus_kind")
    prompt = "A text" if task else printable(" ".join((metrics.get("prompt") or "Once").split()))
    return command_for(kind, folder, f" {shlex.quote(prompt)}")


def command_for(kind: str | None, folder: str, prompt: str = "") -> str:
    """The command that uses a model. kind: of its head, or of what it learned. folder, prompt: quoted for a shell."""
    command = _COMMANDS.get(kind or "", "hfkit generate -m {folder}{prompt}")
    return command.format(folder=folder, prompt=prompt)


def _scores(metrics: dict[str, Any], unit: str) -> list[tuple[str, str, str, str]]:
    if metrics.get("loss") is None:
        return []
    gain, gain_error, error = (metrics.get(name) for name in ("loss_gain", "loss_gain_stderr", "loss_stderr"))
    rows = []
    if (accuracy := metrics.get("accuracy")) is not None:
        before = show_figure(metrics["accuracy_before"], "accuracy")
        rows.append(("held-out accuracy", before, show_figure(accuracy, "accuracy"), ""))
    if baseline := metrics.get("baseline"):
        always = f"accuracy of always {baseline['label']!r}"
        rows.append((always, "", show_figure(baseline["accuracy"], "accuracy"), ""))
    if (perplexity := metrics.get("perplexity")) is not None:
        before = show_figure(metrics["perplexity_before"], "perplexity")
        rows.append(("held-out perplexity", before, with_error(perplexity, error and perplexity * error, ",.2f"), ""))
    before, after = show_figure(metrics["loss_before"], "loss"), show_figure(metrics["loss"], "loss")
    difference = "" if gain is None else with_error(-gain, gain_error or None, "+.4f")
    return [*rows, (f"held-out loss ({unit})", before, after, difference)]


def _before_and_after(metrics: dict[str, Any]) -> list[Sample]:
    """The continuations of the same prompt, with the same seed, before and after the training."""
    texts = {entry["measured"]: entry["sample"] for entry in metrics["history"] if entry.get("sample") is not None}
    kept = metrics["step"]
    last = kept if kept in texts else max(texts, default=0)
    titles = {0: "Before", last: f"After step {last:,}"} if last else {0: "Before"}
    return [_cut(title, metrics.get("prompt") or "", texts[step]) for step, title in titles.items() if step in texts]


def _cut(title: str, prompt: str, text: str) -> Sample:
    """Part a sample where its last sentence ends, if that is in its second half."""
    end = max((match.end() for match in _SENTENCE_END.finditer(text)), default=0)
    end = end if 2 * end >= len(text) else len(text)
    return Sample(title=title, prompt=prompt, text=text[:end], rest=text[end:])


def _copying(metrics: dict[str, Any], samples: int) -> str:
    """What the samples took from the corpus; empty if that is not known."""
    copied = metrics.get("copied")
    if not copied:
        return ""
    finding = f"no run of {copied['run']} words stands in the corpus"
    if copied["words"]:
        finding = f"the longest run of words that stands in the corpus has {copied['words']}: “{copied['longest']}”"
    limit = "" if copied.get("is_whole", True) else f" Only its first {copied['limit']:,} words were searched."
    share = f"{copied['share']:.1%} of all runs of {copied['run']} words are from there."
    return f"In {counted(samples, 'sample')} {finding}. {share}{limit}"


def _settings(metrics: dict[str, Any]) -> dict[str, str]:
    """What was done, and with what."""
    return {
        "model": str(metrics["model"]),
        "corpus": ", ".join(Path(source).name for source in metrics["corpus"]),
        "trained on": f"{counted(metrics['tokens'], 'token')} in {counted(metrics['steps'], 'step')}",
        "kept": f"the state of step {metrics['step']:,}",
        "parameters": f"{metrics['parameters']:,}",
        "optimizer": f"{metrics['optim']}, peak {metrics['learning_rate']:g}",
        "machine": f"{metrics['device']}, {metrics['precision']}" + (", compiled" if metrics["compiled"] else ""),
        "time": duration(metrics["seconds"]),
        "seed": str(metrics["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        "command": str(metrics["command"]),
    }
