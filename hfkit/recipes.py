"""A recipe is a YAML file: a flat mapping from option names to values."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hfkit.console import note
from hfkit.declaration import explain_unknown_name, flag_of
from hfkit.errors import HfkitError, OptionError
from hfkit.storage import write_bytes

_LARGEST = 1_000_000  # bytes; a person writes a recipe
_BY_FLAG = ("trust_remote_code", "overwrite")


class _Loader(yaml.SafeLoader):
    """YAML whose values stay the text that was written, for each option to read: 5e-5, 010 and `no` are no traps."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        # A few lines of aliases can stand for gigabytes.
        fault = "an alias: write the value out" if isinstance(event, yaml.AliasEvent) else None
        if fault := fault or (event.tag and f"a tag ({event.tag}): leave it out"):
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def read_values(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """What a recipe sets, by name: texts and lists of texts, for `Options.read`.

    A corpus that is not in the working folder is looked up beside the recipe.

    Raises:
        OptionError: the recipe cannot be read, or sets an option that is not `known`.
    """
    path, known = find_recipe(Path(path)), list(known)
    try:
        if path.stat().st_size > _LARGEST:
            raise OptionError(f"{path} is larger than {_LARGEST:,} bytes: that is not a recipe")
        loader = _Loader(path.read_text("utf-8"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode | None):
            raise OptionError(f"{path} does not list options: write lines such as 'temperature: 0.7'")
        _check_names(path, root.value if root else [], known)
        recipe = loader.construct_document(root) if root else {}
    except FileNotFoundError as error:
        raise OptionError(f"no recipe {str(path)!r}: {_similar_recipes(str(path))}") from error
    except OSError as error:
        raise OptionError(f"cannot read the recipe ({path}): {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"the recipe is not UTF-8 text ({path}, byte {error.start + 1}): save it as UTF-8"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise OptionError(f"not a readable recipe ({where}): {problem}") from error
    values = {key: value for key, value in recipe.items() if value is not None}
    for name in _BY_FLAG:  # a recipe may be somebody else's: it neither runs code nor replaces files
        if str(values.pop(name, "false")).lower() != "false":
            note(f"{path} sets {name}, which only a flag may: it is ignored, add {flag_of(name)}")
    return values | {key: _find_data(values[key], path) for key in ("corpus", "eval_file") if key in values}


def _check_names(path: Path, pairs: list[tuple[yaml.Node, yaml.Node]], known: list[str]) -> None:
    names: set[str] = set()
    for key, _ in pairs:
        where = f"{path}, line {key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
        if name not in known:
            hint = explain_unknown_name(name, known) or "see --help for the names"
            raise OptionError(f"unknown option {name!r} ({where}): {hint}")
        if name in names:
            raise OptionError(f"option {name!r} twice ({where}): leave one of them out")
        names.add(name)


def shipped() -> dict[str, Path]:
    """The recipes that come with hfkit, by name."""
    installed = Path(__file__).parent / "shipped"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"  # of a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """`path`, or the shipped recipe of that name if there is no such file."""
    return path if path.exists() else shipped().get(path.name.removesuffix(".yaml"), path)


def _similar_recipes(name: str) -> str:
    """A hint at the shipped recipes whose names hold `name`, or are close to it."""
    names = [shipped_name for shipped_name in shipped() if name in shipped_name] or get_close_matches(name, shipped())
    listed = " or ".join(map(repr, names[:3]))
    return f"did you mean {listed}?" if names else "'hfkit recipes' lists those that come with hfkit"


def head_comment(path: Path) -> list[str]:
    """Lines of the comment at the top of a recipe: what it does, and the commands to use it."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a shipped recipe, and the data that it names, into `folder`. Returns the new files.

    Raises:
        HfkitError: there is no such recipe, or a file of that name exists.
    """
    recipe = shipped().get(name)
    if recipe is None:
        raise HfkitError(f"no recipe {name!r}: {_similar_recipes(name)}")
    names = [recipe.name, *sorted({*re.findall(r"data/[\w.-]+", recipe.read_text("utf-8"))})]
    if taken := [name for name in names if (folder / name).exists()]:
        raise HfkitError(f"{folder / taken[0]} exists: remove it, or copy to another folder")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, (recipe.parent / name).read_bytes())
    return [folder / name for name in names]


def _find_data(value: Any, recipe: Path) -> Any:
    if isinstance(value, list):
        return [_find_data(item, recipe) for item in value]
    beside = recipe.parent / str(value)
    return str(beside) if not Path(str(value)).exists() and beside.exists() else value
