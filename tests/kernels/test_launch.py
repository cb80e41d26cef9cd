"""Launching: the device of the tensors is the current one, and nothing is launched past that."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mla.kernels import launch

KERNELS = Path(launch.__file__).parent


class Recorder:
    """Stands for a kernel and for the current device of torch."""

    def __init__(self) -> None:
        self.current = 0
        self.calls: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append(
            (self.current, grid, arguments, constants)
        )

    @contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0), ("cpu", 0)])
def test_a_kernel_runs_on_the_device_of_its_tensors(name, index, monkeypatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: recorder.current)
    monkeypatch.setattr(torch.cuda, "device", recorder.device)
    launch.run(recorder, (2, 3), torch.device(name), "a", 5, C=16)
    assert recorder.calls == [(index, (2, 3), ("a", 5), {"C": 16})]
    assert recorder.current == 0


def is_launch(node: ast.AST) -> bool:
    """``kernel[grid](..)``; a list of parts that is called has no such form here."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def test_every_kernel_is_launched_in_one_place() -> None:
    found = {
        path.name
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_launch(node)
    }
    assert found == {"launch.py"}


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_decode_on_the_second_device_while_the_first_is_current() -> None:
    from test_triton_cuda import full_view, step
    from torch.utils import _pytree as pytree

    from mla.codec import PlainCodec
    from mla.ops import mla_decode

    def moved(tree, device: str):
        return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)

    view, (_, _, *queries) = full_view(PlainCodec()), step(full_view(PlainCodec()), seed=0)
    found = [
        mla_decode(*moved(queries, device), moved(view, device), scale=0.1, impl="triton")
        for device in ("cuda:0", "cuda:1")
    ]
    assert torch.equal(found[0].out.cpu(), found[1].out.cpu())
    assert torch.cuda.current_device() == 0
