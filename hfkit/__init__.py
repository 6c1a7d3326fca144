"""Language models from a shell or three lines of Python, over Hugging Face Transformers."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> module that defines it, imported on first use, so that `import hfkit` costs milliseconds.
_HOME = {
    "Answer": "inference.answering",
    "Assessment": "evaluation.tasks",
    "Classification": "inference.classification",
    "CorpusOptions": "options",
    "DataOptions": "options",
    "EvaluateOptions": "options",
    "Evaluation": "evaluation.perplexity",
    "ExportOptions": "options",
    "GenerateOptions": "options",
    "Generation": "inference.generation",
    "HfkitError": "errors",
    "InspectOptions": "options",
    "Inspection": "inference.inspection",
    "LanguageModel": "models.loading",
    "ModelOptions": "options",
    "Run": "training.runs",
    "Search": "tuning.search",
    "SizeOptions": "options",
    "TaskOptions": "options",
    "TrainOptions": "options",
    "TuneOptions": "options",
    "answer": "inference.answering",
    "classify": "inference.classification",
    "evaluate": "evaluation.perplexity",
    "export": "models.exporting",
    "finetune": "training.finetuning",
    "generate": "inference.generation",
    "inspect": "inference.inspection",
    "load": "models.loading",
    "prepare": "training.preparation",
    "pretrain": "training.pretraining",
    "stream": "inference.generation",
    "tune": "tuning.search",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
