r"""How many answers to held-out questions have the form that quickstart-sft and quickstart-dpo teach (gigatrain/data/stdlib.py).

    python benchmarks/answers.py runs/quickstart runs/quickstart-sft runs/quickstart-dpo

Questions are about the functions of Python's standard library that the recipes hold out (data.validation = 0.05, by a hash of the function's name). Answers
are greedy, in the model's own chat template. An answer is in form if it is one line, a function and its arguments in backticks, a colon and one sentence, and
if the model then ends its turn; whether the function is the one that was asked for is told beside it. Whether the sentence is true is not judged: a model of
2.4 million parameters cannot know it.
"""

import argparse
import collections
import json
from pathlib import Path
from typing import Any

from gigatrain.config import Source
from gigatrain.data import sources, stdlib
from gigatrain.data.documents import held_out


def questions(share: float) -> list[tuple[str, str]]:
    """(question, the answer that was held out), in the order of the library's files."""
    found = []
    for piece in sources.pieces(Source(kind="stdlib"), 1 << 30):
        for name, _, record in stdlib.records(piece.name, Path(piece.path).read_bytes(), "chat"):
            if held_out(name, share):
                asked, answered = record["messages"]
                found.append((asked["content"], answered["content"]))
    return found


def answers(folder: Path, asked: list[str], tokens: int, batch: int, device: str) -> list[tuple[str, bool]]:
    """Greedy answers, and whether the model ended its turn."""
    import torch

    from gigatrain.generate import exported, opened

    found: list[tuple[str, bool]] = []
    with exported(folder) as place, torch.inference_mode():
        tokenizer, model = opened(place, device)
        end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
        rows = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False)
            for text in asked
        ]
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            width = max(map(len, some))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in some], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some], device=device)
            made: Any = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                eos_token_id=[end, pad], pad_token_id=pad,
            )  # fmt: skip
            for row in made[:, width:].tolist():
                ended = next((at for at, one in enumerate(row) if one in (end, pad)), None)
                found.append((tokenizer.decode(row[:ended], skip_special_tokens=False), ended is not None and row[ended] == end))
    return found


def judged(folder: Path, asked: list[tuple[str, str]], *, tokens: int = 64, batch: int = 32, device: str = "cpu") -> dict[str, Any]:
    """The share in form, why others are not, and every answer."""
    rows = []
    for (question, right), (text, ended) in zip(asked, answers(folder, [one for one, _ in asked], tokens, batch, device), strict=True):
        lacks = stdlib.judge(question, text)
        if not ended and lacks in ("", "another function"):
            lacks = "no end"
        rows.append({"question": question, "answer": text, "lacks": lacks, "right": text == right})
    lacking = collections.Counter(row["lacks"] for row in rows if row["lacks"])
    return {
        "folder": str(folder),
        "questions": len(rows),
        "in_form": sum(row["lacks"] in ("", "another function") for row in rows),
        "asked_for": sum(not row["lacks"] for row in rows),
        "lacking": dict(lacking),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN|DIR")
    parser.add_argument("--questions", type=int, default=0, help="only the first so many; default: all that are held out")
    parser.add_argument("--share", type=float, default=0.05, help="data.validation of the recipes (default: %(default)s)")
    parser.add_argument("--show", type=int, default=6, help="answers that are shown of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    options = parser.parse_args(arguments)
    asked = questions(options.share)
    asked = asked[: options.questions or None]
    found = [judged(folder, asked, device=options.device) for folder in options.folders]
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for one in found:
        why = ", ".join(f"{count} {what}" for what, count in one["lacking"].items())
        count, shaped, same = one["questions"], one["in_form"], one["asked_for"]
        text = f"{shaped} of {count} answers in form ({shaped / count:.1%}), {same} of them of the function that was asked for"
        print(f"{one['folder']}: {text}" + f"; lacking: {why}" * bool(why))
        for row in one["rows"][:: max(1, len(one["rows"]) // options.show)][: options.show]:
            print(f"  {row['question']}\n    {row['answer']!r}" + f"    [{row['lacks']}]" * bool(row["lacks"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
