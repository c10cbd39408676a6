"""Makes the policy of TransformerEngine-FL and Megatron-LM-FL follow the environment, and reports it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import Counter
from typing import Any

from verl_fl_overlay.errors import OverlayError, SettingsError, first_line
from verl_fl_overlay.events import Engine, engine_built, failures, te_operator_ran
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.packages import flagos_builds
from verl_fl_overlay.settings import Settings

logger = logging.getLogger("verl_fl_overlay")

CORE = "transformer_engine.plugin.core"


def asked_for_by(settings: Settings) -> list[str]:
    """Return the variables that ask for TransformerEngine-FL; TE_FL_SKIP_CUDA only says how it is imported."""
    return [name for name in settings.given if name.startswith("TE_FL_") and name != "TE_FL_SKIP_CUDA"]


class TransformerEngineFL(Feature):
    """Acts on every Megatron engine that verl builds."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._told: dict[str, Any] = {}
        self._warned = False
        self._ran: dict[str, Counter[str]] = {}

    def start(self) -> None:
        """Listen for engines and operators.

        Raises:
            OverlayError: VERL_FL_STRICT=1, and TransformerEngine-FL was imported before verl.
        """
        if CORE in sys.modules:
            late = "it was imported before verl, so the overlay cannot mend its operators: import verl first"
            failures.record("TransformerEngine-FL", OverlayError(late))
        self.undo.callback(engine_built.subscribe(self.built))
        self.undo.callback(te_operator_ran.subscribe(self.ran))

    def ran(self, manager: Any, operator: str) -> None:
        """Count the implementation that ran; warn once for each operator if it is not the one that goes first."""
        ran = getattr(manager, "_called_ops", {}).get(operator, "one that TransformerEngine-FL does not tell")
        counts = self._ran.setdefault(operator, Counter())
        counts[ran] += 1
        if counts[ran] > 1:
            return
        first = manager.get_selected_impl_id(operator)
        if ran != first:
            logger.warning(
                "%s of TransformerEngine-FL ran as %s: %s goes first and failed, for the reason that "
                "TransformerEngine-FL logs; TE_FL_PER_OP=%s=%s asks for what runs, TE_FL_STRICT=0 raises instead",
                operator,
                ran,
                first,
                operator,
                f"impl:{ran}",
            )

    def built(self, engine: Engine) -> None:
        """Let TransformerEngine-FL read its policy again, note the result, and warn once if that is not FlagOS.

        By itself it keeps the first policy that it reads; the environment may not have been complete then.
        """
        if engine.backend != "megatron":
            return
        here = flagos_builds()
        if here["Megatron-LM-FL"]:
            self._told["MG_FL_PREFER"] = self.settings["MG_FL_PREFER"] or "the device's vendor"
        if here["TransformerEngine-FL"]:
            self._import()
            core = importlib.import_module(CORE)
            core.reset_global_policy()
            self._told["policy"] = _policy(core.get_policy())
            try:
                self._told["implementations"] = _implementations(core)
            finally:
                self._warn()

    def _import(self) -> None:
        """Import TransformerEngine's layers: Megatron takes its own without a word where that fails.

        Raises:
            SettingsError: it fails, and a variable of TransformerEngine-FL asks for it.
        """
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # whatever a component raises while it is imported
            said = first_line(error)
            told = f"TransformerEngine-FL is installed and cannot be imported ({said}): Megatron would go on without it"
            if asked := asked_for_by(self.settings):
                raise SettingsError(f"{told}; install what is missing, or unset {', '.join(asked)}") from error
            logger.warning("%s", told)

    def _warn(self) -> None:
        prefer = self._told["policy"]["prefer"]
        counted = self._told.get("implementations")
        here = {prefer} if counted is None else {kind.partition(":")[0] for kind in counted}
        given = self.settings.given.get("TE_FL_PREFER")
        asked_for = given is not None and self.settings["TE_FL_PREFER"] == "flagos"
        if self._warned or (asked_for and prefer in here):
            return
        self._warned = True
        if prefer in here:
            logger.warning(
                "a Megatron engine starts with %s, and TransformerEngine-FL takes %s implementations first; "
                "export TE_FL_PREFER=flagos to be sure of those of FlagOS",
                f"TE_FL_PREFER={given}" if given is not None else "TE_FL_PREFER not set",
                prefer,
            )
        else:
            logger.warning(
                "TransformerEngine-FL is to take %s implementations first and has none here: a Megatron engine runs on "
                "%s; FlagOS' need flag_gems and a device that it knows",
                prefer,
                ", ".join(sorted(here)) or "nothing",
            )

    def describe(self) -> dict[str, Any]:
        """Return what is installed, and the policy of the last Megatron engine that was built."""
        module = sys.modules.get("transformer_engine_torch")
        backend = {} if module is None else {"backend": type(module).__name__}
        ran = {"operators that ran": {name: dict(counts) for name, counts in sorted(self._ran.items())}}
        return {**flagos_builds(), **self._told, **backend, **(ran if self._ran else {})}


def _policy(policy: Any) -> dict[str, Any]:
    return {
        "prefer": policy.prefer,
        "allow_vendors": sorted(policy.allow_vendors or ()),
        "deny_vendors": sorted(policy.deny_vendors),
        "per_op": {op: list(order) for op, order in policy.per_op_order},
        "another implementation is tried when one fails": os.environ.get("TE_FL_STRICT", "1") != "0",
    }


def _implementations(core: Any) -> dict[str, int] | None:
    """Return for how many operators each kind has an implementation here: {"flagos": 7, "vendor:CUDA": 109 ...}.

    None if this TransformerEngine-FL does not tell.
    """
    manager = core.get_default_manager() if hasattr(core, "get_default_manager") else None
    snapshot = getattr(getattr(manager, "registry", None), "snapshot", None)
    if manager is None or snapshot is None:
        return None
    manager.ensure_initialized()
    counted: Counter[str] = Counter()
    for implementations in snapshot().impls_by_op.values():
        kinds = {f"{i.kind.value}:{i.vendor}" if i.kind.value == "vendor" else i.kind.value for i in implementations}
        counted.update(kinds)
    return dict(counted)
