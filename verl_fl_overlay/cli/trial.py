"""One step of verl's engine in a process of its own, with the overlay and without: what parity and warmup run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.cli.attempt import one_line
from verl_fl_overlay.compat.trial import Trial
from verl_fl_overlay.devices import chips
from verl_fl_overlay.devices.accelerator import accelerator
from verl_fl_overlay.errors import OverlayError
from verl_fl_overlay.settings import Settings
from verl_fl_overlay.settings.loading import LOADED_BY, OVERLAY, modules
from verl_fl_overlay.settings.variables import names

PROGRAM = Path(compat.__file__).parent / "trial.py"
PLUGINS = "VERL_USE_EXTERNAL_PLUGINS"


class TrialError(OverlayError):
    """A run of the engine failed; holds the last error that it printed, and where the rest is."""


def native_environment() -> dict[str, str]:
    """Return the environment without the overlay, or with only the part of it that verl needs to run at all.

    verl needs that part on a CPU and on a chip that it does not know.  Other modules that verl loads stay, so that they
    act on both sides.  If no plugin is named, all plugins are off, since otherwise verl would load the overlay's.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VERL_FL_", "TRAINING_FL", "USE_FLAG")) and name not in ("RANK", "WORLD_SIZE")
    }
    others = ",".join(name for name in modules(os.environ) if name != OVERLAY)
    plugins = ",".join(name for name in names(os.environ.get(PLUGINS, "")) if name != OVERLAY)
    settings, _ = Settings.parse()
    if chips.without_platform(settings) is None:
        return {**kept, LOADED_BY: others, PLUGINS: plugins if plugins not in ("", "auto") else "none"}
    found = compat.find_verl()
    hooks = compat.select(found).hooks if found else ()
    kept.pop(PLUGINS, None)
    return {
        **kept,
        LOADED_BY: ",".join(filter(None, (OVERLAY, others))),
        "VERL_FL_DEVICE": settings.device,
        "VERL_FL_FUSED": "0",
        "VERL_FL_DISABLE": ",".join(hook.name for hook in hooks if hook.feature == "logprobs"),
    }


def overlay_environment() -> dict[str, str]:
    """Return this process's environment, with the overlay named in it."""
    return {**os.environ, LOADED_BY: os.environ.get(LOADED_BY, OVERLAY)}


def has_accelerator(settings: Settings) -> bool:
    """Return whether torch sees the chip here; a vendor's package that torch does not load by itself is imported."""
    chip, _ = chips.chosen(settings)
    return chips.is_available(chip) if chip else accelerator() is not None


def run_trial(trial: Trial, environment: dict[str, str]) -> dict[str, Any]:
    """Run ``trial`` in a process of its own; return what ``compat/trial.py`` saved.

    Raises:
        TrialError: the process failed.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        numbers = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(trial).items() if name != "model"]
        # runpy does not put the file's folder on the search path, where flash_attn.py would hide flash-attn.
        program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", program, str(PROGRAM), trial.model, str(result), *numbers],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not result.exists():
            raise TrialError(_why_failed(done))
        loaded: dict[str, Any] = torch.load(result, weights_only=True)
        return loaded


def _why_failed(done: subprocess.CompletedProcess[str]) -> str:
    """Return in a line what the process said last, and keep all that it said in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="verl-fl-", suffix=".log", encoding="utf-8", delete=False) as log:
        log.write(done.stdout + done.stderr)
    errors = re.findall(r"^[\w.]+(?:Error|Exception|Exit|Interrupt)\b.*", done.stderr, re.MULTILINE)
    said = errors or done.stderr.strip().splitlines()
    how = f"exit status {done.returncode}" if done.returncode >= 0 else signal.Signals(-done.returncode).name
    how += " (the machine may be short of memory)" if done.returncode == -signal.SIGKILL else ""
    why = f": {one_line(said[-1])}" if said else ""
    return f"the engine failed, {how}{why}. All that it printed is in {log.name}"


def run_with_overlay(trial: Trial) -> dict[str, Any]:
    """Run ``trial`` in this process's environment.

    Raises:
        TrialError: it failed, or ran without the overlay.
    """
    result = run_trial(trial, overlay_environment())
    if not result["overlay"]:
        raise TrialError(f"the overlay was not loaded: {LOADED_BY} has to name {OVERLAY}")
    return result


def kernels_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the descriptions of the features that compute, after a trial: which kernels they used, or why none."""
    told = result["overlay"]["features"]
    return {
        name: told[name].get("detail", {})
        for name in ("attention", "logprobs", "fused", "flaggems")
        if told[name]["on"]
    }
