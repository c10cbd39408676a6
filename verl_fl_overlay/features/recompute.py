"""How many layers of a model recompute their activations in training (VERL_FL_RECOMPUTE)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from verl_fl_overlay import events
from verl_fl_overlay.devices.memory import device_memory
from verl_fl_overlay.errors import SettingsError
from verl_fl_overlay.features.feature import Feature
from verl_fl_overlay.kernels import fsdp1
from verl_fl_overlay.phase import training
from verl_fl_overlay.settings import Settings

if TYPE_CHECKING:
    from verl_fl_overlay.kernels.memory_budget import MemoryBudget
    from verl_fl_overlay.kernels.recompute import Layers

logger = logging.getLogger("verl_fl_overlay")

AUTO = "auto"


class Recompute(Feature):
    """Lets layers of the models that verl trains keep their activations: all of them, all but N, or what memory holds.

    When auto runs out of memory, all layers recompute from then on.  The micro-batch is repeated if it failed in its
    forward, and neither other ranks wait for this one nor FSDP1 keeps the state of that forward.  Else verl gets the
    error; a backward that failed may have added a part of its gradients.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._models: WeakKeyDictionary[Any, Layers] = WeakKeyDictionary()  # a model that verl has dropped is not kept
        self._budgets: WeakKeyDictionary[Any, MemoryBudget] = WeakKeyDictionary()
        self._told: set[str] = set()

    def start(self) -> None:
        """Act on the engines that verl builds from now on."""
        self.undo.callback(self._restore)
        self.undo.callback(events.engine_initialized.subscribe(self._set))
        if self.settings.recompute == AUTO:
            self.undo.callback(training.left.subscribe(self._end_update))
            self.undo.callback(training.failed.subscribe(self._failed))
            self.undo.callback(events.repeats.answer(self._repeats))

    def describe(self) -> dict[str, Any]:
        """Return for each model how many of its layers recompute, and what auto measured."""
        models: dict[str, Any] = {}
        for model, layers in self._models.items():
            name = _name(model)
            while name in models:
                name += "'"
            told = self._budgets[model].describe() if model in self._budgets else {}
            models[name] = {"layers": len(layers), "recompute": len(layers) - layers.kept, **told}
        return {"asked for": self.settings.recompute, "models": models}

    def _set(self, engine: events.Engine) -> None:
        """Set the layers of an engine that verl has just built, if it trains.

        Raises:
            SettingsError: VERL_FL_RECOMPUTE is greater than the number of a model's layers.
        """
        if engine.optimizer is None:
            return
        from verl_fl_overlay.kernels.recompute import Layers  # imports torch, as a process with an engine has

        asked = self.settings.recompute
        for model in (each for each in engine.models if each not in self._models):
            layers, name = Layers(model), _name(model)
            count = len(layers)
            if not count:
                self._tell(
                    f"VERL_FL_RECOMPUTE={asked or 'none'} does nothing in {name} of the engine {engine.backend}: "
                    "none of its layers recomputes by transformers' or torch's checkpointing; Megatron has settings of "
                    "its own"
                )
                continue
            if isinstance(asked, int) and asked > count:
                raise SettingsError(
                    f"VERL_FL_RECOMPUTE={asked}: {name} has {count} layers that can recompute. Allowed is a number "
                    f"from 0 to {count}, all, none, or auto, which takes what fits each model"
                )
            self._models[model] = layers
            if isinstance(asked, int):
                layers.keep(count - asked)
            else:
                self._measure(model, layers, name)

    def _measure(self, model: Any, layers: Layers, name: str) -> None:
        from verl_fl_overlay.kernels.memory_budget import MemoryBudget

        memory = device_memory()
        if memory is None:
            self._tell("VERL_FL_RECOMPUTE=auto: torch does not tell of this device's memory, so all layers recompute")
            return
        budget = self._budgets[model] = MemoryBudget(layers, memory)

        def decide(*given: Any) -> None:
            try:
                budget.decide(*given)
            except Exception as error:
                budget.give_up()
                events.failures.record(f"the memory budget of {name}", error)

        # The first of its hooks: FSDP's then gather what the measurement has to contain.
        self.undo.callback(model.register_forward_pre_hook(decide, prepend=True, with_kwargs=True).remove)

    def _end_update(self) -> None:
        for budget in self._budgets.values():
            budget.end_update()

    def _failed(self, error: BaseException) -> None:
        """Let all layers recompute if verl's step ran out of memory."""
        if _out_of_memory(error) and self._give_up(list(self._budgets)):
            self._tell("VERL_FL_RECOMPUTE=auto ran out of memory in training; all layers recompute from now on")

    def _repeats(self, model: Any, error: BaseException) -> bool:
        """Return whether to repeat a forward that ran out of memory: if layers kept activations, they recompute now."""
        from torch import is_grad_enabled

        from verl_fl_overlay.kernels.memory_budget import ranks

        if not _out_of_memory(error) or not is_grad_enabled() or ranks() > 1 or _in_fsdp1(model):
            return False
        if not self._give_up([model]):
            return False
        self._tell(
            f"VERL_FL_RECOMPUTE=auto ran out of memory in {_name(model)}; the micro-batch is repeated, and all layers "
            "recompute from now on"
        )
        return True

    def _give_up(self, models: list[Any]) -> bool:
        gave_up = [self._budgets[model].give_up() for model in models if model in self._budgets]
        return any(gave_up)  # a list, since all of them have to

    def _tell(self, said: str) -> None:
        if said not in self._told:
            self._told.add(said)
            logger.warning(said)

    def _restore(self) -> None:
        self._give_up(list(self._budgets))
        for layers in self._models.values():
            layers.keep(0)
        self._models.clear()
        self._budgets.clear()


def _out_of_memory(error: BaseException) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _in_fsdp1(model: Any) -> bool:
    return hasattr(model, fsdp1.HOLDS)


def _name(model: Any) -> str:
    """Return the name of a model's class; FSDP1 holds the model inside, FSDP2 puts its name before it."""
    return type(getattr(model, fsdp1.HOLDS, model)).__name__.removeprefix("FSDP")
