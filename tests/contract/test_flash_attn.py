"""Where flash-attn, or the NPU's kernel, is there, verl's own functions are called; elsewhere the overlay's."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

from verl.utils import torch_functional  # noqa: E402

from verl_fl_overlay.compat import transformers_attention  # noqa: E402
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


class Model:
    """As much of a transformers model as the hooks look at."""

    _supports_flash_attn = True


def asked(wrapper, what="flash_attention_2", model=Model):
    return wrapper(lambda *args, **kwargs: "theirs", model(), (what,), {})


SEAMS = [hook for hook in transformers_attention.hooks() if hook.name != "attention.available"]


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Let transformers load no functions, since the hook on that is not on here."""
    name = f"{transformers_attention.FUNCTIONS}.lazy_import_flash_attention"
    monkeypatch.setattr(name, lambda *args, **kwargs: None)


@pytest.fixture(params=SEAMS, ids=lambda hook: hook.name)
def wrapper(request):
    return request.param.wrapper


@pytest.mark.parametrize("there", ["is_flash_attn_2_available", "is_torch_npu_available", "is_torch_xpu_available"])
def test_functions_of_others_stay(wrapper, there, flash_attn, monkeypatch):
    monkeypatch.setattr(f"transformers.utils.{there}", lambda: True)
    assert asked(wrapper) == "theirs"


def test_a_flash_attn_that_cannot_be_imported_is_none(wrapper, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(transformers_attention, "flash_attn_imports", lambda: False)
    assert asked(wrapper) != "theirs"


@pytest.mark.parametrize("what", ["sdpa", "eager", "flash_attention_3", "kernels-community/flash-attn2", None])
def test_any_other_attention_is_transformers_own_matter(wrapper, what):
    assert asked(wrapper, what) == "theirs"


def test_a_model_that_cannot_do_it_is_left_to_transformers():
    (dispatch,) = (hook for hook in SEAMS if hook.name == "attention.dispatch")
    assert asked(dispatch.wrapper, model=type("Bloom", (), {"_supports_flash_attn": False})) == "theirs"
    assert asked(dispatch.wrapper, model=type("Old", (), {"_supports_flash_attn_2": True})) == "flash_attention_2"
