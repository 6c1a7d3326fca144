"""A recipe is a YAML file: a flat mapping from option names to values."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hfkit.errors import OptionError

_LARGEST = 1_000_000  # bytes: a recipe is written by a person


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 5e-5 is a number (YAML 1.1: a text), 010 is ten (it: eight), no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def read_values(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """The values that the recipe at `path` sets; OptionError where one is not `known` or the file is no recipe."""
    path, known = Path(path), list(known)
    try:
        if path.stat().st_size > _LARGEST:
            raise OptionError(f"{path} is larger than {_LARGEST:,} bytes: that is no recipe")
        recipe = yaml.load(path.read_text("utf-8"), _Loader)  # noqa: S506, a subclass of SafeLoader
    except OSError as error:
        raise OptionError(f"cannot read the recipe ({path}): {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"the recipe is not UTF-8 text ({path}, byte {error.start}): save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise OptionError(f"not a readable recipe ({where}): {problem}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise OptionError(f"{path} is not a mapping of option names to values: write lines such as 'temperature: 0.7'")
    for key in recipe:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for the names"
            raise OptionError(f"unknown option {key!r} ({path}): {hint}")
    return {key: value for key, value in recipe.items() if value is not None}


def read_recipe(path: str | Path, *groups: type) -> tuple[Any, ...]:
    """One instance per group: `model, how = read_recipe("recipes/story.yaml", ModelOptions, GenerateOptions)`."""
    owner = {field.name: group for group in groups for field in fields(group)}
    recipe = read_values(path, owner)
    return tuple(group(**{key: value for key, value in recipe.items() if owner[key] is group}) for group in groups)
