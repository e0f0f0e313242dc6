"""P7: whatever happens to the bytes of a checkpoint at rest, it is refused by name and the one before is used; never loaded in silence."""

import json
import os
import random
import shutil

import pytest
import torch

from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.parallel.places import Piece

ORDINARY, LONG = 300, 10_000
NEWEST, BEFORE = "step-00000002", "step-00000001"


def checkpoints(root, run="r"):
    return Checkpoints(root, run=run, plan_sha256="p", keep=9)


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {name: Piece.whole(torch.randn(11, 5, generator=generator)) for name in ("a", "b")}
        | {"c": Piece.whole(torch.zeros(3000))},
        "optimizer": {"m.a": Piece.whole(torch.randn(11, 5, generator=generator)), "steps": Piece.whole(torch.tensor(step))},
        "random": {"cpu": Piece.whole(torch.arange(step, step + 40, dtype=torch.uint8))},
    }


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two checkpoints of a run, and two of another with tensors of the same names and shapes: folder -> file -> bytes."""
    found = {}
    for run in ("r", "other"):
        root = tmp_path_factory.mktemp(run)
        for step in (1, 2):
            folder = checkpoints(root, run).save(step, state(step + (10 if run == "other" else 0)), {"at": step})
            found[run, folder.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


# Each gives the damaged files of the newest checkpoint, from those that are there and those of the others.


def flip(files, healthy, chance):
    name = chance.choice(sorted(files))
    data, bit = bytearray(files[name]), chance.randrange(8 * len(files[name]))
    data[bit // 8] ^= 1 << bit % 8
    return name, {**files, name: bytes(data)}


def truncate(files, healthy, chance):
    name = chance.choice(sorted(files))
    return name, {**files, name: files[name][: chance.randrange(len(files[name]))]}


def extend(files, healthy, chance):
    name = chance.choice(sorted(files))
    return name, {**files, name: files[name] + chance.choice([b"\0", b"\n", b" ", files[name], os.urandom(7)])}


def zero(files, healthy, chance):
    """A page that never reached the disk."""
    name = chance.choice(sorted(files))
    data = bytearray(files[name])
    begin, count = chance.randrange(len(data)), chance.choice([16, 512, 4096])
    data[begin : begin + count] = bytes(min(count, len(data) - begin))
    return name, {**files, name: bytes(data)}


def miss(files, healthy, chance):
    name = chance.choice(sorted(files))
    return name, {other: data for other, data in files.items() if other != name}


def swap(files, healthy, chance):
    one, two = chance.sample(sorted(files), 2)
    return f"{one} and {two}", {**files, one: files[two], two: files[one]}


def foreign_step(files, healthy, chance):
    name = chance.choice(sorted(files))
    return name, {**files, name: healthy["r", BEFORE][name]}


def foreign_run(files, healthy, chance):
    names = chance.choice([[chance.choice(sorted(files))], ["weights-00000.safetensors", "optimizer-00000.safetensors"], sorted(files)])
    return str(names), {**files, **{name: healthy["other", NEWEST][name] for name in names}}


def whole_step(files, healthy, chance):
    """All of an older one under a newer one's name."""
    return "all", dict(healthy["r", BEFORE])


def duplicate(files, healthy, chance):
    """A file in the place of another of the same kind, and its bytes twice."""
    one, two = chance.sample(sorted(files), 2)
    return two, {**files, two: files[one] if chance.random() < 0.5 else files[two] * 2}


def edit(files, healthy, chance):
    """A value of the JSON changed by hand, the rest as it was."""
    name = chance.choice(["manifest.json", "state.json"])
    value = json.loads(files[name])
    at, path = value, []
    while isinstance(at, dict | list) and at:
        key = chance.choice(sorted(at)) if isinstance(at, dict) else chance.randrange(len(at))
        path.append((at, key))
        at = at[key]
    holder, key = path[-1]
    holder[key] = chance.choice([at + 1 if isinstance(at, int) else 0, "x", None, [], -1, [at], 2**70])
    return f"{name} {[key for _, key in path]}", {**files, name: json.dumps(value).encode()}


def header(files, healthy, chance):
    """A tensor's header: other offsets, shape or type, the same length."""
    name = chance.choice([name for name in files if name.endswith(".safetensors")])
    data = files[name]
    digits = [at for at in range(8, 8 + int.from_bytes(data[:8], "little")) if data[at : at + 1].isdigit()]
    at = chance.choice(digits)
    return name, {**files, name: data[:at] + str((int(data[at : at + 1]) + 1) % 10).encode() + data[at + 1 :]}


KINDS = (flip, truncate, extend, zero, miss, swap, foreign_step, foreign_run, whole_step, duplicate, edit, header)


def damaged(root, healthy, number, seed):
    """One corruption: what it was, and what the loader says of it. Fails if anything wrong was loaded."""
    chance = random.Random(seed * 1_000_003 + number)
    kind = KINDS[number % len(KINDS)]
    files = healthy["r", NEWEST]
    what, changed = kind(files, healthy, chance)
    folder = root / "checkpoints" / NEWEST
    touched = {name for name in files | changed if files.get(name) != changed.get(name)}
    for name in touched:
        if name in changed:
            (folder / name).write_bytes(changed[name])
        else:
            (folder / name).unlink()
    try:
        found, refused = checkpoints(root).latest()
        told = f"seed {seed}, corruption {number}: {kind.__name__} of {what}"
        harmless = not touched or (touched == {"COMMITTED"} and changed.get("COMMITTED", b"").strip() == files["COMMITTED"])
        step = 2 if harmless else 1
        assert found.step == step, f"{told}: step {found.step} was loaded"
        live = {group: {name: torch.zeros_like(piece.tensor) for name, piece in named.items()} for group, named in state(step).items()}
        fill(found, {group: {name: Piece.whole(tensor) for name, tensor in named.items()} for group, named in live.items()})
        assert all(torch.equal(live[group][name], piece.tensor) for group, named in state(step).items() for name, piece in named.items()), (
            told
        )
        assert found.state == {"at": step}, told
        if not harmless and "COMMITTED" in changed:
            assert len(refused) == 1, told
            assert NEWEST in refused[0], told
        return kind.__name__, harmless
    finally:
        for name in touched:
            if name in files:
                (folder / name).write_bytes(files[name])
            else:
                (folder / name).unlink()


@pytest.mark.parametrize("count", [ORDINARY, pytest.param(LONG, marks=pytest.mark.long)])
def test_no_corruption_is_loaded_in_silence(tmp_path, healthy, count):
    seed = int(os.environ.get("GIGATRAIN_SEED", "9"))
    print(f"seed {seed}")
    for (run, name), files in healthy.items():
        if run == "r":
            folder = tmp_path / "checkpoints" / name
            folder.mkdir(parents=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
    found = [damaged(tmp_path, healthy, number, seed) for number in range(count)]
    harmless = sum(1 for _, nothing in found if nothing)
    assert len({kind for kind, _ in found}) == len(KINDS)
    assert harmless < count / 20  # white space behind a marker; a file that is equal in both
    shutil.rmtree(tmp_path / "checkpoints")
