"""Recipes: YAML files that say what to train on what; read safely, checked completely, written back resolved.

Importing this package does not import torch, so that a mistake in a recipe is reported at once.
"""

from torchthaw.recipe.reading import data_section, find_recipe, load_recipe, packaged_recipes, parse_override
from torchthaw.recipe.schema import DataRecipe, PushRecipe, Recipe

__all__ = [
    "DataRecipe",
    "PushRecipe",
    "Recipe",
    "data_section",
    "find_recipe",
    "load_recipe",
    "packaged_recipes",
    "parse_override",
]
