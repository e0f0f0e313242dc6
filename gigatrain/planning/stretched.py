"""Samples longer than those that weights were trained on: only with position embeddings that are scaled for them."""

from gigatrain import load
from gigatrain.architectures import Architecture, Rope
from gigatrain.config import Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign


def check(recipe: Recipe, architecture: Architecture | Foreign) -> None:
    """Raise PlanError where samples have positions that the weights of `model.from` never saw and nothing scales.

    What weights were trained for is their config.json's max_position_embeddings. A `model.rope` that scales by `factor` reaches `factor` times its
    `original_positions`, or, where its kind has none (linear), times the weights' length; one that does not scale, a raised `theta` for instance, is taken at
    its word, since only training tells how far it reaches.
    """
    rope, sequence = recipe.model.rope, recipe.train.sequence
    if rope is not None and isinstance(architecture, Foreign):
        raise PlanError(f"model.rope is for our own decoders, and {architecture.model_type!r} runs by transformers' code; leave it out")
    if recipe.model.source is None or recipe.model.fresh:
        if rope is not None:
            reaches = _reach(rope, 0)
            if reaches and sequence > reaches:
                raise PlanError(
                    _said(sequence, f"model.rope's factor {rope.factor:g} x original_positions {rope.original_positions}", reaches)
                )
        return
    own = load.positions(recipe.model)
    if not own or (rope is not None and rope.kind == "default"):
        return
    reaches = own if rope is None else _reach(rope, own)
    if sequence > reaches:
        what = (
            f"the weights' own length (max_position_embeddings of {recipe.model.source})"
            if rope is None
            else "what model.rope scales them to"
        )
        raise PlanError(_said(sequence, what, reaches, None if rope is None else rope, own))


def _reach(rope: Rope, own: int) -> int:
    return int((rope.factor or 1.0) * (rope.original_positions or own))


def _said(sequence: int, what: str, reaches: int, rope: Rope | None = None, own: int = 0) -> str:
    needed = sequence / ((rope.original_positions if rope is not None else None) or own or reaches)
    way = (
        f"raise its factor to {needed:g}"
        if rope is not None
        else f'scale them, for instance model.rope = {{ kind = "yarn", theta = ..., factor = {needed:g}, original_positions = {own or reaches} }}'
    )
    return f"samples of {sequence:,} tokens have positions beyond {reaches:,}, {what}; {way}, or lower the sequence"
