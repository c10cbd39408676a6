"""Log-probabilities of tokens in fp32, where verl has no kernel of its own for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from verl_fl_overlay import events
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.logprobs import TokenLogprobs


class Logprobs(Feature):
    """Computes the log-probs of tokens when verl asks for them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._made: TokenLogprobs | None = None

    def start(self) -> None:
        """Answer from now on."""
        self.undo.callback(setattr, self, "_made", None)
        self.undo.callback(events.token_logprobs.answer(self._compute))

    def describe(self) -> dict[str, Any]:
        """Return what computed so far, as ``TokenLogprobs.used``."""
        return {"kernels": dict(self._made.used) if self._made else {}}

    def _compute(self, logits: Any, labels: Any, in_place: bool, verl_has_a_kernel: Callable[[], bool]) -> Any:
        """Return the log-probs; None where verl computes them itself.

        It does so if it has flash-attn's or torch_npu's kernel, and for a tensor of another class, such as a DTensor.
        """
        from torch import Tensor  # not at the top, where it would be imported at load

        if type(logits) is not Tensor or verl_has_a_kernel():
            return None
        if self._made is None:
            from verl_fl_overlay.kernels.agreement import Agreement
            from verl_fl_overlay.kernels.logprobs import TokenLogprobs

            self._made = TokenLogprobs(Agreement())
        return self._made(logits, labels, in_place=in_place)
