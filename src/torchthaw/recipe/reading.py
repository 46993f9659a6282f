"""Finds recipes, reads them as safe YAML and takes in what replaces their values."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from torchthaw.errors import RecipeError, did_you_mean
from torchthaw.recipe.checks import check_consistency
from torchthaw.recipe.explanations import explanations
from torchthaw.recipe.schema import DataRecipe, Recipe


def packaged_recipes() -> dict[str, Path]:
    """Returns the recipes that come with torchthaw: name -> file."""
    # A checkout that is installed in place has them at its top, an installed wheel inside the package.
    installed = Path(str(resources.files("torchthaw"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe: a path, or the name of one that comes with torchthaw.

    Raises:
        RecipeError: there is neither.
    """
    file = Path(name)
    if file.is_file():
        return file
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    if file.is_dir():
        raise RecipeError(
            f"{name} is a folder; a recipe is a YAML file. To train on it, write: train staged --data {name}"
        )
    nearby = [sibling.name for sibling in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    raise RecipeError(
        f"there is no recipe {name!r}: no such file, and no recipe of that name comes with torchthaw."
        f"{did_you_mean(file.name, [*packaged, *nearby])} torchthaw brings {', '.join(packaged)}."
    )


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: A file, the name of a packaged recipe, or the recipe as plain data.
        overrides: Values that replace the recipe's, by dotted key: `{"data.path": "photos"}`.

    Raises:
        RecipeError: the file is missing or no YAML mapping, a key is unknown, or a value does not fit.
        PlanError: the plan or a stage does not fit.
    """
    where = "the recipe"
    if isinstance(source, Mapping):
        data = dict(source)
    else:
        file = find_recipe(str(source))
        where = str(file)
        data = _read_yaml(file)
    for key, value in (overrides or {}).items():
        _set(data, key, value)
    recipe = _validate(data, where)
    check_consistency(recipe, where)
    return recipe


def data_section(source: str, given: Mapping[str, Any]) -> DataRecipe:
    """Returns the data section for a folder, a table or a Hub data set, or that of a recipe file.

    Args:
        source: What was named.
        given: Keys that replace the section's. A folder's splits are left as they are without them; a recipe's are
            cut.

    Raises:
        RecipeError: the recipe cannot be read, or a value does not fit.
    """
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return load_recipe(source, {f"data.{key}": value for key, value in given.items()}).image_source()
    try:
        return DataRecipe.model_validate({"path": source, "validation": 0.0, **given})
    except ValidationError as error:
        raise RecipeError("\n".join(explanations(error))) from error


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `key.sub=value`; the value is read as YAML, so that `0.1`, `null` and `[a, b]` are what they look like.

    Raises:
        RecipeError: there is no `=`, or the value is no YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {text!r} is not of the form key=value; write, for example, --set data.validation=0.2")
    try:
        return key.strip(), yaml.load(value, RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML ({error}); put it in quotes") from error


class RecipeLoader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's words: `1e-3` is a number, and `off`, `on`, `yes` and `no` are text.

    In YAML 1.1 numbers want a dot, and these words are booleans, so that `gate: off` would be false.
    """


_BOOLEAN = "tag:yaml.org,2002:bool"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file} holds no mapping of keys to values; start with a line such as backbone: resnet50")
    return data


def _set(data: dict[str, Any], dotted_key: str, value: Any) -> None:
    *parents, last = dotted_key.split(".")
    section = data
    for parent in parents:
        current = section.get(parent)
        if current is not None and not isinstance(current, dict):
            raise RecipeError(f"--set {dotted_key}: {parent} is no section of the recipe but {current!r}")
        section[parent] = dict(current or {})
        section = section[parent]
    section[last] = value


def _validate(data: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  - {message}" for message in explanations(error))
        raise RecipeError(f"{where} does not fit:\n{lines}") from error
