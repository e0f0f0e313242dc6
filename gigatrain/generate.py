"""Text from a trained model, through transformers: what users will load the export with is what we show."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gigatrain import floors
from gigatrain.errors import RunError
from gigatrain.exporting.generation import model_class

ROLES = ("system", "developer", "user", "assistant", "tool")


def generate(
    folder: Path,
    prompt: str | None,
    *,
    tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    messages: Sequence[dict[str, Any]] | None = None,
    stream: bool = False,
) -> str:
    """Continue `prompt`, or answer `messages` in the model's chat template, by at most `tokens` tokens.

    Temperature 0 takes the likeliest, top_k 0 draws among all; None: as the model's own generation_config.json says.
    `folder` is a run or an export; a run without export/ is exported from its newest checkpoint first. Of a prompt the whole text is returned, of
    messages the answer alone. `stream`: tokens are printed as they come. Raises RunError for a folder that is neither, and for a model without a template.
    """
    with exported(folder) as place:
        tokenizer, model = opened(place, device)
        import torch
        import transformers

        inputs = _asked(place, tokenizer, prompt, messages).to(device)
        torch.manual_seed(seed)
        sampling = _drawing(temperature, top_k)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        shown = transformers.TextStreamer(tokenizer, skip_prompt=messages is not None, skip_special_tokens=True) if stream else None
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=pad, streamer=shown, **sampling)
        start = inputs["input_ids"].shape[1] if messages is not None else 0
        return tokenizer.decode(ids[0][start:], skip_special_tokens=True)


def answers(
    folder: Path,
    asked: Sequence[tuple[Sequence[int], int]],
    *,
    tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[list[int]]:
    """What the model of a run or an export writes after each of some prompts: (ids, the id that ends an answer) -> ids. Each draws from `seed` anew."""
    with exported(folder) as place:
        tokenizer, model = opened(place, device)
        import torch

        known = model.generation_config.eos_token_id
        stops = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
        sampling = _drawing(temperature, top_k)
        found = []
        for prompt, end in asked:
            torch.manual_seed(seed)
            ids = torch.tensor([list(prompt)], device=device)
            with torch.inference_mode():
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    eos_token_id=sorted(stops | {end}),
                    pad_token_id=end,
                    **sampling,
                )
            found.append(written[0, ids.shape[1] :].tolist())
        return found


# Draws of the export's generation_config.json, which a greedy answer does not read and would be warned of.
_GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


def _drawing(temperature: float | None, top_k: int | None) -> dict[str, Any]:
    """What `generate` is given above the model's own generation_config.json, which has the word on what is None."""
    if temperature == 0:
        return _GREEDY
    asked = {"temperature": temperature, "top_k": top_k}
    found = {name: value for name, value in asked.items() if value is not None}
    return found | ({"do_sample": True} if found else {})


@contextlib.contextmanager
def exported(folder: Path, *, newest: bool = False) -> Iterator[Path]:
    """The folder for transformers of a run or of an export: its own, or one that is made for the while.

    A run's export/ is taken where there is one; with `newest` only where it is of the run's newest whole checkpoint. Raises RunError for a folder that is
    neither.
    """
    if (folder / "run.json").is_file():
        kept = folder / "export"
        if (kept / "config.json").is_file() and (not newest or _is_newest(folder, kept)):
            yield kept
            return
        from gigatrain.export import export

        # As large as the model, so where the run's own files lie; of a run that is only read, where temporary files do.
        place = folder if os.access(folder, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".model-", dir=place) as temporary:
            export(folder, Path(temporary))
            yield Path(temporary)
    elif (folder / "config.json").is_file():
        yield folder
    elif (folder / "export" / "config.json").is_file():
        yield folder / "export"
    elif (folder / "adapter_config.json").is_file():
        raise RunError(f"{folder} is an adapter alone, without the model that it stands beside; name its run, or export that with --merge")
    else:
        raise RunError(f"{folder} is neither a run (run.json) nor an exported model (config.json)")


def _is_newest(folder: Path, kept: Path) -> bool:
    from gigatrain import run
    from gigatrain.export import MARK

    said = json.loads((kept / MARK).read_text(encoding="utf-8")) if (kept / MARK).is_file() else {}
    return said.get("step") == run.checkpoints(folder).latest()[0].step


def opened(folder: Path, device: str) -> tuple[Any, Any]:
    """`(tokenizer, model)` of a folder for transformers, in the precision that it is stored in. Raises RunError where it cannot be loaded."""
    floors.versions()
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = model_class(folder).from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model.to(device)
    except (OSError, ValueError, SafetensorError) as failure:
        raise RunError(f"{folder} cannot be loaded: {str(failure).splitlines()[0][:300]}") from None
    return tokenizer, model.eval()


def conversation(text: str) -> list[dict[str, Any]]:
    """Messages from JSON: a list of {"role", "content"}, or an object that has it as "messages". Raises RunError that says what is wrong."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise RunError(f"the messages are not JSON: {failure}") from None
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise RunError('the messages are no list of {"role": …, "content": …}, nor an object with such a list as "messages"')
    for number, one in enumerate(found):
        if not isinstance(one, dict) or one.get("role") not in ROLES or not isinstance(one.get("content"), str | list | None):
            raise RunError(f'message {number} is {str(one)[:120]}: each needs a "role" ({", ".join(ROLES)}) and a "content"')
    return found


def _asked(folder: Path, tokenizer: Any, prompt: str | None, messages: Sequence[dict[str, Any]] | None) -> Any:
    """What the model reads."""
    if messages is None:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].numel() == 0:
            raise RunError("the prompt is empty, and this tokenizer has no token that begins a text; give a --prompt")
        return inputs
    if not tokenizer.chat_template:
        raise RunError(
            f"the tokenizer of {folder} has no chat template, so it cannot be talked with; leave --chat out to continue a text, or put a "
            "chat_template.jinja beside its tokenizer.json"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as failure:  # a template is a program, and refuses by raising
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]
        raise RunError(f"the chat template of {folder} does not take these messages: {reason}") from None
