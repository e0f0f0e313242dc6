"""A step of fine-tuning: the loss is the mean over the trained tokens of the whole step, however rows and ranks share them; TRL agrees."""

import json
from pathlib import Path

import pytest
import tinychat
import torch
from distributed import together

from gigatrain import engines, load
from gigatrain.architectures import Architecture, to_hf_config
from gigatrain.data import build
from gigatrain.data.loader import Batches
from gigatrain.data.pack import IGNORED
from gigatrain.engines.native import Native
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tinychat.recipe(tmp_path_factory.mktemp("sft"))
    made = load.recipe(path, ())
    build.build(made.data, made.tokenizer)  # once, before ranks open it
    return path


def trained(rank, recipe, overrides, ranks, steps=3):
    """(mean loss, norm, targets) of each step, and this rank's targets."""
    made = plan(load.recipe(recipe, ("model.init.std=0.2", *overrides)), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    corpus = build.build(made.data, made.tokenizer)
    reader, readers = mesh.data
    batches = Batches(
        corpus,
        sequence=made.sequence,
        packing=made.data.packing,
        batch=made.batch,
        microbatch=made.microbatch,
        seed=made.seed,
        rank=reader,
        ranks=readers,
        prefetch=0,
    )
    numbers, mine = [], []
    for _ in range(steps):
        batch = next(batches)
        engine.forward_backward(batch)
        update = engine.step(1.0)
        numbers.append((update.nats.item() / update.targets.item(), update.grad_norm.item(), update.targets.item()))
        mine.append([int((part.labels != IGNORED).sum()) for part in batch.microbatches])
    return numbers, mine


def test_the_loss_is_of_a_trained_token_however_the_step_is_cut(recipe):
    """One microbatch, eight of one row, and two ranks of four: rows have unlike counts of trained tokens, so that a mean of means would be another number."""
    (whole, one), (rows, eight) = (trained(0, recipe, [f"train.microbatch={size}"], 1) for size in (8, 1))
    shared = together(2, trained, recipe, ["train.microbatch=2", "mesh.shard=2"], 2)
    assert all(len(set(counts)) > 1 for counts in eight), "rows alike would prove nothing"
    assert [sum(counts) for counts in one] == [sum(counts) for counts in eight] == [targets for _, _, targets in whole]
    assert [sum(map(sum, both)) for both in zip(shared[0][1], shared[1][1], strict=True)] == [targets for _, _, targets in whole]
    for other in (rows, shared[0][0], shared[1][0]):
        for (loss, norm, targets), (its_loss, its_norm, its_targets) in zip(whole, other, strict=True):
            assert its_targets == targets
            assert its_loss == pytest.approx(loss, rel=2e-6)
            assert its_norm == pytest.approx(norm, rel=1e-5)


def test_neftune_follows_from_seed_and_step_and_is_not_in_validation(recipe):
    plain, _ = trained(0, recipe, [], 1)
    noisy, _ = trained(0, recipe, ["train.neftune=5.0"], 1)
    assert noisy == trained(0, recipe, ["train.neftune=5.0"], 1)[0]
    assert noisy != trained(0, recipe, ["train.neftune=5.0", "train.seed=1"], 1)[0]
    assert all(one[0] != other[0] for one, other in zip(plain, noisy, strict=True))
    from gigatrain.models.decoder import noise

    drawn = torch.stack([noise(torch.zeros(2, 128, 32), 5.0, torch.tensor(seed)) for seed in (1, 2, 1 << 39)])
    limit = 5.0 / (128 * 32) ** 0.5
    assert drawn.abs().max() <= limit
    assert drawn.std().item() == pytest.approx(limit / 3**0.5, rel=0.01)
    assert drawn.mean().abs().item() < limit * 0.01
    flat = drawn.flatten(1)
    assert torch.corrcoef(torch.cat([flat, flat.roll(1, 1)])).triu(1).abs().max() < 0.05


@pytest.mark.long
def test_masks_loss_and_gradients_are_those_of_trl(recipe, tmp_path):
    """SFTTrainer on the same conversations, template and weights, its rows padded and ours packed: labels equal, loss and gradients within 1e-6."""
    trl = pytest.importorskip("trl")
    import datasets
    import transformers

    made = plan(load.recipe(recipe, ("model.init.std=0.2", "model.init.scale_residual=false", "data.validation=0.0")), load.site("laptop"))
    corpus = build.build(made.data, made.tokenizer)
    engine = Native(made, alone(), torch.device("cpu"))
    assert isinstance(made.architecture, Architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus.folder / "tokenizer")
    rows = [json.loads(line)["messages"] for line in (recipe.parent / "chats.jsonl").read_text().splitlines()]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        packing=False,
        max_length=None,
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    )
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(
        json.dumps(to_hf_config(made.architecture, bos=None, eos=corpus.eos, pad=corpus.eos, max_positions=128, dtype="float32"))
    )
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "config"), attn_implementation="eager"
    )
    mine = {name: piece.tensor.clone() for name, piece in engine.state()["weights"].items()}
    model.load_state_dict(mine, strict=not made.architecture.tied)
    trainer = trl.SFTTrainer(
        model, settings, train_dataset=datasets.Dataset.from_list([{"messages": row} for row in rows]), processing_class=tokenizer
    )

    # Their labels, document by document, are our shard's.
    stream = corpus.stream(0)
    for number, row in enumerate(trainer.train_dataset):
        start, stop = stream.document(number)
        ids, marks = stream.read(start, stop), stream.trained(start, stop)
        assert marks is not None
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == [token if one else IGNORED for token, one in zip(ids.tolist(), marks.tolist(), strict=True)]

    # One step over all conversations: theirs a padded row each, ours packed.
    inputs = next(iter(trainer.get_train_dataloader()))
    targets = int((inputs["labels"][:, 1:] != IGNORED).sum())
    model.train()
    theirs = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(targets))
    theirs.backward()
    batches = Batches(corpus, sequence=made.sequence, packing="packed", batch=8, seed=0, prefetch=0)
    from gigatrain.data.loader import Batch, stack

    parts = tuple(
        stack([(batches.samples[0], index)], made.sequence, corpus.eos, torch.device("cpu")) for index in range(len(batches.samples[0]))
    )
    assert sum(int((part.labels != IGNORED).sum()) for part in parts) == targets
    engine.forward_backward(Batch(parts, targets, len(parts) * made.sequence, range(len(parts))))
    gradients = {name: total.clone() for name, total in engine.grads.items()}
    assert sum(float(one.square().sum()) for one in gradients.values()) > 0.01, "gradients of nothing are all alike"
    update = engine.step(0.0)
    assert update.nats.item() / targets == pytest.approx(theirs.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
