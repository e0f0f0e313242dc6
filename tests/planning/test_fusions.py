"""What a step fuses: chosen with a reason, refused with the way out, and no part of a run's identity."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.plan import plan

ADAMW = ("optim.name=adamw",)


def made(*overrides, site="laptop", ranks=None):
    found = load.site(site)
    return plan(load.recipe("quickstart", (*ADAMW, *overrides)), found.model_copy(update={"memory_bytes": None}), ranks)


def on(found):
    return {fusion.name for fusion in found.fusions if fusion.on}


def test_a_gpu_fuses_what_it_can_and_a_cpu_nothing_unless_asked():
    assert on(made()) == set()
    assert on(made(site="one-gpu")) == {"fuse", "main_grads"}
    assert on(made("train.fuse=false", site="one-gpu")) == {"main_grads"}
    assert on(made("train.fuse=true", "train.main_grads=true")) == {"fuse", "main_grads"}
    assert on(made(site="one-gpu", ranks=2)) == set()
    assert on(made("mesh.shard=1", "mesh.replicate=2", site="one-gpu", ranks=2)) == {"fuse", "main_grads"}
    assert on(made("train.compile=true", site="one-gpu")) == set()
    assert on(made("train.graph=true", site="one-gpu")) == {"fuse", "main_grads", "graph"}
    assert all(fusion.why for fusion in made().fusions)


def test_what_is_fused_may_change_at_a_resume():
    """As the mesh may, which decides it."""
    kinds = [made(), made("train.fuse=true", "train.main_grads=true"), made("mesh.shard=2")]
    assert len({kind.identity for kind in kinds}) == 1
    assert len({kind.sha256 for kind in kinds}) == 3
    assert made("optim.clip=false").identity == made("optim.clip=false", "train.release=true").identity != made().identity


RELEASE = ("train.release=true", "optim.clip=false")


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (
            ("train.fuse=true",),
            2,
            "train.fuse: weights are sharded over 2 ranks, and FSDP2 gathers each parameter .*; share the batch by mesh.replicate",
        ),
        (("train.main_grads=true",), 2, "train.main_grads: weights are sharded over 2 ranks"),
        (("train.fuse=true", "train.compile=true"), 1, "train.compile traces a layer .*; set train.compile = false, or train.fuse = false"),
        (
            ("train.fuse=true", "mesh.pipeline=2", "mesh.schedule=zbv", "train.microbatch=2"),
            2,
            'mesh.schedule "zbv" computes weight gradients apart',
        ),
        (("train.fuse=true", "engine.name=deepspeed"), 1, "DeepSpeed flattens and partitions"),
        (
            ("train.fuse=true", "model.architecture.hidden=204"),
            1,
            "hidden 204 is no multiple of 8, .*; set model.architecture.hidden = 208",
        ),
        (("train.release=true",), 1, "optim.clip 1 scales gradients by the norm of all of them, .*; set optim.clip = false"),
        ((*RELEASE, "train.microbatch=2"), 1, "a step has 4 microbatches, whose gradients are kept .*; set train.microbatch = 8"),
        ((*RELEASE, "mesh.replicate=2", "mesh.shard=1"), 2, "gradients are summed over ranks [(]mesh.replicate 2[)] before they count"),
    ],
    ids=str,
)
def test_what_cannot_be_fused_is_refused(overrides, ranks, said):
    with pytest.raises(PlanError, match=said):
        made(*overrides, ranks=ranks)


def test_clipping_can_be_switched_off():
    assert made("optim.clip=false").optim.clip is None
    assert made().optim.clip == 1.0
    with pytest.raises(load.RecipeError, match=r"optim.clip"):
        made("optim.clip=0")
