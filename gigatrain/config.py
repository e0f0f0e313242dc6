"""Every model of a recipe: frozen, strict, free of torch.

A recipe says what is wanted, a site (site.py) says what the machines are. Both are read by `gigatrain.load`; nobody reads them after `plan()`.
"""

from datetime import date as Day
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gigatrain.architectures import Architecture, Rope

Count = Annotated[int, Field(ge=1, le=1 << 50)]  # steps, tokens and bytes; beyond it is a slip of the finger
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]  # of a recipe, a site, and so of folders and jobs
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Ranks = Annotated[int, Field(ge=1, le=1 << 20)]


class Section(BaseModel):
    """One table of a recipe: immutable, and a key that nobody reads cannot exist."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


class Init(Section):
    """How fresh weights are drawn: normal with `std`, and, if `scale_residual`, the two writers to the residual stream by std / sqrt(2 layers) (GPT-2)."""

    std: Positive = Field(default=0.02, description="Deviation of the normal distribution.")
    scale_residual: bool = Field(default=True, description="Writers to the residual stream are drawn smaller, by sqrt(2 layers).")


class Model(Section):
    """The network: its numbers, and either fresh weights or those of a folder."""

    architecture: Architecture | None = Field(
        default=None, description="A name (`gigatrain schema` lists them), or a table of numbers; `base` starts from a name."
    )
    source: str | None = Field(
        default=None,
        alias="from",
        description="Folder or hub name whose weights (and, without `architecture`, numbers) the run starts from.",
    )
    positions: Count | None = Field(
        default=None, description="Context length of the weights of `from`, in tokens; default: what their config.json declares."
    )
    fresh: bool = Field(default=False, description="Take only the numbers of `from`, and draw the weights anew.")
    rope: Rope | None = Field(
        default=None,
        description="Position embedding in the place of the architecture's, for samples longer than those that the weights were trained on, for instance "
        '{ kind = "yarn", theta = 1e6, factor = 4.0, original_positions = 32768 }.',
    )
    init: Init = Init()

    @model_validator(mode="after")
    def one_of(self) -> Self:
        if self.architecture is None and self.source is None:
            raise ValueError("needs `architecture` (a name or a table of numbers) or `from` (a folder or hub name)")
        if self.fresh and self.source is None:
            raise ValueError("`fresh` draws new weights for the numbers of `from`, and there is no `from`; leave it out")
        return self


class TokenizerTraining(Section):
    """A byte-level byte-pair tokenizer, trained on the run's own training documents."""

    vocab: Annotated[int, Field(ge=258, le=1_000_000)] = Field(default=4096, description="Tokens, the 256 bytes and special ones included.")
    max_bytes: Count = Field(default=1 << 28, description="It is trained on at most this many bytes, taken evenly over the documents.")


class Tokenizer(Section):
    """Where token ids come from: an existing tokenizer, or one trained here."""

    source: str | None = Field(default=None, alias="from", description="Folder, tokenizer.json or hub name of a Hugging Face tokenizer.")
    train: TokenizerTraining | None = None
    template: str | None = Field(
        default=None,
        description="Chat template in place of the tokenizer's own: chatml, or a jinja file. The special tokens of chatml are added where they are missing.",
    )
    special: tuple[str, ...] = Field(
        default=(), description="Special tokens that are added where they are missing, for a template of your own."
    )
    variables: dict[str, bool | int | str] = Field(
        default_factory=dict, description="What the chat template is told besides, such as enable_thinking = false; in use as in training."
    )
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(
        default=None,
        description="The day that a chat template is told when it asks; default: none, and templates write what they write without one.",
    )

    @model_validator(mode="after")
    def one_of(self) -> Self:
        if (self.source is None) == (self.train is None):
            raise ValueError("needs exactly one of `from` (a folder, file or hub name) and `train` (a table)")
        if self.date is not None:
            Day.fromisoformat(self.date)
        return self


class Source(Section):
    """One corpus of a mixture."""

    kind: Literal["stdlib", "text", "jsonl", "parquet", "hub", "megatron"] = Field(
        description="stdlib: Python's own library; text: files; jsonl, parquet, hub: records; megatron: shards of token ids, read as they lie."
    )
    path: str | None = Field(
        default=None, description="File, folder or glob; `hub`: dataset name or folder; `megatron`: prefix of .bin and .idx."
    )
    pattern: str = Field(default="**/*", description="`text` in a folder: which files.")
    format: Literal["text", "chat", "sharegpt", "alpaca", "completion", "preference"] = Field(
        default="text",
        description="What a record of `jsonl`, `parquet` or `hub` is; `stdlib`: chat or preference, made of its functions' docstrings. "
        "chat: messages of role and content (and tools); sharegpt: conversations of from and "
        "value; alpaca: instruction, input, output; completion: prompt and completion; preference: chosen and rejected. Of these only what the assistant "
        "writes is trained.",
    )
    field: str = Field(
        default="text",
        description="`jsonl`, `parquet`, `hub`: the column that holds the text; of chat and sharegpt, if set, the turns (default: messages, conversations).",
    )
    too_long: Literal["truncate", "truncate_left", "drop", "refuse"] = Field(
        default="truncate",
        description="A document of more than `train.sequence` targets, where packing is packed: cut at its end or its beginning, left out, or refused by name.",
    )
    history: Literal["split", "skip", "refuse"] = Field(
        default="split",
        description="A conversation whose earlier turns the template writes in another way than when they were last (thinking that is dropped): one sample a "
        "turn, each as the model sees it then; or left out; or refused by name.",
    )
    subset: str | None = Field(default=None, description="`hub`: the dataset's configuration.")
    split: str = Field(default="train", description="`hub`: which split.")
    revision: str | None = Field(default=None, description="`hub`: commit or tag to pin.")
    weight: Positive = Field(default=1.0, description="Share of the samples, relative to the other sources.")

    @model_validator(mode="after")
    def has_path(self) -> Self:
        if (self.kind == "stdlib") != (self.path is None):
            raise ValueError("`stdlib` takes no `path`" if self.path else f"`{self.kind}` needs `path`")
        if self.kind == "stdlib" and self.format in ("chat", "preference"):
            return self  # made by rule, of its functions' docstrings
        if self.format != "text" and self.kind not in ("jsonl", "parquet", "hub"):
            raise ValueError(f"`format` {self.format!r} is of records, and `{self.kind}` has none; use jsonl, parquet or hub")
        return self


class BadDocuments(Section):
    """What happens to a document that cannot be used: skipped and counted, or refused by name."""

    undecodable: Literal["skip", "refuse", "replace"] = Field(default="skip", description="Bytes that are not UTF-8 (`replace`: U+FFFD).")
    empty: Literal["skip", "refuse"] = Field(default="skip", description="A document without text.")
    short: Literal["keep", "skip", "refuse"] = Field(default="keep", description="Fewer than `min_tokens` tokens.")
    long: Literal["keep", "skip", "truncate", "refuse"] = Field(default="keep", description="More than `max_tokens` tokens.")
    unparsable: Literal["skip", "refuse"] = Field(default="skip", description="A JSON line or record that is not one, or lacks the field.")
    unmarkable: Literal["skip", "refuse"] = Field(
        default="skip", description="A conversation whose trained tokens cannot be proved, such as one that holds a special token as text."
    )
    min_tokens: Count = Field(default=2, description="Fewer are `short`.")
    max_tokens: Count = Field(default=100_000_000, description="More are `long`.")


class Data(Section):
    """What is read, how it is cut into samples, and what is held out."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(
        description="The corpora that samples are drawn from, by their `weight`."
    )
    folder: str = Field(default="~/.cache/gigatrain/data", description="Where tokenised shards are kept; `~` is the user's home.")
    validation: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        default=0.005, description="Share of the documents held out, by a hash of their names (files) or of their text (records)."
    )
    packing: Literal["stream", "document", "packed"] = Field(
        default="stream",
        description="`stream`: documents end to end, cut every `sequence` tokens; `document`: one a sample, cut or padded; `packed`: whole documents, as many "
        "as fit best, each seeing itself alone.",
    )
    bad: BadDocuments = BadDocuments()
    workers: Annotated[int, Field(ge=0, le=256)] = Field(default=0, description="Processes that tokenise; 0 means one per core.")
    shard_bytes: Count = Field(default=1 << 26, description="Source bytes that go into one shard.")

    @model_validator(mode="after")
    def packs(self) -> Self:
        for source in self.sources:
            if source.too_long != "truncate" and self.packing != "packed":
                raise ValueError(f'`too_long` {source.too_long!r} is of whole documents; set `packing` = "packed", or leave it out')
        return self


class Loss(Section):
    """What is minimised beside the cross entropy."""

    z_loss: NonNegative = Field(default=0.0, description="Weight of log(Z)^2 (PaLM, arXiv:2204.02311, uses 1e-4).")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="Share of each target that is spread evenly over the vocabulary (arXiv:1512.00567); validation has none."
    )
    # Off by default: transformers computes none unless it is asked to (`output_router_logits`), so that a recipe without them is the model alone.
    router_aux: NonNegative = Field(
        default=0.0,
        description="Weight of the loss that balances the experts, over all layers and the tokens of a microbatch (arXiv:2101.03961; transformers' "
        "router_aux_loss_coef).",
    )
    router_z: NonNegative = Field(
        default=0.0,
        description="Weight of the routers' mean squared log-sum-exp, which keeps their logits small (arXiv:2202.08906 uses 1e-3).",
    )
    router_bias_rate: NonNegative = Field(
        default=0.0,
        description="How far a step moves the bias that corrects a router's choice, up for experts visited less than the mean and else down "
        "(arXiv:2408.15664 uses 1e-3); for families that have one (deepseek_v3).",
    )

    @property
    def watches(self) -> bool:
        """Whether routers must say what they saw."""
        return self.router_aux > 0 or self.router_z > 0 or self.router_bias_rate > 0


class Phase(Section):
    """A stretch of the run with samples of its own length, or sources in other shares; what it leaves out is train's."""

    steps: Count | None = Field(default=None, description="Optimizer updates of this phase. Exactly one of `steps` and `tokens`.")
    tokens: Count | None = Field(default=None, description="Training tokens of this phase; the plan turns them into steps, rounding up.")
    sequence: Annotated[int, Field(ge=2)] | None = Field(default=None, description="Tokens of one sample.")
    batch: Count | None = Field(default=None, description="Samples of one step, over all ranks.")
    microbatch: Count | None = Field(default=None, description="Samples that one rank computes at a time.")
    weights: tuple[NonNegative, ...] | None = Field(
        default=None,
        description="Share of the samples of each of data.sources, in their order; 0 leaves one out. Default: the sources' own.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("needs exactly one of `steps` and `tokens`")
        if self.weights is not None and not any(self.weights):
            raise ValueError("`weights` leaves out every source; make one of them positive")
        return self


class Objective(Section):
    """What is minimised: the cross entropy of the next token, or one of the losses of pairs of answers (gigatrain/objectives/ has the formulas)."""

    kind: Literal["language", "dpo", "ipo", "orpo", "simpo", "kto", "distil"] = Field(
        default="language",
        description="language: the next token. Of a preferred and a refused answer: dpo (arXiv:2305.18290), ipo (arXiv:2310.12036), orpo (arXiv:2403.07691), "
        "simpo (arXiv:2405.14734); of single answers that are good or not: kto (arXiv:2402.01306). distil: a teacher's probabilities.",
    )
    beta: Positive | None = Field(
        default=None,
        description="How strongly a preference counts: dpo's, kto's and simpo's beta, ipo's tau, orpo's lambda. Default: 0.1, of simpo 2.0.",
    )
    reference: Literal["start", "adapter"] | None = Field(
        default=None,
        description="dpo, ipo, kto: whose log-probabilities are subtracted; start: the weights the run starts from, computed once before its first step and "
        "kept in the run's folder; adapter: the model with its adapters off, in every step. Default: start. orpo and simpo have none.",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        default=0.0, description="dpo, simpo: share of the pairs whose order is taken to be wrong."
    )
    robust: bool = Field(
        default=False, description="dpo: the loss is unbiased if so many pairs are wrong (arXiv:2403.00409), instead of conservative."
    )
    nll: NonNegative = Field(
        default=0.0,
        description="dpo, ipo, simpo: weight of the preferred answer's negative log-probability a token beside the loss, against answers that all become less "
        "likely (Llama 3 takes 0.2, arXiv:2407.21783, 4.1.4); orpo has it in its formula.",
    )
    margin: NonNegative = Field(default=0.5, description="simpo: gamma, by which the preferred answer should lead.")
    desirable: Positive = Field(default=1.0, description="kto: weight of good answers.")
    undesirable: Positive = Field(default=1.0, description="kto: weight of the others.")
    teacher: str | None = Field(default=None, description="distil: folder or hub name of the teacher, of the same tokenizer.")
    online: bool = Field(
        default=False,
        description="distil: the teacher computes in every step, whole on every rank; else what `gigatrain data teach` kept beside the corpus is read.",
    )
    top_k: Annotated[int, Field(ge=1, le=65536)] = Field(
        default=32, description="distil: how many of the teacher's likeliest tokens count one by one; all others count as one."
    )
    temperature: Positive = Field(default=1.0, description="distil: T, by which both models' logits are divided (arXiv:1503.02531).")
    weight: Fraction = Field(default=0.5, description="distil: share of T^2 times the divergence in the loss; the rest is cross entropy.")

    @property
    def pairs(self) -> bool:
        """Whether a sample is a pair of answers, or a labelled one, and not a stretch of text."""
        return self.kind in ("dpo", "ipo", "orpo", "simpo", "kto")

    @property
    def joins(self) -> bool:
        """Whether a row holds both answers of a pair, as two documents."""
        return self.pairs and self.kind != "kto"

    @property
    def refers(self) -> bool:
        """Whether log-probabilities of a reference are subtracted."""
        return self.kind in ("dpo", "ipo", "kto")

    @property
    def strength(self) -> float:
        """`beta`, or its default."""
        return self.beta or (2.0 if self.kind == "simpo" else 0.1)

    @model_validator(mode="after")
    def fits(self) -> Self:
        if self.reference is not None and not self.refers:
            raise ValueError(f"`reference` is of dpo, ipo and kto; {self.kind} has none: leave it out")
        if self.label_smoothing and self.kind not in ("dpo", "simpo"):
            raise ValueError(f"`label_smoothing` is of dpo and simpo, not of {self.kind}; [loss] has that of the next token")
        own = type(self).model_fields
        for kinds, names in (
            (("distil",), ("teacher", "online", "top_k", "temperature", "weight")),
            (("dpo", "ipo", "orpo", "simpo", "kto"), ("beta",)),
            (("dpo", "ipo", "simpo"), ("nll",)),
            (("simpo",), ("margin",)),
            (("kto",), ("desirable", "undesirable")),
        ):
            for name in names if self.kind not in kinds else ():
                if getattr(self, name) != own[name].default:
                    raise ValueError(f"`{name}` is of {', '.join(kinds)}; {self.kind} has none: leave it out")
        if self.kind == "distil" and self.teacher is None:
            raise ValueError("`distil` needs `teacher`, a folder or hub name")
        if self.robust and (self.kind != "dpo" or not self.label_smoothing):
            raise ValueError("`robust` is of dpo with a `label_smoothing` above 0")
        return self


class Train(Section):
    """The size of a step and of the run."""

    steps: Count | None = Field(
        default=None, description="Optimizer updates. Exactly one of `steps` and `tokens`, and neither with `phases`."
    )
    tokens: Count | None = Field(default=None, description="Training tokens; the plan turns them into steps, rounding up.")
    sequence: Annotated[int, Field(ge=2)] = Field(description="Tokens of one sample.")
    batch: Count = Field(description="Samples of one step, over all ranks.")
    microbatch: Count | None = Field(default=None, description="Samples that one rank computes at a time; default: all of its share.")
    phases: tuple[Phase, ...] = Field(
        default=(), description="The run in stretches, one after the other: sequence-length curriculum, data mixture phases. Default: one."
    )
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        "bf16",
        description="bf16: bf16 weights and activations, fp32 master weights, gradient sums and losses. fp8: as bf16, with the layers' products in the low "
        "precision of `[fp8]`: other numbers, not the same ones faster.",
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(default=0, description="Of fresh weights, of the order of the data, of dropout.")
    recompute: Literal["none", "lean", "selective", "full"] = Field(
        default="none",
        description="Activation checkpointing: lean drops what one element-wise pass makes again (norm outputs, the activation), selective keeps "
        "matrix products only, full keeps one tensor per layer.",
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="Share of each block's output that is dropped before the residual sum; masks follow from the seed and the step.",
    )
    neftune: NonNegative = Field(
        default=0.0,
        description="Even noise on the embeddings in training, of at most this / sqrt(sequence * hidden) (NEFTune, arXiv:2310.05914, uses 5 to 15); it follows "
        "from the seed and the step.",
    )
    compile: bool = Field(default=False, description="torch.compile each layer; costs a start of tens of seconds.")
    fuse: bool | None = Field(
        default=None,
        description="Queries, keys and values are one product, and gate and up another: their weights lie end to end in memory, and unfused on disk. "
        "Default: where the plan expects a gain.",
    )
    main_grads: bool | None = Field(
        default=None,
        description="Layers' products add their weights' gradients to the fp32 sums themselves. Default: where the plan expects a gain.",
    )
    graph: bool = Field(default=False, description="The whole step is one CUDA graph, recorded after three steps and replayed.")
    release: bool = Field(
        default=False,
        description="Each layer is updated and its gradients freed as soon as its backward has ended (one process, one microbatch, no clipping). A "
        "gradient that is not finite still reaches no weight, but layers behind it are already updated when it is seen.",
    )
    deterministic: bool = Field(default=False, description="Only deterministic algorithms: two runs are bitwise equal, also on a GPU.")
    nproc: Ranks | None = Field(
        default=None, description="Processes that `gigatrain train` starts on this machine; under torchrun or Slurm they are there already."
    )
    max_bad_steps: Count = Field(
        default=8, description="So many steps in a row with a loss or gradient that is not finite or a spike stop the run."
    )

    @property
    def compute(self) -> Literal["bf16", "fp32"]:
        """What weights and activations are in, outside of products in fp8."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.phases and (self.steps is not None or self.tokens is not None):
            raise ValueError("with `phases`, whose own `steps` and `tokens` add up, leave out `steps` and `tokens`")
        if not self.phases and (self.steps is None) == (self.tokens is None):
            raise ValueError("needs exactly one of `steps` and `tokens`")
        if self.microbatch is not None and self.microbatch > self.batch:
            raise ValueError(f"`microbatch` {self.microbatch} is above `batch` {self.batch}; lower it, or leave it out")
        return self


class Adapter(Section):
    """Fine-tuning by matrices of low rank beside frozen ones (models/adapters.py): y = W x + s B A dropout(x), with s = alpha / rank."""

    kind: Literal["lora", "dora"] = Field(
        default="lora",
        description="lora (arXiv:2106.09685); dora (arXiv:2402.09353) also trains the length of each of the matrix's rows.",
    )
    rank: Annotated[int, Field(ge=1, le=65536)] = Field(default=16, description="Rows of A and columns of B.")
    alpha: Positive = Field(default=32.0, description="What is added counts alpha / rank.")
    rslora: bool = Field(default=False, description="It counts alpha / sqrt(rank), which keeps its size at high ranks (arXiv:2312.03732).")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="Share of A's inputs that is dropped; masks follow from the seed, the step and the matrix."
    )
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear",
        description="Ends of the names of the layers' matrices that get one, for instance q_proj or self_attn.o_proj; all-linear: every one but "
        "head, router and experts.",
    )
    train_embeddings: bool = Field(default=False, description="The embedding is trained too, as a whole.")
    train_head: bool = Field(default=False, description="The head is trained too, as a whole; where both are tied they are one matrix.")
    quantise: Literal["none", "nf4"] = Field(
        default="none",
        description="How the layers' frozen matrices are kept: nf4, 4 bits and an fp32 scale for 64 neighbours (QLoRA, arXiv:2305.14314).",
    )
    restore: Literal["torch", "bitsandbytes"] = Field(
        default="torch",
        description="What makes weights of their 4 bits again: torch's own operations, on any device and in seven times the memory traffic, or "
        "bitsandbytes' kernel (pip install bitsandbytes). The same numbers.",
    )
    source: str | None = Field(
        default=None, alias="from", description="Folder of an adapter that peft wrote, of the same kind, rank and targets, to start from."
    )

    @property
    def scale(self) -> float:
        """What B A counts."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class FP8(Section):
    """The products of the layers where train.precision is fp8 (kernels/fp8_linear.py has the formulas and their sources)."""

    scaling: Literal["rowwise", "blockwise", "tensorwise", "mxfp8", "nvfp4"] = Field(
        default="rowwise",
        description="What shares a scale: a row; 1 x 128 activations and 128 x 128 weights (DeepSeek-V3); a tensor; mxfp8 32 and nvfp4 16 neighbours, in "
        "the microscaling formats of sm_100.",
    )
    amax: Literal["current", "delayed"] = Field(
        default="current",
        description="tensorwise: the scale of a tensor's own largest magnitude, read twice, or of the largest of past steps, which a checkpoint keeps.",
    )
    history: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, description="delayed: how many past steps.")
    gradient: Literal["e4m3", "e5m2"] | None = Field(
        default=None,
        description="Format of the gradients of outputs; default: e5m2 of tensorwise, e4m3 of the others, whose scales are near enough.",
    )
    scales: Literal["fp32", "power_of_two"] | None = Field(
        default=None, description="Default: power_of_two, rounded up, so that scaling rounds nothing; of tensorwise fp32."
    )
    weight_gradient: Literal["low", "bf16"] = Field(
        default="low", description="bf16 leaves the weight gradient's product in bf16 (torchao's rowwise_with_gw_hp)."
    )
    fast_accumulation: bool = Field(default=False, description="The forward's sums stay in the tensor cores' own bits, fewer than fp32's.")
    stochastic: bool = Field(default=True, description="nvfp4: gradients are rounded stochastically (arXiv:2509.25149).")
    least: tuple[Count, Count] = Field(
        default=(1024, 1024),
        description="Outputs and inputs of the smallest matrix that is quantised: below, quantising costs what the product gains (benchmarks/fp8.py's model).",
    )
    high: tuple[str, ...] = Field(
        default=(),
        description="Matrices that stay in bf16, by the ends of their names, for instance self_attn.v_proj. Head and router always do.",
    )
    emulate: bool = Field(
        default=False, description="Operands are rounded to the format and multiplied in fp32: the lane's numbers, slowly, on any device."
    )


class Mesh(Section):
    """How ranks share the model and the batch: the product of the axes is the number of ranks."""

    replicate: Ranks = Field(
        default=1, description="Copies of the sharded weights (HSDP; with shard = 1, DDP). Each reads its own samples."
    )
    shard: Ranks | None = Field(
        default=None,
        description="Ranks that share one copy of weights, gradients and optimizer (FSDP2, ZeRO); each reads its own samples. Default: all that are left.",
    )
    expert: Ranks = Field(default=1, description="Ranks that share the experts of a layer: some of those of `shard`, which it divides.")
    context: Ranks = Field(default=1, description="Ranks that share the tokens of a sample; they share weights too.")
    tensor: Ranks = Field(default=1, description="Ranks that share each matrix, within a node; between the matrices they share the tokens.")
    pipeline: Ranks = Field(default=1, description="Ranks that share the layers, one stage or more each.")
    schedule: Literal["1f1b", "interleaved", "zbv"] = Field(
        default="1f1b",
        description="Order of the microbatches in a pipeline: 1F1B (arXiv:2006.09503), interleaved (arXiv:2104.04473), ZBV (arXiv:2405.15362).",
    )
    stages: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, description="Stages of each pipeline rank; default: 1 for 1f1b, 2 for interleaved and zbv."
    )
    exchange: Literal["ring", "ulysses"] = Field(
        default="ring",
        description="How ranks of `context` attend: keys go round a ring, with the tokens split so that all work alike (arXiv:2310.01889), or heads are "
        "exchanged for tokens (arXiv:2309.14509).",
    )
    dispatch: Literal["alltoall", "hierarchical", "gather"] = Field(
        default="alltoall",
        description="How tokens reach their experts: one all-to-all; one between nodes and one within; or every token to every rank of `expert`, "
        "which needs no counts on the host.",
    )


class Engine(Section):
    """The backend, and what it trades."""

    name: Literal["native", "deepspeed"] = Field(default="native", description="native: torch's FSDP2, HSDP or DDP; deepspeed: ZeRO.")
    zero: Literal[1, 2, 3] = Field(default=3, description="deepspeed: what is sharded; 1 optimizer, 2 and gradients, 3 and weights.")
    offload: bool = Field(
        default=False, description="Sharded weights, gradients and optimizer live in host memory (deepspeed: the optimizer)."
    )
    reshard: bool = Field(default=True, description="native: gathered weights of a layer are dropped after its forward and gathered again.")
    prefetch: Annotated[int, Field(ge=0, le=8)] = Field(default=1, description="native: layers whose weights are gathered ahead.")
    reduce: Literal["fp32", "bf16"] = Field(default="fp32", description="What gradients are summed over the ranks in.")
    async_tensor: bool = Field(
        default=False, description="native: gathers along `tensor` are cut up and hidden behind products (CUDA, with train.compile)."
    )


class Profile(Section):
    """Traces of chosen steps, for chosen ranks."""

    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="Steps that torch's profiler records (counted from 0).")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), description="Ranks that record.")
    memory: bool = Field(default=False, description="Also a snapshot of the allocator's blocks (CUDA).")


class Optim(Section):
    """AdamW (arXiv:1711.05101), or Muon for the layers' matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="`adamw` for all, or `muon` for the layers' matrices and `adamw` for the rest."
    )
    source: str | None = Field(
        default=None,
        alias="from",
        description="A run's folder, or one of its checkpoints (RUN/checkpoints/step-00001000), whose fp32 weights and optimizer state this run begins with.",
    )
    lr: Positive = Field(description="Peak learning rate of AdamW's share.")
    muon_lr: Positive = Field(default=0.02, description="Peak learning rate of Muon's share, in units of the update's spectral norm.")
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.95, description="Share of the last step's momentum that stays."
    )
    muon_scaling: Literal["spectral", "rms"] = Field(
        default="spectral",
        description="Size of an orthogonal update: spectral, sqrt(max(1, rows / columns)); rms, 0.2 sqrt(max(rows, columns)), as far as AdamW's "
        "(arXiv:2502.16982), so that `muon_lr` may be AdamW's rate.",
    )
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        default=(0.9, 0.95), description="Shares of AdamW's first and second moment that stay at each step."
    )
    eps: Positive = Field(default=1e-8, description="Added to the root of AdamW's second moment.")
    weight_decay: NonNegative = Field(default=0.1, description="Each step takes lr * weight_decay of a weight away.")
    decay_embeddings: bool = Field(default=False, description="Whether embeddings and the head decay too; norms and biases never do.")
    clip: Annotated[Positive | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        default=1.0, description="Global gradient norm above which gradients are scaled down; false: never."
    )
    master: Literal["fp32", "bf16+16", "bf16+8"] = Field(
        default="fp32",
        description="How AdamW's master weights are kept beside bf16 weights: fp32, 4 B each; bf16+16, a correction of 2 B that makes the weights exactly "
        "fp32; bf16+8, one of 1 B that makes them 24 bits. Muon's matrices keep fp32.",
    )
    moments: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="How AdamW's two moments are kept: 8, 4 or 2 B per parameter; the narrow ones are rounded stochastically. Muon's keeps fp32.",
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="stochastic",
        description="Of bf16+8 to its 24 bits (the other forms drop none): to nearest, a weight stops where an update is below half its last place, 2^-17 "
        "to 2^-16 of it, as lr * weight_decay often is.",
    )


class Schedule(Section):
    """The learning rate as a function of the step alone."""

    kind: Literal["cosine", "linear", "wsd", "constant", "infinite"] = Field(
        default="cosine",
        description="After the warm-up: half a cosine or a line to `floor`; `wsd` stays at the peak and falls over `decay`; `constant`; "
        "`infinite` cools to `level`, stays there and falls over `decay`.",
    )
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps of linear warm-up from `start`.")
    start: Fraction = Field(
        default=0.0, description="Share of the peak that the warm-up rises from: to warm up again from a checkpoint's rate, that rate's."
    )
    from_step: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="The step at which this schedule begins, warm-up first: of a run that goes on from its checkpoint of that step under another schedule.",
    )
    decay: Fraction = Field(
        default=0.2,
        description="`wsd`, `infinite`: share of the schedule's steps, at its end, over which the rate falls linearly to `floor`.",
    )
    floor: Fraction = Field(default=0.1, description="The rate at the last step, as a share of the peak.")
    cycles: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="`cosine`: falls to `floor` so many times, each time from the peak (warm restarts, arXiv:1608.03983)."
    )
    cooldown: Fraction = Field(
        default=0.2,
        description="`infinite`: share of the schedule's steps, after the warm-up, over which the rate falls to `level` as a cosine.",
    )
    level: Fraction = Field(
        default=0.5, description="`infinite`: the rate between cool-down and decay, as a share of the peak (arXiv:2503.02844)."
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.start and not self.warmup:
            raise ValueError("`start` is where the warm-up begins, and there is none; set `warmup`")
        if self.cycles > 1 and self.kind != "cosine":
            raise ValueError(f"`cycles` are of `kind` cosine, and it is {self.kind}")
        if self.kind == "infinite" and self.cooldown + self.decay > 1.0:
            raise ValueError(f"`cooldown` {self.cooldown:g} and `decay` {self.decay:g} are shares of the same steps, and together above 1")
        return self


class ValidationSet(Source):
    """Documents that are validated on and never trained on, beside what `data.validation` holds out; `weight` says nothing here."""

    name: Name = Field(description="What its losses are called in metrics and report.")


class Validation(Section):
    """When the held-out documents are read, and what is read with them."""

    every: Annotated[int, Field(ge=0)] = Field(default=0, description="Steps between two validations; 0: only after the last step.")
    max_samples: Count | None = Field(
        default=None, description="At most so many samples, of what is held out and of each set; default: all of them."
    )
    sets: tuple[ValidationSet, ...] = Field(
        default=(),
        description="Further sets, each with a loss, a perplexity and bits per byte of its own. `val_loss` is that of the held-out documents, and where "
        "none are held out that of the first set.",
    )

    @model_validator(mode="after")
    def named_apart(self) -> Self:
        names = [one.name for one in self.sets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of `sets` are called {twice!r}; each needs a name of its own")
        return self


class Checkpoint(Section):
    """When the run is saved, and how many saves are kept."""

    every: Count | Literal["auto"] = Field(
        default=500,
        description='Steps between two checkpoints; the last step is always saved. "auto": what is best by the cost of a save as this run measures it and '
        "the rate of failures, at least one an hour.",
    )
    keep: Count = Field(default=2, description="How many of the newest stay on disk.")
    keep_every: Count | None = Field(
        default=None, description="Checkpoints of steps that are multiples of it stay for good, beside the newest."
    )
    background: bool = Field(
        default=True,
        description="Processes beside the ranks write checkpoints while training goes on, from a copy in memory; false: training waits, and no copy is made.",
    )
    near: str | None = Field(
        default=None,
        description="Folder of every node's own memory or NVMe (/dev/shm) where the newest steps are kept too, with copies at peer nodes; `{node}` in it is "
        "the node's number. Memory there counts against the job's.",
    )
    near_every: Count | Literal["auto"] = Field(default="auto", description="Steps between two of these; auto: as of `every`.")
    near_copies: Annotated[int, Field(ge=0, le=8)] = Field(
        default=1, description="How many other nodes, the next in the mesh's order, keep a copy of what a node keeps."
    )
    most_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description='"auto": share of the time that saves of one tier may take, however close failures are.'
    )


class Recovery(Section):
    """What a run does when a part of it fails; no tensor of the run depends on it.

    Restarts in place, standby, hangs and shrinking are of ranks that one command starts (train.nproc). Ranks of a job are started again by its script, in the
    same allocation; one that hangs there is ended by the limit of collectives, 600 s.
    """

    restarts: Annotated[int, Field(ge=0, le=1000)] = Field(
        default=3,
        description="Restarts in place, in a row, that gain no step, before the run stops; 0: the command ends with its first failure.",
    )
    supervised: bool = Field(
        default=False, description="Whether one rank too is a process of its own, that is watched and restarted; of several all are."
    )
    standby: bool = Field(
        default=True,
        description="A process that has imported everything waits beside the ranks, which are forked from it: a restart does not pay for the imports.",
    )
    hang_times: NonNegative = Field(
        default=3.0,
        description="Ranks that make no progress for so many times their p99 step are ended and restarted; 0: never.",
    )
    hang_floor_s: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=60.0,
        description="And for at least so many seconds: a machine that is busy with something else is no hang. Four times that, until a step is known.",
    )
    hang_slow_s: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=540.0,
        description="The same where nothing has a usual length: start, first steps, saves, export. Collectives end at 600 s by themselves.",
    )
    shrink: Ranks | None = Field(
        default=None,
        description="The fewest ranks that may train: where a rank fails twice in a row without a step gained, the run goes on without it, same batch and "
        "samples; it is tried again at the next restart. Default: no run shrinks.",
    )

    replicas: Literal["none", "own", "torchft"] = Field(
        default="none",
        description="Whether each of `mesh.replicate` copies is a world of its own, so that the others go on when it is lost, with its samples, and it takes "
        "their state when it returns; own: our quorum decides who lives; torchft: torchft's lighthouse does (pip install torchft).",
    )
    replicas_lease_s: Annotated[float, Field(ge=0.2, le=600)] = Field(
        default=5.0,
        description="A replica that was silent for so long is lost; one whose process ends is so at once (torchft: after this).",
    )
    replicas_timeout_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=60.0, description="How long a replica waits within a step for another that has begun it."
    )
    replicas_patience_s: Annotated[float, Field(ge=1, le=3600)] = Field(
        default=120.0, description="How long replicas wait for each other when a run begins, and for a quorum that is gone."
    )


class Numerics(Section):
    """What the run does about numbers that cannot be right (engines/judge.py, observe/numerics.py)."""

    sigma: Annotated[float, Field(ge=0, le=1000)] = Field(
        default=6.0,
        description="A loss or gradient norm so many deviations above its mean over `window` applied steps is refused like one that is not finite; "
        "0: only what is not finite is. Norms are compared by their logarithms, and one as far out as the window's own tail reaches is none.",
    )
    window: Annotated[int, Field(ge=8, le=65536)] = Field(
        default=128, description="Applied steps that a spike is measured against; none is judged before there are so many."
    )
    action: Literal["skip", "rollback"] = Field(
        default="skip",
        description="After train.max_bad_steps refused steps in a row: skip stops the run; rollback goes back to the newest checkpoint and passes over the "
        "samples from the first of them on.",
    )
    pass_over: Count = Field(
        default=64, description="Steps whose samples a rollback passes over, counted from the first refused one of the row."
    )
    rollbacks: Annotated[int, Field(ge=1, le=1000)] = Field(default=3, description="Most rollbacks of a run; one more would stop it.")
    replay: bool = Field(
        default=True,
        description="A refused step is made again on the same data from the same weights: another result is a fault of a machine, and its own is trained on.",
    )
    hash_every: Annotated[int, Field(ge=0)] = Field(
        default=100,
        description="Steps between two comparisons of what several ranks hold alike, at the report that follows; also before every save. 0: never.",
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        default="stop", description="Where copies differ: stop and name them, or go back to the newest checkpoint, whose copies agreed."
    )
    straggler: Annotated[float, Field(ge=0)] = Field(
        default=1.5,
        description="A rank that takes so many times the median of all ranks for a section of its steps, in three reports in a row, is named; 0: none is.",
    )


class Report(Section):
    """What is shown and recorded."""

    every: Count = Field(default=10, description="Steps of one window: host and device meet once a window, never within a step.")
    hang_s: Annotated[float, Field(ge=0, le=86400)] = Field(
        default=300.0,
        description="Seconds of a rank without progress that are told in its log, with stacks; 0: never. Of several ranks 540 at most: collectives end at 600.",
    )
    prometheus: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port of rank 0's node that serves Prometheus metrics while the run lives; `gigatrain watch --serve` is the same.",
    )
    prometheus_host: str = Field(default="127.0.0.1", description="The interface that serves them; each asks for a bearer token.")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=("tensorboard",), description="What also receives the numbers of metrics.jsonl, by accelerate."
    )
    project: str = Field(default="gigatrain", description="The trackers' project name.")


class Power(Section):
    """What the run may draw, how that is measured, and what is done to keep to it; no tensor of the run depends on it."""

    measure: bool = Field(
        default=True, description="Read the meters of every node; what has no meter is estimated or unknown, and said so."
    )
    every_s: Annotated[float, Field(ge=0.02, le=10.0)] = Field(default=0.1, description="Seconds between two readings of a meter.")
    sysfs: str = Field(default="/sys", description="Where the kernel's files are; in a container perhaps /host/sys.")
    node: Literal["auto", "pm_counters", "redfish", "dcmi", "none"] = Field(
        default="auto", description="The meter of a whole node: the first that answers, this one, or none (it is then estimated)."
    )
    megawatts: Positive | None = Field(
        default=None,
        description="What the run may draw at the facility: the plan refuses what would draw more, a run what nothing can say the draw of.",
    )
    ramp_megawatts_min: Positive | None = Field(
        default=None, description="How fast the facility's draw may change, MW per minute, at starts, saves and ends; default: the site's."
    )
    schedule: str | None = Field(
        default=None,
        description="CSV file of times with megawatts, price_eur_mwh or carbon_g_kwh (POWER.md); times are UTC or have a zone.",
    )
    follow: Literal["price", "carbon"] | None = Field(
        default=None, description="Draw `slow_to` of full power while that column of the schedule is above `slow_above`."
    )
    slow_above: Positive | None = Field(default=None, description="EUR/MWh or g CO2e/kWh.")
    slow_to: Fraction = Field(default=0.5, description="Share of full power; 0 pauses the run.")
    caps: bool = Field(default=False, description="Limits of accelerators may be set, and are put back, where the user has the right to.")
    stagger: bool = Field(
        default=False,
        description="Runs of one site save at different steps of `checkpoint.every`, so that their draw does not fall together.",
    )

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.follow is not None and (self.schedule is None or self.slow_above is None):
            raise ValueError("`follow` needs a `schedule` to follow and `slow_above`, from where on the run is slowed")
        if self.follow is None and self.slow_above is not None:
            raise ValueError('`slow_above` is of what? Set `follow` to "price" or "carbon"')
        if not self.measure and (self.megawatts or self.follow or self.schedule):
            raise ValueError("a budget or a schedule cannot be kept without `measure`")
        if not self.measure and (self.ramp_megawatts_min is not None or self.caps):
            raise ValueError(
                "a ramp or limits of accelerators (`caps`) need `measure`: they go by what is drawn; leave them out, or measure"
            )
        return self


class Sample(Section):
    """What the model writes when the run ends, printed and kept in samples.jsonl; no prompt and no held-out conversation, no sample."""

    prompt: str | None = Field(default=None, description="The text that it continues.")
    held_out: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0,
        description="So many held-out conversations are answered, in the template's format, for the report; beside them stands what was held out.",
    )
    tokens: Count = Field(default=100, description="At most so many tokens.")
    temperature: NonNegative | None = Field(
        default=None,
        description="Divides the logits; 0 takes the likeliest token each time. The export's generation_config.json says it too. Default: what the model of "
        "`model.from` says there; of fresh weights 0.8.",
    )
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = Field(
        default=None,
        description="Only the so many likeliest tokens are drawn from; 0: all. Default: as of `temperature`; of fresh weights 50.",
    )


class Recipe(Section):
    """What is wanted: a model, its data and how it is trained."""

    name: Name = Field(description="What runs, jobs and exports are called.")
    summary: str = Field(default="", description="One line for a reader.")
    model: Model
    tokenizer: Tokenizer
    data: Data
    train: Train
    optim: Optim
    fp8: FP8 = FP8()
    adapter: Adapter | None = Field(
        default=None, description="Train an adapter beside the frozen weights of `model.from`; default: train the weights."
    )
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    objective: Objective = Objective()
    mesh: Mesh = Mesh()
    engine: Engine = Engine()
    profile: Profile = Profile()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    numerics: Numerics = Numerics()
    report: Report = Report()
    power: Power = Power()
    sample: Sample = Sample()
    kernels: Literal["auto", "reference"] | dict[str, str] = Field(
        default="auto",
        description='`reference`: plain torch for every operation. A table chooses per operation, for instance { attention = "sdpa" }; its '
        "`default`, auto or reference, decides the rest.",
    )
    export: bool = Field(default=True, description="Write export/ (transformers' format) when the run ends.")

    @property
    def documents(self) -> bool:
        """Whether rows hold several documents, which attention keeps apart."""
        return self.data.packing != "document" or self.objective.joins
