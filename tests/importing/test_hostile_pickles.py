"""What a foreign file may not do: run anything, reach anything, or swell. A canary file says whether something ran."""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from gigatrain.errors import CheckpointError
from gigatrain.importing import archive, opcodes, sandbox, sources


class Calls:
    """A pickle that calls `function` of `arguments` when it is loaded."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def zipped(path, data, others=(), name="archive/data.pkl", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, data)
        for other, content in others:
            file.writestr(other, content)
    return path


def payloads(canary):
    """By name: what it says is refused, and the pickle's bytes."""
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w')"
    old = f"cos\nsystem\n(S'{touch}'\ntR.".encode()
    yield "posix.system", pickle.dumps(Calls(os.system, touch))
    yield "builtins.eval", pickle.dumps(Calls(eval, write))
    yield "__builtin__.eval", pickle.dumps(Calls(eval, write), protocol=2)
    yield "builtins.exec", pickle.dumps({"model": [Calls(exec, write)]})
    yield "subprocess.Popen", pickle.dumps(Calls(subprocess.Popen, ["touch", str(canary)]))
    yield "builtins.getattr", b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93."
    yield "os.system", old
    yield "torch.serialization.load", b"\x80\x02ctorch.serialization\nload\n(X\x01\x00\x00\x00xtR."
    yield "torch._utils._rebuild_wrapper_subclass", b"\x80\x02ctorch._utils\n_rebuild_wrapper_subclass\n)R."
    yield "posix.system", b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n)}tR."
    yield "torch.hub.load", b"\x80\x02ctorch.hub\nload\n)R."
    yield "numpy.load", b"\x80\x02cnumpy\nload\n)R."
    yield "the instruction STRING", f"(S'{touch}'\nios\nsystem\n.".encode()
    yield "the instruction INST", b"(ios\nsystem\n."
    yield "the instruction EXT1", b"\x80\x02\x82\x01."
    yield "the instruction NEWOBJ_EX", b"\x80\x04)}\x92."
    yield "a call of", b"\x80\x02X\x01\x00\x00\x00x)R."
    yield "no pickle that can be read", b"\x80\x02(((((((."
    yield "no pickle that can be read", b"\x80\x04\x8c\x03abc"
    yield "no pickle that can be read", b"\x80\x02h\x63."
    yield "no pickle that can be read", b"\x80\x02]q\x00(h\x00h\x00.garbage"


def named(tmp_path):
    return [(said, data) for said, data in payloads(tmp_path / "canary")]


@pytest.mark.parametrize("at", range(21))
def test_nothing_that_a_pickle_names_runs(tmp_path, at):
    canary = tmp_path / "canary"
    said, data = named(tmp_path)[at]
    said = said.replace("os.system", "(os|posix).system") if said == "os.system" else said
    files = {
        "archive": lambda: archive.opened(zipped(tmp_path / "x.pt", data)),
        "metadata": lambda: archive.plain(data, "x"),
    }
    for kind, opened in files.items():
        with pytest.raises(CheckpointError, match=said):
            opened()
        assert not canary.exists(), kind
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(data)
    for source in (folder, tmp_path / "x.pt"):
        with pytest.raises(CheckpointError):
            sources.found(source)
    (tmp_path / "bare.bin").write_bytes(data)  # as torch.save wrote before 1.6
    with pytest.raises(CheckpointError, match="no archive of torch.save"):
        sources.found(tmp_path / "bare.bin")
    assert not canary.exists()


def test_the_payloads_would_run(tmp_path):
    """So that the test above can fail: Python's own machine is fooled by them."""
    canary = tmp_path / "canary"
    for said, data in list(payloads(canary))[:2]:
        pickle.loads(data)  # noqa: S301
        assert canary.exists(), said
        canary.unlink()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_a_memo_that_doubles_costs_nothing():
    """2^64 lists by name, 64 in memory; where it is walked, it is not walked into."""
    data = b"\x80\x02]q\x00" + b"".join(b"]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(64)) + b"."
    with pytest.raises(CheckpointError, match="where it says"):
        opcodes.read(data, opcodes.Known(), "x")
    bomb = b"\x80\x02]q\x00" + b"".join(b"0]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(64)) + b"."
    with pytest.raises(CheckpointError, match="the instruction POP"):
        opcodes.read(bomb, opcodes.Known(), "x")
    nested: list = []
    for _ in range(64):
        nested = [nested, nested]
    file = zipped(Path("/dev/shm") / f"bomb-{os.getpid()}.pt", pickle.dumps({"model": nested, "w": 3}))
    try:
        with pytest.raises(CheckpointError, match="no dict of tensors"):
            sources.found(file)
    finally:
        file.unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.replace(b"K\x06", b"K\xff"), "less than its 255 elements"),
        (lambda s: s.replace(b"K\x02K\x03\x86", b"K\x02K\x63\x86"), "beyond its storage"),
        (lambda s: s.replace(b"K\x03K\x01\x86", b"K\x63K\x01\x86"), "beyond its storage"),
        (lambda s: s.replace(b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"), "no shape"),
        (lambda s: s.replace(b"FloatStorage", b"DoubleStorage"), "less than its 6 elements"),
        (lambda s: s.replace(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x009q"), "a storage that it does not hold"),
    ],
)
def test_a_tensor_reads_nothing_but_its_own_storage(tmp_path, change, said):
    data = zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(6.0).view(2, 3)}))).read("archive/data.pkl")
    assert change(data) != data
    good = zipped(tmp_path / "good.pt", data, [("archive/data/0", torch.arange(6.0).numpy().tobytes())])
    assert torch.equal(archive.opened(good)["w"].rows(1, 2), torch.tensor([[3.0, 4.0, 5.0]]))
    with pytest.raises(CheckpointError, match=said):
        archive.opened(zipped(tmp_path / "x.pt", change(data), [("archive/data/0", torch.arange(6.0).numpy().tobytes())]))


def test_archives_that_swell_are_refused(tmp_path):
    data = zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(6.0)}))).read("archive/data.pkl")
    with pytest.raises(CheckpointError, match="is compressed"):
        archive.opened(zipped(tmp_path / "x.pt", data, [("archive/data/0", bytes(1 << 22))], compression=zipfile.ZIP_DEFLATED))
    inner = zipped(tmp_path / "inner.pt", data).read_bytes()
    with pytest.raises(CheckpointError, match="no data.pkl"):
        archive.opened(zipped(tmp_path / "y.pt", inner, name="archive/data/0"))
    huge = saved({"w": torch.zeros(1).expand(1 << 40)})
    (tmp_path / "z.pt").write_bytes(huge)
    with pytest.raises(CheckpointError, match="beyond its storage of 1 elements"):
        archive.opened(tmp_path / "z.pt")


def test_whatever_is_flipped_is_read_or_refused(tmp_path):
    """Never another error, never a tensor of another file's bytes. The seed is fixed."""
    whole = saved({"model": {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, "step": 3})
    generator = torch.Generator().manual_seed(5)
    path, refused = tmp_path / "x.pt", 0
    for at in torch.randint(len(whole), (400,), generator=generator).tolist():
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        try:
            for tensor in sources.found(path).weights.values():
                tensor.rows(0, tensor.shape[0] if tensor.shape else 1)
        except CheckpointError:
            refused += 1
    assert refused > 40


_TRY = """
import json, os, socket, sys
from pathlib import Path
sys.path.insert(0, {package!r})
from gigatrain.importing.sandbox import lock
walls = lock([Path({source!r})], [Path({folder!r})])
def tried(function):
    try:
        function()
        return "done"
    except Exception as failure:
        return type(failure).__name__
secret = Path({secret!r})
print(json.dumps(dict(
    walls=walls,
    inside=tried(lambda: Path({folder!r}, "x").write_text("x")),
    source=tried(lambda: Path({source!r}, "f").read_text()),
    outside=tried(lambda: secret.with_name("canary").write_text("x")),
    change=tried(lambda: Path({source!r}, "f").write_text("x")),
    secret=tried(secret.read_text),
    network=tried(lambda: socket.create_connection(("127.0.0.1", {port}), 2)),
    program=tried(lambda: os.execv("/bin/true", ["true"])),
    child=tried(os.fork) if "--fork" in sys.argv else "",
    signal=tried(lambda: os.kill({pid}, 0)),
)))
"""


def test_the_walls_stand(tmp_path):
    """In the locked process itself: what a payload that ran after all would reach."""
    for name in ("source", "folder", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "f").write_text("read me")
    (tmp_path / "home" / "secret").write_text("hf_secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        values = {
            "package": str(Path(sandbox.__file__).parents[2]),
            "source": str(tmp_path / "source"),
            "folder": str(tmp_path / "folder"),
            "secret": str(tmp_path / "home" / "secret"),
            "port": server.getsockname()[1],
            "pid": os.getpid(),
        }
        ended = subprocess.run([sys.executable, "-I", "-c", _TRY.format(**values)], capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout)
    walls = found.pop("walls")
    if not all(walls.values()):
        pytest.skip(f"this kernel gives only {walls}")
    assert (found.pop("inside"), found.pop("source"), found.pop("child")) == ("done", "done", "")
    assert found == dict.fromkeys(("outside", "change", "secret", "network", "program", "signal"), "PermissionError")
    assert not (tmp_path / "home" / "canary").exists()


def test_the_locked_process_inherits_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = {}
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: seen.update(more) or subprocess.CompletedProcess(command, 0, '{"done": {}}', "")
    )
    assert sandbox.run({}, tmp_path, tmp_path) == {}
    assert seen["env"].keys() == {"PATH", "LANG", "HOME", "TMPDIR", "OMP_NUM_THREADS"}


def test_zip_offsets_are_those_of_the_part(tmp_path):
    """An archive within a file, as DCP keeps them: no byte before or behind it is read."""
    inner = saved(torch.arange(5.0))
    (tmp_path / "x").write_bytes(b"\xff" * 100 + inner + b"\xff" * 100)
    assert torch.equal(archive.opened(tmp_path / "x", 100, len(inner)).rows(1, 3), torch.tensor([1.0, 2.0]))
    for at, length in ((99, len(inner)), (100, len(inner) + 5000), (-1, 5), (100, len(inner) - 30)):
        with pytest.raises(CheckpointError):
            archive.opened(tmp_path / "x", at, length)
    assert struct.calcsize("<HH") == 4
