"""Which objectives a plan can keep to, and what refuses them."""

from gigatrain.config import Mesh, Recipe
from gigatrain.errors import PlanError

READY = ("language",)  # kinds of objective that are computed


def check(recipe: Recipe, mesh: Mesh) -> None:
    """Raises PlanError for an objective that cannot be kept to on this mesh."""
    kind = recipe.objective.kind
    if kind not in READY:
        raise PlanError(f'objective.kind "{kind}" is not computed yet; choose one of {", ".join(READY)}')
