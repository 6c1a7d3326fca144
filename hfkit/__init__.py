"""Language models from a shell or three lines of Python, over Hugging Face Transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Module -> public names that it defines. Each is imported on first use, so that `import hfkit` costs milliseconds.
_MODULES = {
    "errors": "HfkitError",
    "evaluation.figures": "Evaluation",
    "evaluation.perplexity": "evaluate",
    "evaluation.tasks": "Assessment",
    "inference.answering": "Answer answer",
    "inference.classification": "classify",
    "inference.generation": "generate stream",
    "inference.inspection": "Inspection inspect",
    "inference.results": "Classification Generation",
    "models.exporting": "export",
    "models.loading": "LanguageModel load",
    "options": "CorpusOptions DataOptions EvaluateOptions ExportOptions GenerateOptions InspectOptions ModelOptions "
    "ServerOptions SizeOptions TaskOptions TrainOptions TuneOptions",
    "training.finetuning": "finetune prepare",
    "training.pretraining": "pretrain",
    "training.runs": "Run",
    "tuning.search": "Search tune",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOME)  # noqa: PLE0605

if TYPE_CHECKING:  # the same names, for editors and type checkers; tests/test_layering.py compares both
    from hfkit.errors import HfkitError as HfkitError
    from hfkit.evaluation.figures import Evaluation as Evaluation
    from hfkit.evaluation.perplexity import evaluate as evaluate
    from hfkit.evaluation.tasks import Assessment as Assessment
    from hfkit.inference.answering import Answer as Answer
    from hfkit.inference.answering import answer as answer
    from hfkit.inference.classification import classify as classify
    from hfkit.inference.generation import generate as generate
    from hfkit.inference.generation import stream as stream
    from hfkit.inference.inspection import Inspection as Inspection
    from hfkit.inference.inspection import inspect as inspect
    from hfkit.inference.results import Classification as Classification
    from hfkit.inference.results import Generation as Generation
    from hfkit.models.exporting import export as export
    from hfkit.models.loading import LanguageModel as LanguageModel
    from hfkit.models.loading import load as load
    from hfkit.options import CorpusOptions as CorpusOptions
    from hfkit.options import DataOptions as DataOptions
    from hfkit.options import EvaluateOptions as EvaluateOptions
    from hfkit.options import ExportOptions as ExportOptions
    from hfkit.options import GenerateOptions as GenerateOptions
    from hfkit.options import InspectOptions as InspectOptions
    from hfkit.options import ModelOptions as ModelOptions
    from hfkit.options import ServerOptions as ServerOptions
    from hfkit.options import SizeOptions as SizeOptions
    from hfkit.options import TaskOptions as TaskOptions
    from hfkit.options import TrainOptions as TrainOptions
    from hfkit.options import TuneOptions as TuneOptions
    from hfkit.training.finetuning import finetune as finetune
    from hfkit.training.finetuning import prepare as prepare
    from hfkit.training.pretraining import pretrain as pretrain
    from hfkit.training.runs import Run as Run
    from hfkit.tuning.search import Search as Search
    from hfkit.tuning.search import tune as tune
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
