"""Losses and gradients of pairs against TRL's own trainers, on tiny random Llamas in fp32; skipped where TRL is not installed."""

import warnings

import pytest
import torch
from pairsof import EOS, VOCAB, T, decoder, logprobs, loss, microbatch, pairs

from gigatrain.config import Objective
from gigatrain.models import hf
from gigatrain.objectives import figures

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-6
pytestmark = pytest.mark.long  # TRL's import alone takes 5 s


@pytest.fixture(scope="module")
def models():
    """`(policy, reference)`: two Llamas that differ a little, as after some training."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.15, max_position_embeddings=64, bos_token_id=1, eos_token_id=EOS, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(3)
    reference = transformers.LlamaForCausalLM(config).eval()
    policy = transformers.LlamaForCausalLM(config).train()
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return policy, reference


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, "w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2", pad_token="w0", bos_token="w1", unk_token="w0")


def text(ids):
    return " ".join(f"w{one}" for one in ids)


def trainer_of(kind, models, tokenizer, folder, **options):
    """A trainer of TRL over the policy itself, whose `compute_loss` is called on batches of ours."""
    import datasets

    policy, reference = models
    args = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "per_device_train_batch_size": 4, "bf16": False, "max_length": T}
    rows = [
        {"prompt": text(one["prompt_ids"]), "chosen": text(one["chosen_ids"]), "rejected": text(one["rejected_ids"])} for one in pairs(4)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "dpo":
            from trl import DPOConfig, DPOTrainer

            found = DPOTrainer(
                policy,
                reference,
                args=DPOConfig(**args, **options),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        elif kind == "kto":
            from trl import KTOConfig, KTOTrainer

            rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0} for number, row in enumerate(rows)]
            found = KTOTrainer(
                policy,
                reference,
                args=KTOConfig(**args, **options),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        else:
            from trl.experimental.cpo import CPOConfig, CPOTrainer
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            make, settings = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}[kind]
            found = make(
                policy, args=settings(**args, **options), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
            )
    return found


def theirs(trainer, batch):
    """TRL's loss and gradients by transformers' names."""
    model = trainer.model
    model.train()
    model.zero_grad(set_to_none=True)
    found = trainer.compute_loss(model, batch)
    found.backward()
    return found.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradients(policy):
    """Of all our weights, by transformers' names: a weight without one is told here."""
    found = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(policy.parameters()))
    return hf.to_hf(found, policy.arch)


def ours(objective, models, examples):
    """Our loss, gradients by transformers' names, and figures."""
    policy, reference = decoder(models[0]), decoder(models[1])
    part = microbatch(objective.kind, examples)
    if objective.refers:
        part = microbatch(objective.kind, examples, logprobs(reference, part))
    found, reported, known = loss(objective, policy.train(), part)
    found.backward()
    grads = gradients(policy)
    return found.detach(), grads, figures.said(objective, reported[1:].tolist(), float(len(examples))), known


def compare(mine, peer):
    """Within 1e-6, or, where loss or gradients are above 1, as ipo's are, within so much of them."""
    assert abs(float(mine[0] - peer[0])) <= TOLERANCE * max(1.0, abs(float(peer[0])))
    assert mine[1].keys() == peer[1].keys()
    worst = {name: float((mine[1][name] - grad).abs().max()) for name, grad in peer[1].items()}
    largest = max(float(grad.abs().max()) for grad in peer[1].values())
    assert max(worst.values()) <= TOLERANCE * max(1.0, largest), worst
    assert largest > 1e-3  # there is something to compare


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (Objective(kind="dpo"), {"loss_type": ["sigmoid"]}),
        (Objective(kind="dpo", beta=0.4), {"loss_type": ["sigmoid"], "beta": 0.4}),
        (Objective(kind="dpo", label_smoothing=0.2, robust=True), {"loss_type": ["robust"], "label_smoothing": 0.2}),
        (Objective(kind="ipo"), {"loss_type": ["ipo"]}),
    ],
    ids=["sigmoid", "beta", "robust", "ipo"],
)
def test_dpo_and_ipo_are_trls(objective, options, models, tokenizer, tmp_path):
    examples = pairs(6)
    trainer = trainer_of("dpo", models, tokenizer, tmp_path, **options)
    batch = trainer.data_collator([{key: one[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for one in examples])
    mine = ours(objective, models, examples)
    compare(mine, theirs(trainer, batch))
    said = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    for name, key in (
        ("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected"), ("margin", "rewards/margins"),
        ("accuracy", "rewards/accuracies"), ("logprob_chosen", "logps/chosen"), ("logprob_rejected", "logps/rejected"),
    ):  # fmt: skip
        assert mine[2][name] == pytest.approx(said[key], abs=2e-5), name


def concatenated(trainer, examples):
    """A batch as CPO's and ORPO's collator makes it, of ids."""
    features = []
    for one in examples:
        feature = {
            "prompt": "",
            "chosen": "",
            "rejected": "",
            "prompt_input_ids": one["prompt_ids"],
            "prompt_attention_mask": [1] * len(one["prompt_ids"]),
        }
        for side in ("chosen", "rejected"):
            ids = one["prompt_ids"] + one[f"{side}_ids"]
            feature |= {
                f"{side}_input_ids": ids,
                f"{side}_attention_mask": [1] * len(ids),
                f"{side}_labels": [-100] * len(one["prompt_ids"]) + one[f"{side}_ids"],
            }
        features.append(feature)
    return trainer.data_collator(features)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (Objective(kind="simpo"), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
        (
            Objective(kind="simpo", beta=1.5, margin=0.9, label_smoothing=0.1),
            {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.9, "cpo_alpha": 0.0, "label_smoothing": 0.1},
        ),
    ],
    ids=["simpo", "smoothed"],
)
def test_simpo_is_trls(objective, options, models, tokenizer, tmp_path):
    examples = pairs(6)
    trainer = trainer_of("cpo", models, tokenizer, tmp_path, **options)
    compare(ours(objective, models, examples), theirs(trainer, concatenated(trainer, examples)))


def test_conservative_dpo_is_trls_sigmoid_with_smoothing(models, tokenizer, tmp_path):
    """TRL's DPOTrainer has no conservative form any more (1.16); its CPOTrainer does, of a reference that says nothing."""
    examples = pairs(6)
    trainer = trainer_of("cpo", models, tokenizer, tmp_path, loss_type="sigmoid", beta=0.1, label_smoothing=0.2, cpo_alpha=0.0)
    policy = decoder(models[0])
    found, *_ = loss(Objective(kind="dpo", label_smoothing=0.2), policy, microbatch("dpo", examples, torch.zeros(6, 1, 2)))
    found.backward()
    grads = gradients(policy)
    compare((found.detach(), grads), theirs(trainer, concatenated(trainer, examples)))


def test_orpo_is_trls(models, tokenizer, tmp_path):
    """TRL takes the nll's mean over the tokens of a whole batch, ours that over pairs: equal for one pair a batch, whose mean over batches ours is."""
    examples = pairs(6)
    trainer = trainer_of("orpo", models, tokenizer, tmp_path, beta=0.3)
    found = [theirs(trainer, concatenated(trainer, [one])) for one in examples]
    mean = {name: torch.stack([grads[name] for _, grads in found]).mean(0) for name in found[0][1]}
    compare(ours(Objective(kind="orpo", beta=0.3), models, examples), (torch.stack([one for one, _ in found]).mean(), mean))


def test_orpo_is_trls_on_a_batch_of_equal_lengths(models, tokenizer, tmp_path):
    examples = [one | {"prompt_ids": one["prompt_ids"][:2], "chosen_ids": one["chosen_ids"][:2]} for one in pairs(6)]
    trainer = trainer_of("orpo", models, tokenizer, tmp_path, beta=0.3)
    compare(ours(Objective(kind="orpo", beta=0.3), models, examples), theirs(trainer, concatenated(trainer, examples)))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_kto_is_trls(models, tokenizer, tmp_path, beta):
    examples = pairs(6, seed=4)
    trainer = trainer_of("kto", models, tokenizer, tmp_path, beta=beta, desirable_weight=1.2, undesirable_weight=0.8)
    answers = [one["chosen_ids"] for one in examples]
    batch = trainer.data_collator(
        [
            {"prompt_ids": one["prompt_ids"], "completion_ids": one["chosen_ids"], "KL_completion_ids": other, "label": one["label"]}
            for one, other in zip(examples, answers[-1:] + answers[:-1], strict=True)
        ]
    )
    mine = ours(Objective(kind="kto", beta=beta, desirable=1.2, undesirable=0.8), models, examples)
    compare(mine, theirs(trainer, batch))
    assert mine[3] is not None
    assert mine[3] > 0.01  # else it would have been clamped
    assert float(mine[3]) == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=1e-5)
    assert mine[2]["kl"] == pytest.approx(float(mine[3]), abs=1e-6)
