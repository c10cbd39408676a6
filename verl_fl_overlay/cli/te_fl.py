"""``parity --te-fl``: may TransformerEngine-FL's implementations be used here?  Each one is compared with fp32."""

from __future__ import annotations

import importlib
from typing import Any

from verl_fl_overlay import activation
from verl_fl_overlay.cli import standard_output, terminal
from verl_fl_overlay.devices.accelerator import accelerator
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.features.te_fl import CORE
from verl_fl_overlay.packages import flagos_builds


def examine() -> list[dict[str, Any]]:
    """Try every implementation, the hooks of the overlay being on; return one row for each use of an operator.

    The implementations of one use stand in the order in which the environment makes TransformerEngine-FL try them, and
    ``runs`` marks the first one that does not fail.  ``of_allowed`` is the distance from fp32 as a part of what is
    allowed, None where the implementation ``failed``.

    Raises:
        OverlayError: TransformerEngine-FL is not installed, or cannot be imported.
    """
    if not flagos_builds()["TransformerEngine-FL"]:
        raise OverlayError("TransformerEngine-FL is not installed: nothing can be compared")
    with standard_output.kept():  # it prints
        return list(_rows())


def _rows() -> Any:
    importlib.import_module("verl")
    activation.activate()
    try:
        types = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
        core = importlib.import_module(CORE)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OverlayError(f"TransformerEngine-FL cannot be imported: {told}") from error
    import torch

    from verl_fl_overlay.kernels.te_operators import trials

    core.reset_global_policy()
    manager = core.get_default_manager()
    manager.ensure_initialized()
    device = torch.accelerator.current_accelerator() if accelerator() else torch.device("cpu")
    for trial in trials(device or torch.device("cpu"), types):
        runs = True
        terminal.progress(f"{trial.operator}, {trial.name} ...")
        for implementation in manager.resolve_candidates(trial.operator):
            row = {"operator": trial.operator, "use": trial.name, "implementation": implementation.impl_id}
            try:
                yield {**row, "runs": runs, "of_allowed": trial.distance(implementation.fn), "failed": ""}
                runs = False
            except Exception as error:  # whatever an implementation raises
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                yield {**row, "runs": False, "of_allowed": None, "failed": said}


def usable(rows: list[dict[str, Any]]) -> bool:
    """Return whether for each use an implementation runs, and is within what is allowed."""
    uses = {(row["operator"], row["use"]) for row in rows}
    right = {(row["operator"], row["use"]) for row in rows if row["runs"] and row["of_allowed"] <= 1}
    return uses == right


def as_text(rows: list[dict[str, Any]], wide: bool = False) -> str:
    """Return the rows as a table with a verdict; * marks what runs."""
    cells = []
    for row in rows:
        wrong = bool(row["failed"]) or row["of_allowed"] > 1
        found = "fails" if row["failed"] else f"{row['of_allowed']:.2f}" + (" WRONG" if wrong else "")
        told = (terminal.Bad if wrong else terminal.Good)(found)
        use = f"{row['operator']}, {row['use']}" + (f": {row['failed']}" if row["failed"] else "")
        cells.append((told, row["implementation"] + "*" * row["runs"], use))
    lines = terminal.table(("of allowed", "implementation", "operator and use"), cells, wide=wide)
    what = "of allowed: the distance from fp32, as a part of what is allowed"
    may = terminal.Good("what runs (*) may be used")
    verdict = may if usable(rows) else terminal.Bad("what runs (*) must NOT be used: choose others with TE_FL_PER_OP")
    return "\n".join([*lines, "", *terminal.sentences([what, verdict], wide=wide)])
