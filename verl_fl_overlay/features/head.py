"""Log-probs and entropy without all logits, where VERL_FL_HEAD asks for it or the logits would not fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from verl_fl_overlay import events
from verl_fl_overlay.devices.memory import device_memory
from verl_fl_overlay.errors import HeadError, SettingsError
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.head import ChunkedHead
    from verl_fl_overlay.kernels.logprobs import TokenLogprobs
    from verl_fl_overlay.kernels.tokens import TokenQuestion

logger = logging.getLogger("verl_fl_overlay")

ABLE = "fsdp"
"""The backend whose engine gives the overlay the hidden states."""

ROOM = 2
"""Free memory that is needed for logits, in their own size: the layers' activations come before them."""


class Head(Feature):
    """Decides for each micro-batch whether its logits are made."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._made: tuple[TokenLogprobs, ChunkedHead] | None = None
        self._told: dict[str, str] = {}

    def start(self) -> None:
        """Answer from now on."""
        self.undo.callback(setattr, self, "_made", None)
        self.undo.callback(self._told.clear)
        self.undo.callback(events.head.answer(self._choose))
        if self.settings.head == "chunked":
            self.undo.callback(events.engine_initialized.subscribe(_refuse))

    def describe(self) -> dict[str, Any]:
        """Return what was chosen for which model and why, and what computed so far, as ``TokenLogprobs.used``."""
        return {"models": dict(self._told), "kernels": dict(self._made[0].used) if self._made else {}}

    def _choose(self, model: Any, asked: TokenQuestion, rows: int, bytes_of_one: int) -> bool:
        """Return whether ``model`` is to answer without its logits, and prepare it for that.

        Raises:
            HeadError: VERL_FL_HEAD=chunked, and this model cannot.
        """
        always, name = self.settings.head == "chunked", type(model).__name__.removeprefix("FSDP")
        size = 0 if always else _too_large(model, asked, rows, bytes_of_one)
        if not always and not size:
            return False
        _, heads = self._heads()
        if fault := heads.fault(model):
            if always:
                raise HeadError(f"VERL_FL_HEAD=chunked: {name} cannot: {fault}. VERL_FL_HEAD=auto makes its logits")
            self._tell(
                name,
                f"logits: {fault}",
                f"the logits of a micro-batch of {name} ({size / 1e9:.1f} GB) may not fit, "
                f"and are made all the same: {fault}",
            )
            return False
        why = "VERL_FL_HEAD=chunked" if always else f"its logits, {size / 1e9:.1f} GB, would not fit"
        self._tell(name, f"chunked: {why}", f"{name} computes a part of its logits at a time: {why}")
        heads.prepare(model)
        return True

    def _heads(self) -> tuple[TokenLogprobs, ChunkedHead]:
        if self._made is None:
            from verl_fl_overlay.kernels.agreement import Agreement
            from verl_fl_overlay.kernels.head import ChunkedHead
            from verl_fl_overlay.kernels.logprobs import TokenLogprobs

            tokens = TokenLogprobs(Agreement())
            self._made = tokens, ChunkedHead(tokens, required=self.settings.head == "chunked")
        return self._made

    def _tell(self, name: str, choice: str, said: str) -> None:
        if name not in self._told:
            logger.warning("%s", said)
            self._told[name] = choice


def _refuse(engine: events.Engine) -> None:
    """Raise if the engine makes logits whatever the overlay does."""
    if engine.backend != ABLE or engine.legacy:
        which = f"legacy {engine.backend} worker" if engine.legacy else f"{engine.backend} engine"
        raise SettingsError(
            f"VERL_FL_HEAD=chunked: verl's {which} makes all logits, and only its {ABLE} engine can go without; set "
            "VERL_FL_HEAD=auto"
        )


def _too_large(model: Any, asked: TokenQuestion, rows: int, bytes_of_one: int) -> float:
    """Return the bytes of the logits of so many rows if they may not fit on the device, else 0."""
    memory = device_memory()
    if memory is None or asked.labels.device.type == "cpu":
        return 0
    size = float(rows * model.config.get_text_config().vocab_size * bytes_of_one)
    return size if ROOM * size > memory.available() else 0
