"""Imports point one way, modules stay small, and what is promised at the top can be had."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hfkit

MODULES = {path.stem: ast.parse(path.read_text()) for path in Path(hfkit.__file__).parent.glob("*.py")}
# From left to right; a module imports only what stands before it.
ORDER = """
    errors declaration options processes console recipes cookbook flags storage files prompts sources tables tasks
    corpora runs novelty quantization models encoding decoding sampling batches generation scoring data sequences
    planning heads metrics classification answering assessment evaluation optimizers checkpoints monitoring
    adapters pictures pages report fitting outcomes cards training encoders pretraining ranges studies
    tuning inspection preparation exporting writing measuring showing searching labelling conversation machine serving
    launching failures cli __main__
""".split()
LIGHT = """
    errors declaration options console recipes cookbook flags storage processes prompts sources failures cli __init__
""".split()


def imported(tree: ast.AST) -> dict[str, list[str]]:
    """Module -> names taken from it, for everything that is imported anywhere in `tree`."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: [] for alias in node.names if alias.name not in found}
        elif isinstance(node, ast.ImportFrom):
            found[node.module] = found.get(node.module, []) + [alias.name for alias in node.names]
    return found


def own(tree: ast.AST) -> set[str]:
    """The modules of hfkit that are imported in `tree`."""
    names = imported(tree)
    parts = {name.split(".")[1] for name in names if name.startswith("hfkit.")}
    return (parts | set(names.get("hfkit", ()))) & set(MODULES)


def test_imports_point_one_way():
    graph = {name: own(tree) for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # CycleError where they do not
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name in place and other in place and place[other] >= place[name]
    ]
    assert not wrong
    assert [name for name, others in graph.items() if "cli" in others] == ["__main__"]


def test_what_help_needs_imports_nothing_heavy_at_the_top():
    heavy = {"torch", "transformers", "datasets", "evaluate", "accelerate", "huggingface_hub"}
    for name in LIGHT:
        top = ast.Module([node for node in MODULES[name].body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert not heavy & {module.split(".")[0] for module in imported(top)}, name
        assert own(top) <= set(LIGHT), name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_short_says_what_it_is_for_and_keeps_to_itself(name):
    tree = MODULES[name]
    assert len(Path(hfkit.__file__).with_name(f"{name}.py").read_text().splitlines()) <= 350
    assert ast.get_docstring(tree)
    # from hfkit.x import _private, or x._private of a module x of hfkit
    assert not [each for module, names in imported(tree).items() if module.startswith("hfkit") for each in names
                if each.startswith("_")]  # fmt: skip
    assert not [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")
                and isinstance(node.value, ast.Name) and node.value.id in own(tree)]  # fmt: skip


def test_every_public_name_can_be_imported_and_has_a_docstring():
    assert hfkit.__all__ == sorted(hfkit.__all__) and set(hfkit.__all__) <= set(dir(hfkit))
    for name in hfkit.__all__:
        assert getattr(hfkit, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        hfkit.nonsense  # noqa: B018
    assert importlib.import_module("hfkit.__main__").main


def test_the_source_has_nothing_that_runs_what_it_reads():
    for name, tree in MODULES.items():
        used = {module.split(".")[0] for module in imported(tree)}
        assert not used & {"pickle", "marshal", "shelve", "dill"}, name
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if call.startswith(("eval(", "exec(", "yaml.unsafe"))], name
        assert not [call for call in calls if "shell=True" in call or "trust_remote_code=True" in call], name
        assert not [call for call in calls if call.startswith("torch.load(") and "weights_only=True" not in call], name
