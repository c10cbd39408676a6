"""Where flash-attn, or the NPU's kernel, is there, verl's own functions are called; elsewhere the overlay's."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

from verl.utils import torch_functional  # noqa: E402

from verl_fl_overlay.compat.flash_attn import padding_hook, value_model_hook  # noqa: E402
from verl_fl_overlay.compat.token_logprobs import logprobs_hook  # noqa: E402
from verl_fl_overlay.features.logprobs import Logprobs  # noqa: E402
from verl_fl_overlay.packages import flash_attn_imports  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402


@pytest.mark.parametrize(
    ("flash_attn", "npu", "disabled", "computed_by"),
    [
        (False, False, "0", "ours"),
        (True, False, "0", "verl"),
        (False, True, "0", "verl"),
        (True, False, "1", "ours"),
        (True, True, "1", "verl"),
    ],
)
def test_log_probs(flash_attn, npu, disabled, computed_by, monkeypatch):
    if disabled == "1" and "VERL_DISABLE_FLASH_ATTN_CE" not in torch_functional.logprobs_from_logits.__code__.co_consts:
        pytest.skip("this verl does not read VERL_DISABLE_FLASH_ATTN_CE")
    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", flash_attn)
    monkeypatch.setattr(torch_functional, "NPU_CROSS_ENTROPY_LOSS_AVAILABLE", npu)
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", disabled)
    asked = []
    logits, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    wrapper, feature = logprobs_hook("fsdp").wrapper, Logprobs(Settings())
    feature.start()
    found = wrapper(lambda *args: asked.append(args) or "verl's", None, (logits, labels, True), {})
    feature.stop()
    if computed_by == "verl":
        assert found == "verl's"
        assert asked == [(logits, labels, True)]
    else:
        assert not asked
        torch.testing.assert_close(found, logits.log_softmax(-1)[range(3), labels])


@pytest.fixture
def flash_attn(monkeypatch):
    """A package of the name, with the module whose import says that it is there."""
    for name in ("flash_attn", "flash_attn.bert_padding"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    flash_attn_imports.cache_clear()
    yield
    flash_attn_imports.cache_clear()


@pytest.mark.parametrize("hook", [padding_hook(), value_model_hook()], ids=lambda hook: hook.name)
def test_padding_and_value_models(flash_attn, hook):
    assert hook.wrapper(lambda *args, **kwargs: (args, kwargs), None, (1,), {"a": 2}) == ((1,), {"a": 2})
