"""The model card: README.md in a run's folder, as the Hub shows it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hfkit.console import printable
from hfkit.reporting.summaries import Summary
from hfkit.reporting.templates import render

_TAGS = {"classification": "text-classification", "question-answering": "question-answering"}


def make_card(metrics: dict[str, Any], summary: Summary, picture: str) -> str:
    """The card of a run; `picture` is the file name of its curves."""
    model = metrics["model"]
    is_on_hub = not metrics["from_nothing"] and model != "bundled" and not Path(model).exists()
    data = ModelCardData(
        library_name=metrics["library"],
        pipeline_tag=_TAGS.get(metrics.get("head") or "", "text-generation"),
        base_model=model if is_on_hub else None,
    )
    head = Markup(data.to_yaml().strip())  # noqa: S704, YAML is quoted by its writer
    line = Markup(printable(summary.command))  # noqa: S704, indented lines are code
    return render("card.md.jinja", head=head, metrics=metrics, run=summary, line=line, picture=picture)
