"""What replicas that may die cannot be combined with: refused with the plan, not found out in a failure."""

from collections.abc import Sequence

from gigatrain.config import Mesh, Recipe
from gigatrain.errors import PlanError
from gigatrain.planning.fusions import Fusion


def check(recipe: Recipe, mesh: Mesh, fusions: Sequence[Fusion]) -> None:
    """Raise PlanError where `recovery.replicas` asks for what a replica that is a world of its own cannot do."""
    kind = recipe.recovery.replicas
    if kind == "none":
        return
    on = {fusion.name for fusion in fusions if fusion.on}
    clashes = (
        (mesh.replicate < 2, f"mesh.replicate is {mesh.replicate}: there is nobody to go on when one is lost; set mesh.replicate to 2 or more"),
        (mesh.pipeline > 1, f"mesh.pipeline is {mesh.pipeline}, whose schedule is fixed to a number of microbatches; set it to 1"),
        ("release" in on, "gradients are released as they come (train.release), before replicas could be asked; leave it out"),
        ("graph" in on, "steps are recorded as CUDA graphs, which cannot be made again with other samples; leave train.graph out"),
        (recipe.optim.master != "fp32", f"optim.master is {recipe.optim.master!r}, whose gradients are summed for one number of microbatches; set it to fp32"),
        (recipe.train.precision == "fp8" and recipe.fp8.amax == "delayed", 'fp8.amax is "delayed", a history that replicas would not share; set "current"'),
        (recipe.numerics.replay and recipe.numerics.sigma > 0, "numerics.replay makes refused steps again, which replicas do not do together; set it to false"),
        ("rollback" in (recipe.numerics.action, recipe.numerics.on_divergence), "numerics may roll back, which replicas do not; leave that out"),
        (recipe.checkpoint.near is not None, "checkpoint.near is set: replicas have each other's states already; leave it out"),
        (recipe.power.megawatts is not None or recipe.power.follow is not None, "a power budget is kept by all ranks together; leave it out"),
    )  # fmt: skip
    for clash, why in clashes:
        if clash:
            raise PlanError(f'recovery.replicas is "{kind}", and {why}; or set recovery.replicas = "none"')
