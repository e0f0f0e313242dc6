"""Tables, layouts, and kernels without triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gigatrain.errors import KernelError
from gigatrain.kernels import launch


def test_the_nearest_size_is_nearest_in_log_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default.json").write_text('{"found": "here", "configs": {"k": {"64": {"a": 1}, "1024": {"a": 2}}}}')
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch.table.cache_clear()
    launch._nearest.cache_clear()
    found = [launch.configuration(torch.empty(1), "k", size)["a"] for size in (1, 64, 255, 257, 5000, 0)]
    launch.table.cache_clear()
    launch._nearest.cache_clear()
    assert found == [1, 1, 1, 2, 2, 1]


def test_a_device_with_a_table_of_its_own_uses_it_and_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default.json").write_text('{"found": "", "configs": {"k": {"64": {"a": 1}}, "l": {"64": {"a": 3}}}}')
    (tmp_path / "nvidia-h200.json").write_text('{"found": "", "configs": {"k": {"64": {"a": 2}}}}')
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch.table.cache_clear()
    launch._nearest.cache_clear()
    with launch.recorded((launch.slug("NVIDIA H200"), "sm_90"), 132):
        found = [launch.configuration(torch.empty(1), kernel, 64)["a"] for kernel in ("k", "l")]
    launch.table.cache_clear()
    launch._nearest.cache_clear()
    assert found == [2, 3]


def test_rows_are_views_where_the_layout_allows() -> None:
    x = torch.arange(48.0).view(2, 3, 8)
    assert launch.rows(x).data_ptr() == x.data_ptr()
    assert launch.rows(x).shape == (6, 8)
    sliced = torch.arange(96.0).view(6, 16)[:, :8]
    assert launch.rows(sliced).data_ptr() == sliced.data_ptr()
    assert launch.rows(sliced).stride() == (16, 1)
    assert torch.equal(launch.rows(x.mT), x.mT.reshape(-1, 3))
    assert launch.rows(torch.ones(1).expand(4, 8)).stride(-1) == 1
    assert launch.rows(torch.empty(0, 8)).shape == (0, 8)
    assert launch.rows(torch.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(("count", "holds"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (128_256, 131_072)])
def test_a_block_holds_its_elements(count: int, holds: int) -> None:
    assert launch.block(count) == holds


@pytest.mark.parametrize("parts", [1, 7, 40])
def test_partial_sums_are_added_in_fp32_and_rounded_once(parts: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(parts, 133)
    assert torch.equal(launch.column_sum(x, torch.bfloat16), x.double().sum(0).float().bfloat16())


def test_every_kernel_file_is_imported_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from gigatrain.kernels import launch, ops, rms_norm\n"
        "assert not launch.INSTALLED\n"
        "print(rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4)).sum().item())\n"
        "from gigatrain.errors import KernelError\n"
        "try: rms_norm.fused(torch.ones(2, 4), torch.ones(4), 1e-6, 'llama')\n"
        "except KernelError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "8.0" in ended.stdout or "7.99" in ended.stdout
    assert 'triton is not installed: pip install "triton>=3.6"' in ended.stdout


def test_kernels_do_not_run_on_a_cpu_uninterpreted() -> None:
    program = "import torch\nfrom gigatrain.kernels import rms_norm\nprint(rms_norm.supports(torch.ones(2, 4), torch.ones(4)))\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert "Triton kernels need a GPU, not cpu" in ended.stdout


def test_compiled_kernels_stay_on_the_node_and_are_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = launch.cache_on_this_node()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert launch.cache_on_this_node() == folder
    monkeypatch.delenv("TRITON_CACHE_DIR")
    folder.chmod(0o777)
    with pytest.raises(KernelError, match="can be written by others, .* set TRITON_CACHE_DIR"):
        launch.cache_on_this_node()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert launch.cache_on_this_node() == Path("/elsewhere")


def test_an_operator_is_seen_by_whoever_looks_and_else_left_out() -> None:
    """A mode (tracing, fake tensors, selective recomputation) meets the operator; an eager call on plain tensors runs what it stands for."""
    seen: list[str] = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    asked: list[str] = []
    operator = launch.operator("looked_at(Tensor x) -> Tensor", lambda x: asked.append(type(x).__name__) or x + 1, torch.empty_like)
    double = launch.differentiable(operator, lambda ctx, inputs, output: None, lambda ctx, grad: 2 * grad)
    x = torch.ones(3, requires_grad=True)
    double(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert asked == ["Tensor"]
    with Looks():
        double(x)
    assert "gigatrain.looked_at.default" in seen
    plain = x.detach()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
        assert operator(fake).shape == (3,)
    assert operator(fake).shape == (3,)  # the mode is gone, the tensor is still a fake
    assert torch.equal(torch.func.grad(lambda y: double(y).sum())(plain), torch.full((3,), 2.0))
    assert asked == ["Tensor"] * len(asked)
