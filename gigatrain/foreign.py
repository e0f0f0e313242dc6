"""Every number of a transformers model that is not one of our families, without torch: what the plan needs, and keeps with the run.

It is measured on the model's own modules, on meta: models/automodel.py's `numbers`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gigatrain.architectures import FAMILIES
from gigatrain.errors import RecipeError

Count = Annotated[int, Field(ge=0)]

# Model types that see only their own document where positions begin anew within a row, as transformers' masks are made from positions; held by a test,
# and by models/automodel.py's `verify` when a run starts. The others would mix documents, and have no way to be told.
ISOLATING = frozenset(["gpt_neox", "phi", "starcoder2", "stablelm", "cohere", "nemotron", "olmo", "gemma", "glm", "glm4", "gpt2", "gptj"])
# Keys of config.json and attributes of modules by which a forward draws random numbers, by their endings; they are set to 0, as torch's generator follows
# neither seed nor mesh.
RANDOM = ("dropout", "dropout_p", "dropout_prob", "dropout_rate", "pdrop", "layerdrop", "drop_path_rate", "jitter_noise")


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Head(_Numbers):
    """What the model does between its last hidden state and its logits: l = scale * (h w^T + bias), c * tanh(l / c) with a soft-cap.

    `separate`: it can be said so, and the logits are never all in memory. Otherwise the model's own logits are (`why`).
    """

    separate: bool
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    why: str = ""


class Attention(_Numbers):
    """Layers that attend alike."""

    layers: Count
    channels: Count = Field(description="heads * head_dim.")
    window: Count | None = Field(default=None, description="Tokens that are seen; None: all before.")


class Foreign(_Numbers):
    """A transformers model by its config.json; counts in elements. It offers what planning reads of an `Architecture`."""

    kind: Literal["foreign"] = "foreign"
    config: dict[str, Any] = Field(
        description="config.json, complete, as transformers writes it: the run needs no other file to build the model."
    )
    model_type: str
    class_name: str = Field(description="transformers' class.")
    layer_class: str = Field(description="Class of the repeated blocks.")
    vocab: Count
    hidden: Count
    layers: Count
    tied: bool
    total: Count = Field(description="Parameters, a tied head counted once.")
    matrices: Count = Field(description="Weights of the layers' matrix products.")
    products: Count = Field(
        description="Weights that one token is multiplied with: the layers' matrices, of experts the chosen ones, and the head."
    )
    largest_layer: Count = Field(description="Parameters of the largest layer: what is gathered at once.")
    attention: tuple[Attention, ...]
    head: Head
    positions: Count = Field(description="Longest context that config.json declares; 0: none.")
    saved: tuple[float, float] = Field(
        description="Elements that one layer keeps for its backward, per token: a constant, and what is multiplied by the tokens of a sample."
    )
    wide: Count = Field(description="Parameters that transformers keeps in fp32 whatever the rest is: with any, a run in bf16 is refused.")

    @property
    def isolates(self) -> bool:
        """Whether documents in one row can be kept apart."""
        return self.model_type in ISOLATING

    def parameters(self) -> int:
        """Trainable numbers, exactly."""
        return self.total

    def matrix_parameters(self) -> int:
        """Weights of the matrix products of all layers, without embedding, head, biases and norms."""
        return self.matrices

    def flops_per_token(self, sequence: int) -> float:
        """Forward and backward FLOPs of the matrix products, per token of a sample of `sequence` tokens that is one document.

        6 per weight that a token meets, and 12 * channels * keys per attending layer, as `Architecture.flops_per_token`; scans of state-space layers
        and convolutions are not counted.
        """
        if sequence < 1:
            raise ValueError(f"sequence {sequence} must be at least 1")

        def keys(window: int | None) -> float:
            w = min(window or sequence, sequence)
            return (w * (w + 1) / 2 + (sequence - w) * w) / sequence

        return 6.0 * self.products + sum(12.0 * a.layers * a.channels * keys(a.window) for a in self.attention)


def native(config: Mapping[str, Any]) -> bool:
    """Whether one of our own families can be built from this config.json, which is faster and runs on every mesh; if so, do not take a `Foreign`."""
    return config.get("model_type") in FAMILIES


def refuse(config: Mapping[str, Any]) -> None:
    """Raises RecipeError for what a config.json says that we cannot train as it is meant."""
    kind = config.get("model_type")
    if "auto_map" in config:
        raise RecipeError(
            f"model.from: config.json of this {kind!r} names code of its own (auto_map), which gigatrain never runs; "
            "take a model whose code is in transformers, or remove auto_map if it is there"
        )
    if not isinstance(kind, str):
        raise RecipeError("model.from: config.json has no model_type, so transformers does not know what to build")
    if config.get("quantization_config"):
        raise RecipeError(
            f"model.from: these weights of {kind!r} are quantized (quantization_config), which cannot be trained; take the full ones"
        )
    if config.get("is_encoder_decoder"):
        raise RecipeError(f"model.from: {kind!r} is an encoder with a decoder, and only decoders are trained here; take a decoder")
    if config.get("output_router_logits"):
        raise RecipeError(
            f"model.from: output_router_logits of this {kind!r} adds a balancing loss that is not computed here; set it to false in config.json"
        )
