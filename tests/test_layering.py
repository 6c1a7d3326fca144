"""Nine packages on six floors: imports point down, files stay short, and a file in the wrong place is a failure."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hfkit

ROOT = Path(hfkit.__file__).parent
GROUND = set("__init__ errors declaration options recipes processes console storage hub imports warm".split())
# From the bottom up. Packages of one floor do not import each other; GROUND is below all, __main__ above.
FLOORS = ("models corpus reporting", "inference", "evaluation training serving", "tuning", "cli")
FLOOR = {package: level for level, names in enumerate(FLOORS) for package in names.split()}
# Not on every system: a command must start without them.
POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
HEAVY = {"torch", "transformers", "datasets", "evaluate", "accelerate", "matplotlib", "peft", "optuna"}
LINES = 300


def name_of(path: Path) -> str:
    """`hfkit/models/sources.py` is models.sources, `hfkit/models/__init__.py` is models."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1])


FILES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
# hfkit/__init__.py names what is above it: lazily at run time, and here for type checkers only.
(TYPED,) = [node for node in FILES["__init__"].body if isinstance(node, ast.If)]
FILES["__init__"].body.remove(TYPED)


def package_of(name: str) -> str:
    return name.partition(".")[0]


def level_of(name: str) -> int:
    """-1 for the ground. A KeyError, and so a failure, for a file or package that has no floor."""
    if name in GROUND:
        return -1
    return len(FLOORS) if name == "__main__" else FLOOR[package_of(name)]


def imports_of(tree: ast.AST) -> dict[str, list[str]]:
    """Module -> names taken from it, for every import in `tree`."""
    modules: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name: [] for alias in node.names if alias.name not in modules}
        elif isinstance(node, ast.ImportFrom):
            modules[node.module or ""] = modules.get(node.module or "", []) + [alias.name for alias in node.names]
    return modules


def own_imports(tree: ast.AST) -> set[str]:
    """Names of hfkit's own files that `tree` imports, whole or in part."""
    files = set()
    for module, names in imports_of(tree).items():
        if module.partition(".")[0] == "hfkit":
            inside = module.partition(".")[2]
            parts = {f"{inside}.{name}".strip(".") for name in names} & set(FILES)
            files |= parts or {inside or "__init__"}
    return files


def top_of(tree: ast.Module) -> ast.Module:
    """The imports that run when a file is imported, without those in functions or for type checkers only."""
    return ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])


def test_imports_point_down():
    """Every file has a floor and imports only from lower ones."""
    assert {level_of(name) for name in FILES} == set(range(-1, len(FLOORS) + 1))
    graph = {name: own_imports(tree) for name, tree in FILES.items()}
    wrong = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if package_of(name) != package_of(other) and level_of(other) >= level_of(name) and level_of(other) >= 0
    ]
    wrong += [f"{name} -> {other}" for name in GROUND & set(graph) for other in graph[name] if level_of(other) >= 0]
    assert not wrong
    TopologicalSorter({name: others - {name} for name, others in graph.items()}).prepare()  # CycleError


def test_level_of_unknown_file():
    """A file in the wrong place is noticed."""
    for name in ("utils", "helpers.text", "models2.sources"):
        with pytest.raises(KeyError):
            level_of(name)


def loaded_with(name: str) -> set[str]:
    """hfkit's own files that are loaded where a file is imported, itself included."""
    waiting, seen = [name], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += own_imports(top_of(FILES[name]))
    return seen


def test_help_imports_nothing_heavy():
    """What `hfkit --help` loads imports nothing heavy at the top."""
    seen = loaded_with("cli.app")
    for name in seen:
        assert not HEAVY & {module.partition(".")[0] for module in imports_of(top_of(FILES[name]))}, name
    assert {"options", "cli.generate", "models.sources", "corpus.files"} <= seen


def test_generation_imports_no_datasets():
    """What generates text does not import `datasets`, which takes a second."""
    for name in loaded_with("inference.generation"):
        assert "datasets" not in {module.partition(".")[0] for module in imports_of(top_of(FILES[name]))}, name


@pytest.mark.parametrize("name", sorted(FILES))
def test_file_short_and_documented(name):
    """A file is short, says what it is for, and uses no private name of another."""
    tree = FILES[name]
    path = ROOT / (name.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    assert len(path.read_text().splitlines()) <= LINES
    assert ast.get_docstring(tree)
    if path.name == "__init__.py" and path.parent != ROOT:
        assert len(tree.body) == 1, "a package's __init__.py holds only its docstring"
    # from hfkit.x import _private, or x._private of a module x of hfkit
    assert not [each for module, names in imports_of(tree).items() if module.startswith("hfkit") for each in names
                if each.startswith("_")]  # fmt: skip
    own = {other.rpartition(".")[2] for other in own_imports(tree)}
    assert not [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")
                and isinstance(node.value, ast.Name) and node.value.id in own]  # fmt: skip


def test_public_names():
    """Every public name can be imported and has a docstring."""
    assert hfkit.__all__ == sorted(hfkit.__all__) and set(hfkit.__all__) <= set(dir(hfkit))
    for name in hfkit.__all__:
        assert getattr(hfkit, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        hfkit.nonsense  # noqa: B018
    assert importlib.import_module("hfkit.__main__").main


def test_public_names_for_type_checkers():
    """Type checkers and editors see the names that can be imported, from the same modules."""
    static = [(f"{node.module}", alias) for node in TYPED.body for alias in node.names]
    assert all(alias.name == alias.asname for _, alias in static), "only `X as X` is exported"
    assert {alias.name: module for module, alias in static} == {n: f"hfkit.{m}" for n, m in hfkit._HOME.items()}
    assert all(getattr(hfkit, alias.name).__module__ == module for module, alias in static)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_on_every_system(name):
    """No file needs a module that Windows lacks, but the one that `hfkit warm` starts on Linux alone."""
    assert name == "cli.resident" or not POSIX & {module.partition(".")[0] for module in imports_of(FILES[name])}


def test_source_runs_nothing_it_reads():
    """The source has nothing that runs what it reads."""
    for name, tree in FILES.items():
        used = {module.split(".")[0] for module in imports_of(tree)}
        assert not used & {"pickle", "marshal", "shelve", "dill"}, name
        calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [call for call in calls if call.startswith(("eval(", "exec(", "yaml.unsafe"))], name
        assert not [call for call in calls if "shell=True" in call or "trust_remote_code=True" in call], name
        assert not [call for call in calls if call.startswith("torch.load(") and "weights_only=True" not in call], name
