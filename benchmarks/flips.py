"""How many flipped bits do others' checkpoints load in silence: one bit, anywhere in the file, of a state of 1 MB; 40 files each.

    python benchmarks/flips.py            seconds, on any machine

Ours refuses each by name, since every file has its SHA-256 in a manifest: tests/test_corruptions.py does it 10,000 times. DeepSpeed writes by torch.save.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

State = dict[str, torch.Tensor]


def dcp_load(path: Path, state: State) -> State:
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    # What is measured, on files of our own: DCP's own way to load runs what it reads.
    dcp.load(found, checkpoint_id=str(path), no_dist=True)
    return found


WAYS: dict[str, tuple[Callable[[State, Path], object], Callable[[Path, State], State]]] = {
    "safetensors": (safetensors.torch.save_file, lambda path, _: safetensors.torch.load_file(path)),
    # torch.load runs what it reads but for weights_only, which is what is measured.
    "torch.save": (torch.save, lambda path, _: torch.load(path, weights_only=True)),
    "DCP": (lambda state, path: dcp.save(state, checkpoint_id=str(path), no_dist=True), dcp_load),
}


def outcomes(way: str, flips: int, folder: Path, seed: int) -> Counter[str]:
    """`silent`: loaded, and other numbers; `refused`; `harmless`: loaded, and the same."""
    rng, counts = random.Random(seed), Counter[str]()
    state = {f"weight{index}": torch.randn(256, 256, generator=torch.Generator().manual_seed(seed + index)) for index in range(4)}
    save, load = WAYS[way]
    saved = folder / way
    save(state, saved)
    file = next(saved.glob("*.distcp")) if saved.is_dir() else saved
    whole = file.read_bytes()
    for _ in range(flips):
        damaged, bit = bytearray(whole), rng.randrange(len(whole) * 8)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = load(saved, state)
            same = all(torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in state.items())
            counts["harmless" if same else "silent"] += 1
        except (Exception, CheckpointException):  # DCP's is a BaseException; whatever it says, it says something
            counts["refused"] += 1
    return counts


def main() -> None:
    """A line for each way to save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--flips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="flips-"))
    try:
        for way in WAYS:
            counts = outcomes(way, options.flips, folder, options.seed)
            print(
                f"{way:12} of {options.flips}: {counts['silent']} loaded in silence, {counts['refused']} refused, {counts['harmless']} did no harm"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
