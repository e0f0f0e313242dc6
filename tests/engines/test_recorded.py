"""A recorded step against a plain one. There is no GPU here: what stands for a CUDA graph is a tape of every operation of the step, played again with the
tensors it was recorded with. Like a graph it freezes whatever the host put into a step, and so shows it: a rate, a count, a tensor that is made anew."""

from types import SimpleNamespace

import pytest
import torch
from test_fuse import BF16, FUSE, LEAN, MUON, made
from test_meshes import T, batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigatrain import load
from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines.native import Native
from gigatrain.engines.recorded import WARMUP, Recorded
from gigatrain.errors import PlanError
from gigatrain.parallel.mesh import alone
from gigatrain.planning.fusions import Fusion
from gigatrain.planning.plan import plan

EVEN = ("train.microbatch=4",)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item", "lift_fresh")


def storages(*trees):
    return {leaf.untyped_storage()._cdata for tree in trees for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class Tape(TorchDispatchMode):
    """Records every operation with its arguments and results. What would make a host wait for a device, or takes numbers from it, is an error."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__.partition(".")[0]
        assert name not in READS, f"{func} reads a tensor on the host"
        masks = [one for one in tree_leaves(args[1:]) if isinstance(one, torch.Tensor) and one.dtype == torch.bool]
        assert not (name.startswith("index") and masks), f"{func} has a shape that depends on values"
        assert not any(
            isinstance(x, torch.device) and x.type == "cpu" and name == "_to_copy" and args[0].device != x for x in tree_leaves(kwargs)
        )
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def play(self):
        """Each operation again, its new results into the tensors that the recorded ones made."""
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                given = storages(args, kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and not storages(old) & given:  # else it is a view, or what was changed in place
                        old.copy_(new)


def taped(run):
    """What records a step as a graph does: nothing that it changes is changed by recording, which is undone here."""
    tape = Tape()
    with tape:
        update = run()
    return tape, update


def recording(engine):
    """The engine with its steps taped after the warm-up; `played` counts those that were played."""
    played = SimpleNamespace(count=0, tapes=[])

    def capture(run):
        before = {id(x): (x, x.clone()) for x in state(engine)}
        tape, update = taped(run)
        played.tapes.append(tape)
        with torch.no_grad():
            for tensor, kept in before.values():
                tensor.copy_(kept)

        def play():
            played.count += 1
            tape.play()
            return update

        return play

    engine._recorded = Recorded(engine._unmarked, engine._targets, torch.device("cpu"), capture)
    return played


def state(engine):
    judged = [x for x in vars(engine.judge).values() if isinstance(x, torch.Tensor)]
    found = [*judged, *engine.parameters.values(), *(engine._release.counts.values() if engine._release else ())]
    for group in engine.groups:
        held = vars(group.bucket).values() if hasattr(group, "bucket") else (group.master.buffer, group.momentum_buffer.buffer)
        found += [x for x in held if x is not None]
    return found


def started(recipe, overrides, *, recorded):
    chosen = made(recipe, (*EVEN, *overrides))
    if recorded:  # a plan for a CPU refuses it
        kept = tuple(fusion for fusion in chosen.fusions if fusion.name != "graph")
        chosen = chosen.model_copy(update={"fusions": (*kept, Fusion(name="graph", on=True, why="test"))})
    return Native(chosen, alone(), torch.device("cpu"))


def stepped(engine, step, part=None):
    engine.forward_backward(part or batch(engine.plan, step, 0, 1))
    update = engine.step(1.0 / (1 + step))
    return [float(x) for x in (update.nats, update.targets, update.grad_norm)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.dropout=0.2",),
        BF16,
        LEAN,
        (*BF16, *MUON, "kernels.adamw=reference"),
        (*FUSE, "train.main_grads=true"),
        ("train.release=true", "train.microbatch=8", "optim.clip=false", "train.main_grads=true"),
        ("train.recompute=lean", "loss.z_loss=1e-3", "loss.label_smoothing=0.1"),
        ("train.recompute=full",),
    ],
    ids=str,
)
def test_a_played_step_is_the_plain_one_to_the_bit(tiny, overrides):
    """Rates, targets, rows, seeds and counts differ from step to step; the tape freezes what the host gave it."""
    plain, other = (started(tiny, overrides, recorded=recorded) for recorded in (False, True))
    played = recording(other)
    for step in range(WARMUP + 4):
        assert stepped(plain, step) == stepped(other, step), step
        if step == WARMUP:  # on a bad step nothing changes, and it is counted
            for engine in (plain, other):
                weight = engine.parameters["model.norm.weight"]
                kept = weight.data.clone()
                weight.data[0] = float("nan")
                stepped(engine, 99)
                weight.data.copy_(kept)
    assert played.count == 5
    assert len(played.tapes) == 1
    assert len(played.tapes[0].calls) > 500
    assert plain.bad.tolist() == other.bad.tolist() == [1, 0, 1, WARMUP + 1]
    for group, named in plain.state().items():
        for name, piece in named.items():
            assert torch.equal(piece.tensor, other.state()[group][name].tensor), name


def test_a_tape_shows_a_number_that_the_host_put_in(tiny):
    """The test of the test: with the rate as a number, what is played goes wrong."""
    plain, other = (started(tiny, (), recorded=recorded) for recorded in (False, True))
    recording(other)
    assert other._recorded is not None
    step = other._recorded.step
    other._recorded.step = lambda parts, rate: step(parts, float(rate))  # type: ignore[arg-type]
    for number in range(WARMUP):
        assert stepped(plain, number) == stepped(other, number)
    with pytest.raises(AssertionError, match="_local_scalar_dense.* reads a tensor on the host"):
        stepped(other, WARMUP)
    other._recorded.step = lambda parts, rate: step(parts, 0.25)  # type: ignore[arg-type]
    different = [stepped(plain, number) != stepped(other, number) for number in range(WARMUP, WARMUP + 3)]
    assert any(different)


def test_steps_with_documents_are_recorded_apart(tiny):
    def rows(step, documents):
        generator = torch.Generator().manual_seed(step)
        parts = []
        for index in range(2):
            tokens = torch.randint(320, (4, T), generator=generator)
            two = torch.arange(T).expand(4, T) // 20
            at = torch.arange(T).expand(4, T)
            some = documents and not index  # of one step's microbatches one has documents
            parts.append(Microbatch(tokens, tokens.roll(-1, 1), at % 20 if some else at, two.int() if some else None))
        return Batch(tuple(parts), 8 * T, 8 * T, range(8))

    plain, other = (started(tiny, (), recorded=recorded) for recorded in (False, True))
    played = recording(other)
    for step in range(2 * (WARMUP + 2)):
        part = rows(step, documents=step % 2 == 1)
        assert stepped(plain, step, part) == pytest.approx(stepped(other, step, part), rel=1e-6)
    assert len(played.tapes) == 2
    assert played.count == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), "a CUDA graph needs a GPU, and laptop has none; choose a site with one, or train.graph = false"),
        (("mesh.shard=2",), "FSDP2 gathers weights into memory that it resizes"),
        (("mesh.pipeline=2", "train.microbatch=2"), "a pipeline's schedule sends and receives from the host"),
        (("train.microbatch=3",), "a rank's 8 samples are no whole number of microbatches of 3, and a graph has one shape"),
        (("engine.name=deepspeed",), "DeepSpeed reads the device within a step"),
    ],
    ids=str,
)
def test_steps_that_cannot_be_recorded_are_refused(tiny, overrides, said):
    site = load.site("laptop" if not overrides else "one-gpu")
    with pytest.raises(PlanError, match=said):
        plan(load.recipe(tiny, ("train.batch=8", "train.graph=true", *overrides)), site)
