"""Checkpoints of other systems, made by those systems: a tiny transformers Llama trained some steps by plain torch, torch DCP or DeepSpeed."""

import os

import torch

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
}


def model(seed=0):
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def weights(module):
    return {name: parameter.detach().clone().float() for name, parameter in module.named_parameters()}


def deepspeed_saved(rank, folder, zero, precision):
    """Two steps under DeepSpeed's own engine and its own AdamW, and its own checkpoint; the fp32 master weights that it holds, gathered."""
    from gigatrain.engines.deepspeed import _library

    os.environ |= {"DS_ACCELERATOR": "cpu"}
    deepspeed = _library(torch.device("cpu"))  # the package, but for what it would compile
    deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    module = model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-2), config=config, dist_init_required=False
    )
    for step in range(2):
        tokens = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(folder, tag="step2", client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        found[name] = whole.detach().clone().float().numpy() if whole is not None else None
    return found


def universal(folder, target):
    """DeepSpeed's own converter."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(folder),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
