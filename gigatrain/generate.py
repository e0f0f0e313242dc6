"""Text from a trained model, through transformers: what users will load the export with is what we show."""

import tempfile
from pathlib import Path
from typing import Any

from gigatrain import floors
from gigatrain.errors import RunError


def generate(
    folder: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Continue `prompt` by at most `tokens` tokens with the model in `folder`, a run or an export; temperature 0 takes the likeliest.

    A run without export/ is exported from its newest checkpoint first. Raises RunError for a folder that is neither.
    """
    if (folder / "export" / "config.json").is_file():
        return generate(folder / "export", prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, device=device)
    if (folder / "run.json").is_file():
        from gigatrain.export import export

        with tempfile.TemporaryDirectory() as temporary:
            export(folder, Path(temporary))
            return generate(Path(temporary), prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, device=device)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} is neither a run (run.json) nor an exported model (config.json)")

    floors.versions()
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = _class(folder).from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model.to(device)
    except (OSError, ValueError, SafetensorError) as failure:
        raise RunError(f"{folder} cannot be loaded: {str(failure).splitlines()[0][:300]}") from None
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if inputs["input_ids"].numel() == 0:
        raise RunError("the prompt is empty, and this tokenizer has no token that begins a text; give a --prompt")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=pad, **sampling)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _class(folder: Path) -> Any:
    """What loads the model in `folder`: transformers' Auto class, or, for a family of ours that it does not know (mistral4), the family's own."""
    import transformers

    from gigatrain.architectures import class_of

    known = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = transformers.AutoModelForCausalLM
    name = None if type(known) in auto._model_mapping else class_of(known.model_type)
    return auto if name is None else getattr(transformers, name)
