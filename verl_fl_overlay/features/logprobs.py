"""Log-probs of tokens in fp32 where verl has no kernel of its own for them, and entropy in the same pass everywhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from verl_fl_overlay import events
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.settings import Settings

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.logprobs import TokenLogprobs
    from verl_fl_overlay.kernels.tokens import TokenAnswer, TokenQuestion

logger = logging.getLogger("verl_fl_overlay")


class Logprobs(Feature):
    """Computes log-probs and entropy of tokens when verl asks for them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._made: TokenLogprobs | None = None
        self._told: set[str] = set()

    def start(self) -> None:
        """Answer from now on."""
        self.undo.callback(setattr, self, "_made", None)
        self.undo.callback(self._told.clear)
        self.undo.callback(events.token_logprobs.answer(self._compute))

    def describe(self) -> dict[str, Any]:
        """Return what computed so far, as ``TokenLogprobs.used``."""
        return {"kernels": dict(self._made.used) if self._made else {}}

    def _compute(self, asked: TokenQuestion) -> TokenAnswer | None:
        """Return what is asked of the tokens; None where verl computes it itself.

        It does so for a tensor of another class, such as a DTensor, and for log-probs alone if it has flash-attn's or
        torch_npu's kernel for them.
        """
        from torch import Tensor  # not at the top, where it would be imported at load

        if type(asked.logits) is not Tensor:
            return None
        if not (asked.entropy or asked.squares) and asked.verl_computes():
            return None
        for setting in asked.idle:
            if setting not in self._told:
                self._told.add(setting)
                logger.info(
                    "%s has no effect: entropy is computed with the log-probs, without memory of its own", setting
                )
        if self._made is None:
            from verl_fl_overlay.kernels.agreement import Agreement
            from verl_fl_overlay.kernels.logprobs import TokenLogprobs

            self._made = TokenLogprobs(Agreement())
        return self._made(asked)
