"""`gigatrain data teach`: a recipe's data, tokenised, and what a teacher says of it, kept beside it."""

from collections.abc import Iterator, Sequence

import torch

from gigatrain import load
from gigatrain.data import build
from gigatrain.errors import RunError
from gigatrain.objectives.teacher import Teacher, teach
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan


def taught(source: str, overrides: Sequence[str], teacher: str | None) -> Iterator[str]:
    """Teach a recipe's samples on this machine; yields what was kept where. `teacher` stands for objective.teacher."""
    given = () if teacher is None else ("objective.kind=distil", f"objective.teacher={teacher}")
    recipe = load.recipe(source, (*overrides, *given))
    if recipe.objective.kind != "distil":
        raise RunError(f'objective.kind is "{recipe.objective.kind}", which learns from no teacher; name one with --teacher DIR')
    site, _ = load.local_site()
    with Display() as display:
        corpus = build.build(recipe.data, recipe.tokenizer, progress=display.advance)
        made = plan(recipe, site, 1, fits=False, forecast=False)
        device = torch.device(made.device)
        compute = torch.bfloat16 if made.compute == "bf16" else torch.float32
        model = Teacher(recipe.objective, vocab=made.architecture.vocab, tokenizer=corpus.tokenizer(), compute=compute, device=device)
        found = teach(made, corpus, model, progress=display.advance)
    for folder, size in found:
        yield f"{folder}: the {made.objective.top_k} likeliest tokens of {made.objective.teacher} at every position, {size / 1e6:,.1f} MB"
