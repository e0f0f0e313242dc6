"""Published rows as workloads: one of each set, what is inferred, what is refused."""

import pytest

from gigatrain.planning.estimate import operations, rows
from gigatrain.planning.estimate.machines import fabric
from gigatrain.planning.estimate.workload import States

GPT3 = {
    "layers": 96, "hidden": 12288, "heads": 96, "kv_heads": 96, "head_dim": 128, "ffn": 49152, "glu": False, "vocab": 51200, "tied_embeddings": True,
    "pos_emb": "learned", "seq_len": 2048,
}  # fmt: skip
LLAMA = {
    "model": "Llama-3.1-8B", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336, "glu": True, "vocab": 128256,
    "tied_embeddings": False, "pos_emb": "rope",
}  # fmt: skip
QWEN = {
    "model": "Qwen3-235B-A22B", "layers": 94, "hidden": 4096, "heads": 64, "kv_heads": 4, "head_dim": 128, "ffn": 12288, "glu": True, "vocab": 151936,
    "tied_embeddings": False, "pos_emb": "rope", "moe_experts": 128, "moe_topk": 8, "moe_ffn": 1536, "moe_shared_ffn": 0, "moe_layers": 94,
}  # fmt: skip
DEEPSEEK = {
    "model": "DeepSeekV3", "layers": 61, "hidden": 7168, "heads": 128, "kv_heads": 128, "head_dim": 128, "ffn": 18432, "glu": True, "vocab": 129280,
    "tied_embeddings": False, "pos_emb": "rope", "moe_experts": 256, "moe_topk": 8, "moe_ffn": 2048, "moe_shared_ffn": 2048, "moe_layers": 58,
    "mla": {"q_lora": 1536, "kv_lora": 512, "qk_nope": 128, "qk_rope": 64, "v": 128},
}  # fmt: skip
ROWS = {
    "mosaic": {
        "model": "MPT-70b", "layers": 80, "hidden": 8192, "heads": 64, "ffn": 32768, "glu": False, "vocab": 50368, "tied_embeddings": True,
        "pos_emb": "learned", "gpu": "A100-SXM-80GB", "gpu_mem_gb": 80, "gpus_per_node": 8, "n_gpus": 64, "framework": "llm-foundry/Composer",
        "interconnect_inter": "RoCE 1600 Gbps/node", "precision": "bf16 (pure)", "attention_impl": "flash attention", "seq_len": 2048, "tp": 1, "pp": 1,
        "cp": 1, "dp": 64, "sharding": "FSDP1 FULL_SHARD (mixed_precision PURE)", "zero_stage": 3, "fsdp_group": 64, "micro_batch": 8, "grad_accum": 4,
        "global_batch": 2048, "act_ckpt": "full", "step_time_s": 159.6,
    },
    "korthikanti_2022": GPT3 | {
        "model": "gpt3-175B", "gpu": "A100-SXM-80GB", "gpu_mem_gb": 80, "gpus_per_node": 8, "n_gpus": 64, "framework": "Megatron-LM", "precision": "fp16",
        "interconnect_inter": "8x HDR200 InfiniBand (Selene)", "attention_impl": "unfused + fused softmax", "tp": 8, "seq_parallel": True, "pp": 8, "vp": 3,
        "cp": 1, "dp": 1, "sharding": "none (dp=1)", "zero_stage": 0, "micro_batch": 1, "global_batch": 64,
        "act_ckpt": "selective (core attention) + sequence parallel",
    },
    "mlperf_gpt3": GPT3 | {
        "model": "GPT-3 175B", "gpu": "H100-SXM-80GB", "gpu_mem_gb": 80, "gpus_per_node": 8, "n_gpus": 512, "framework": "NVIDIA NeMo Framework",
        "interconnect_inter": "Storage: 2x ConnectX-7 IB NDR 400Gb/s, Compute: 8x ConnectX-7 IB NDR 400Gb/s, Management: 100Gb/s Ethernet NIC",
        "precision": "fp8 (delayed scaling hybrid)", "tp": 4, "pp": 8, "vp": 12, "cp": 1, "dp": 16, "zero_stage": 1, "micro_batch": 1, "grad_accum": 128,
        "global_batch": 2048, "act_ckpt": "selective (core attention)",
    },
    "nvidia_bridge": DEEPSEEK | {
        "gpu": "GB300-NVL72", "gpu_mem_gb": 278, "gpus_per_node": 4, "n_gpus": 256, "interconnect_intra": "NVLink5 NVL72 1800 GB/s bidir",
        "framework": "Megatron-Bridge", "framework_version": "25.11", "precision": "FP8-MX", "seq_len": 4096, "tp": 1, "pp": 2, "vp": 4, "cp": 1, "ep": 32,
        "dp": 128, "zero_stage": 1, "micro_batch": 1, "global_batch": 4096, "notes": "task=pretrain; MoE forced-balanced routing, dropless",
    },
    "megatron_moe_zoo": QWEN | {
        "gpu": "H100-SXM-80GB", "gpu_mem_gb": 80, "gpus_per_node": 8, "n_gpus": 256, "interconnect_inter": "InfiniBand 8x50 GB/s",
        "framework": "Megatron-LM (moe dev)", "precision": "bf16", "seq_len": 16384, "tp": 4, "pp": 8, "vp": 4, "cp": 1, "ep": 8, "dp": 8,
        "sharding": "DDP + distributed optimizer (ZeRO-1)", "zero_stage": 1, "micro_batch": 1, "global_batch": 256, "act_ckpt": "selective layernorm, moe",
        "notes": "long context; dropless",
    },
    "stas_upgrade": LLAMA | {
        "gpu": "H200-SXM-141GB", "gpu_mem_gb": 141, "gpus_per_node": 8, "n_gpus": 8, "framework": "DeepSpeed 0.19.2 + HF + Liger", "precision": "bf16",
        "attention_impl": "FA3", "seq_len": 65536, "sharding": "ZeRO-3 + CPU AdamW offload", "zero_stage": 3, "micro_batch": 1, "grad_accum": 1,
        "global_batch": 8, "act_ckpt": "full", "peak_mem": 37.5, "peak_mem_unit": "GiB", "peak_mem_kind": "max_memory_reserved worst rank",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_set_is_a_workload_that_runs(name):
    case = rows.parse(ROWS[name])
    assert case.workload.layout.ranks == case.cluster.accelerators == ROWS[name]["n_gpus"]
    assert case.workload.batch == ROWS[name]["global_batch"]
    assert case.cluster.levels[-1].accelerators == ROWS[name]["n_gpus"]
    assert operations.works(case.workload)


def test_what_a_row_says_is_taken():
    mosaic, korthikanti, mlperf = (rows.parse(ROWS[name]) for name in ("mosaic", "korthikanti_2022", "mlperf_gpt3"))
    assert (mosaic.workload.stack, mosaic.workload.layout.zero, mosaic.workload.recompute) == ("llm_foundry", 3, "full")
    assert mosaic.workload.states == States(weights=0, gradients=4, master=4, moments=8, reduced=2, gathered=2)
    assert mosaic.cluster.levels[-1].gbyte_s == 25.0
    assert mosaic.measured == {"step_time_s": 159.6}
    assert (korthikanti.workload.attention, korthikanti.workload.recompute, korthikanti.workload.layout.schedule) == (
        "unfused",
        "attention",
        "interleaved",
    )
    assert (mlperf.workload.precision, mlperf.cluster.levels[-1].gbyte_s) == ("fp8_delayed", 50.0)
    bridge, zoo, stas = (rows.parse(ROWS[name]) for name in ("nvidia_bridge", "megatron_moe_zoo", "stas_upgrade"))
    assert (bridge.workload.shape.kv_rank, bridge.workload.shape.head_dim, bridge.workload.shape.sparse_layers) == (512, 192, 58)
    assert (bridge.workload.precision, bridge.workload.version, bridge.workload.balanced) == ("mxfp8", "25.11", True)
    assert [level.accelerators for level in bridge.cluster.levels] == [72, 128, 256]
    assert (zoo.workload.recompute, zoo.workload.lean, zoo.workload.balanced) == ("lean", ("recompute_moe",), False)
    assert stas.workload.offload
    assert stas.workload.chunked_loss
    assert stas.measured["peak_bytes"] == 37.5 * 2**30


def test_what_a_row_leaves_out_is_implied_or_assumed_and_said():
    case = rows.parse(
        LLAMA | {"gpu": "H100", "n_gpus": 64, "framework": "torchtitan", "seq_len": 8192, "tp": 4, "cp": 2, "global_batch": 32}
    )
    layout = case.workload.layout
    assert (layout.shard, layout.tensor, layout.context, layout.zero, layout.sequence_parallel) == (8, 4, 2, 3, True)
    assert (case.workload.microbatch, case.workload.accumulation, case.workload.precision) == (1, 4, "bf16")
    for word in ("ZeRO 3", "made again", "50 GB/s", "microbatches of 1", "precision"):
        assert any(word in text for text in case.assumed), word
    hybrid = rows.parse(
        LLAMA
        | {
            "gpu": "A100-SXM-40GB",
            "gpu_mem_gb": 40,
            "n_gpus": 32,
            "framework": "torchtitan",
            "sharding": "HSDP",
            "seq_len": 4096,
            "micro_batch": 1,
        }
    )
    assert (hybrid.workload.layout.shard, hybrid.workload.layout.replicate, hybrid.cluster.chip) == (8, 4, "a100-40")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"precision": "NVFP4", "gpu": "B200"}, ("precision", "nvfp4")),
        ({"precision": "float8 tensorwise", "framework": "torchtitan"}, ("precision", "fp8_tensorwise")),
        ({"precision": "FP8-SC"}, ("precision", "fp8_blockwise")),
        ({"act_ckpt": "selective", "framework": "torchtitan"}, ("recompute", "selective")),
        ({"act_ckpt": "selective", "framework": "NeMo"}, ("recompute", "attention")),
        ({"act_ckpt": "true"}, ("recompute", "full")),
        ({"framework": "Megatron-DeepSpeed"}, ("attention", "unfused")),
        ({"framework": "nanotron 0.5"}, ("stack", "nanotron")),
        ({"framework": "InternEvo"}, ("stack", "generic")),
        ({"framework": "NeMo AutoModel"}, ("stack", "torchtitan")),
        ({"model": "LLAMA2-7B LoRA"}, ("frozen", True)),
        ({"overlap": "EP overlap off"}, ("overlap", (("expert", False),))),
    ],
)  # fmt: skip
def test_words_of_a_row(said, found):
    case = rows.parse(LLAMA | {"gpu": "H100-SXM-80GB", "n_gpus": 8, "framework": "Megatron-LM", "seq_len": 4096, "micro_batch": 1} | said)
    assert getattr(case.workload, found[0]) == found[1]


@pytest.mark.parametrize(
    ("gpu", "chip", "accelerators"),
    [
        ("A100-PCIE-80GB", "a100", 16),
        ("H800-SXM-80GB", "h100", 16),
        ("MI250X (GCD)", "mi250x", 8),
        ("MI355X", "mi355x", 16),
        ("GH200 96GB", "gh200", 16),
    ],
)
def test_accelerators_by_any_name(gpu, chip, accelerators):
    case = rows.parse(LLAMA | {"gpu": gpu, "n_gpus": 16, "framework": "torchtitan", "precision": "bf16", "seq_len": 4096, "micro_batch": 1})
    assert (case.cluster.chip, case.cluster.accelerators) == (chip, accelerators)
    assert case.cluster.levels[0].gbyte_s == {"A100-PCIE-80GB": 25.0, "H800-SXM-80GB": 200.0, "MI250X (GCD)": 175.0, "MI355X": 535.5}.get(
        gpu, 450.0
    )


@pytest.mark.parametrize(
    ("text", "per_node", "gbyte_s"),
    [
        ("InfiniBand 8x50 GB/s", 8, 50.0), ("RoCE 1600 Gbps/node", 8, 25.0), ("8x HDR200", 8, 25.0), ("4x Omni-Path 100", 8, 6.25), ("EFA 3200 Gbps", 8, 50.0),
        ("Slingshot-11 4x200 Gbit/s", 8, 12.5), ("InfiniBand 4x HDR (100 GB/s per node)", 8, 12.5), ("NDR400", 8, 50.0), ("100 GbE", 8, 1.5625),
        ("400 Gb/s per GPU", 8, 50.0), ("somewhere fast", 8, None),
    ],
)  # fmt: skip
def test_fabrics(text, per_node, gbyte_s):
    assert fabric(text, per_node) == gbyte_s


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"gpu": "TPU v5p"}, "hardware.py"), ({"gpu": None}, "no gpu"), ({"n_gpus": 12, "tp": 8}, "no multiple"), ({"layers": None}, "no layers"),
        ({"layers": "many"}, "no number"), ({"micro_batch": None}, "neither global_batch"), ({"zero_stage": 7}, "zero_stage 7"), ({"mla": True}, "mla"),
        ({"precision": "int8"}, "int8"),
        ({"gpu": "A100-SXM-80GB", "precision": "fp8"}, "no rate of fp8"), ({"seq_len": 0}, "seq_len"), ({"pp": 8, "vp": 8}, "32 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_with_the_reason(said, reason):
    with pytest.raises(rows.Refused, match=reason):
        rows.parse(
            LLAMA | {"gpu": "H100", "n_gpus": 64, "framework": "NeMo", "precision": "bf16", "seq_len": 4096, "micro_batch": 1} | said
        )


@pytest.mark.parametrize(
    ("words", "each"),
    [
        ("NVLink3 600 GB/s bidir", 300.0), ("NVLink 300 GB/s", 150.0), ("NVSwitch 300 GB/s per direction", 300.0), ("NVLink, 200 GB/s each way", 200.0),
        ("NVLink 4 x 25 GB/s", 300.0), ("NVLink 12 x 25 GB/s", 300.0), ("NVLink 8x50 GB/s", 200.0), ("400 GB/s (200 GB/s per direction)", 200.0),
    ],
)  # fmt: skip
def test_words_of_a_link(words, each):
    assert rows.parse(ROWS["mosaic"] | {"interconnect_intra": words}).cluster.levels[0].gbyte_s == each


@pytest.mark.parametrize(
    ("said", "domain"),
    [
        ({}, 72),
        ({"interconnect_intra": "NVLink5 NVL36"}, 36),
        ({"gpu": "GB200 NVL4"}, 4),
        ({"gpu": "GB300-NVL72"}, 72),
        ({"gpu": "B200", "gpus_per_node": 8}, 8),
    ],
)
def test_a_rack_is_one_domain(said, domain):
    row = ROWS["nvidia_bridge"] | {"gpu": "GB200", "interconnect_intra": None} | said
    assert rows.parse(row).cluster.levels[0].accelerators == domain


@pytest.mark.parametrize("stated", [64, 128, None])
def test_a_device_has_its_share_of_a_packages_memory(stated):
    row = ROWS["mosaic"] | {"gpu": "MI250X", "gpu_mem_gb": stated}
    assert rows.parse(row).cluster.memory_bytes == int(64 * 2**30 * 0.99)


@pytest.mark.parametrize(
    ("of", "change", "reason"),
    [
        ("megatron_moe_zoo", {"ep": 48}, "does not divide 128 experts"),
        ("megatron_moe_zoo", {"n_gpus": 32, "ep": 64, "dp": 1}, "does not divide the 4 ranks that can share experts"),
        ("megatron_moe_zoo", {"framework": "gigatrain native", "zero_stage": 3, "ep": 16}, "does not divide the 8 ranks"),
        ("megatron_moe_zoo", {"global_batch": 7}, "less than one sample for each of 8"),
        ("megatron_moe_zoo", {"moe_topk": 129}, "moe_topk 129 of 128 experts"),
        ("mosaic", {"cp": 8, "seq_len": 15}, "cp 8 ranks share samples of 15 tokens"),
        ("mosaic", {"gpu": "H100 NVL", "gpu_mem_gb": None}, "rates of the NVIDIA H100 NVL 94 GB are unknown"),
    ],
)
def test_layouts_that_cannot_exist_are_refused(of, change, reason):
    rows.parse(ROWS[of])
    with pytest.raises(rows.Refused, match=reason):
        rows.parse(ROWS[of] | change)


def test_a_published_contradiction_is_taken_as_printed():
    case = rows.parse(ROWS["nvidia_bridge"] | {"pp": 8, "vp": 2, "ep": 64, "dp": 32})  # Megatron-Bridge's archive, 25.09
    assert case.workload.layout.expert == 64
    assert any("taken as printed" in word for word in case.assumed)


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("20 of 80 layers", 0.25), ("full (every 2nd layer)", 0.5), ("full, every other layer", 0.5), ("block, 2 layers", 0.025), ("uniform, 1 layer", 1.0),
        ("full", 1.0), ("25% of the layers", 0.25), ("full, 90 of 80 layers", 1.0),
    ],
)  # fmt: skip
def test_a_part_of_the_layers_is_made_again(words, share):
    case = rows.parse(ROWS["mosaic"] | {"act_ckpt": words})
    assert (case.workload.recompute, case.workload.recomputed) == ("full", pytest.approx(share))
    (work,) = operations.works(case.workload)
    again = sum(bool(block.recompute) for block in work.stages[0] if block.name == "layer")
    assert again == pytest.approx(80 * share)
    none, whole = (operations.works(rows.parse(ROWS["mosaic"] | {"act_ckpt": one}).workload)[0] for one in ("none", "full"))
    kept, least, most = (sum(block.saved_bytes for block in one.stages[0]) for one in (work, whole, none))
    assert least <= kept < most


def test_a_number_of_torchtitans_selective_policy_is_of_layers():
    ours = rows.parse(ROWS["mosaic"] | {"act_ckpt": "selective (option 2)", "framework": "torchtitan"}).workload
    assert (ours.recompute, ours.recomputed) == ("full", 0.5)
    theirs = rows.parse(ROWS["mosaic"] | {"act_ckpt": "selective (option 2)", "framework": "Megatron-LM"}).workload
    assert (theirs.recompute, theirs.recomputed) == ("attention", 1.0)
