"""Attention where flash-attn is missing, and the trial that a model keeps packed sequences apart."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from verl_fl_overlay import events
from verl_fl_overlay.devices.accelerator import accelerator
from verl_fl_overlay.errors import OverlayError, PackingError
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.packages import flash_attn_imports, installed
from verl_fl_overlay.settings import Settings

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.attention import PackedAttention
    from verl_fl_overlay.kernels.sequences import PackedModel

PACKAGE = "flash_attn"


class Attention(Feature):
    """Attends when transformers or Megatron asks for it, and tries each model that is given packed sequences."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._made: PackedAttention | None = None
        self._tried: dict[str, str] = {}
        self._sound: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # a model that verl has dropped is not kept

    def start(self) -> None:
        """Answer from now on."""
        self.undo.callback(setattr, self, "_made", None)
        self.undo.callback(self._tried.clear)
        self.undo.callback(self._sound.clear)
        self.undo.callback(events.packed_attention.answer(self._attend))
        self.undo.callback(events.packed_model.answer(self._try))

    def describe(self) -> dict[str, Any]:
        """Return whose functions flash_attention_2 has, which backend computed what, and which models were tried."""
        used = dict(self._made.used) if self._made else {}
        return {"flash_attention_2": _whose(), "backends": used, "packed models": dict(self._tried)}

    def rehearse(self) -> None:
        """Attend once on small data, as most models of today do, so that ``describe`` tells the backend."""
        if not installed("torch"):
            return
        import torch

        from verl_fl_overlay.kernels.sequences import Form, Sequences

        module = None if self.settings.device == "cpu" else accelerator()
        device = torch.device("cpu") if module is None else torch.device(torch.accelerator.current_accelerator())
        query, key = (torch.zeros(16, heads, 128, dtype=torch.bfloat16, device=device) for heads in (4, 2))
        ends = torch.tensor([0, 16], dtype=torch.int32, device=device)
        self._attend(query, key, key, Sequences(ends, ends, 16, 16), Form(scale=0.1))

    def _attend(self, *given: Any) -> Any:
        if self._made is None:
            from verl_fl_overlay.kernels.agreement import Agreement
            from verl_fl_overlay.kernels.attention import PackedAttention

            self._made = PackedAttention(Agreement())
        return self._made(*given)

    def _try(self, packed: PackedModel) -> None:
        """Raise if the model does not keep packed sequences apart; a model is tried once for each attention.

        Raises:
            PackingError: it mixes them, or cuts them, or could not be tried; names the model, the setting and the way
                out.
        """
        from verl_fl_overlay.kernels.packing import NoOutputError, fault

        if self._sound.get(packed.model) == packed.attention:
            return
        name = f"{type(packed.model).__name__.removeprefix('FSDP')}, {packed.attention}"
        try:
            found = fault(packed)
        except OverlayError:
            raise
        except NoOutputError as error:
            self._tried[name] = f"not tried yet: {error}"
            return
        except Exception as error:  # whatever the model raises on a few tokens of text
            found = f"could not be tried on packed sequences: {type(error).__name__}: {' '.join(str(error).split())}"
            self._tried[name] = found
            if not packed.told:
                raise PackingError(_refusal(name, found, packed.attention)) from error
            events.failures.record(f"the trial of packed sequences in {name}", error)
        else:
            self._tried[name] = found or "keeps them apart"
            if found:
                raise PackingError(_refusal(name, found, packed.attention))
        self._sound[packed.model] = packed.attention


def _refusal(name: str, found: str, attention: str) -> str:
    default = "" if "flash" in attention else "attn_implementation=flash_attention_2 in the model's override_config; "
    return (
        f"{name} {found}. Its numbers would be wrong. Ways on: {default}the package that its other layers take packed "
        "sequences with (Qwen3-Next and Qwen3.5: flash-linear-attention and causal-conv1d); or no packing, with "
        "use_remove_padding=False of actor_rollout_ref.model and critic.model"
    )


def _whose() -> str:
    if installed("torch_npu"):
        return "torch_npu's functions"
    if not installed(PACKAGE):
        return f"the overlay's functions: {PACKAGE} is not installed"
    if "torch" in sys.modules and not flash_attn_imports():
        return f"the overlay's functions: {PACKAGE} is installed and cannot be imported"
    return f"{PACKAGE}'s functions"
