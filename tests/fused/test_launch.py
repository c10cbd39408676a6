"""A kernel is launched on its tensors' device, which is made the current one only where it is not."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from verl_fl_overlay.kernels.launch import launch  # noqa: E402


class Accelerator:
    """What ``torch.cuda`` is to CUDA, for a chip with two devices of which the first is current."""

    def __init__(self) -> None:
        self.current = 0
        self.changes = 0

    def current_device(self) -> int:
        return self.current

    @contextmanager
    def device(self, device):
        before, self.current, self.changes = self.current, device.index, self.changes + 1
        try:
            yield
        finally:
            self.current = before


class Kernel:
    """Says on which device it was launched, and with what."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((self.accelerator.current, grid, args[1:], kwargs))


@pytest.mark.parametrize(("index", "changes"), [(0, 0), (1, 1)])
def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch, index, changes):
    accelerator = Accelerator()
    monkeypatch.setattr(torch, "chip", accelerator, raising=False)
    kernel = Kernel(accelerator)
    launch(kernel, (3,), SimpleNamespace(device=SimpleNamespace(type="chip", index=index)), 7, BLOCK=64)
    assert kernel.launched == [(index, (3,), (7,), {"BLOCK": 64})]
    assert (accelerator.current, accelerator.changes) == (0, changes)
