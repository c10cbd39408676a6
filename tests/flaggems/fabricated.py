"""Packages with the names, call places and signatures of FlagGems and verl-hardware-plugin, and bodies of our own.

FlagGems' kernels are the stand-ins on the CPU's key.  What differs between FlagGems' versions is what the overlay asks:
where the registrar lies, what it takes, and what it keeps.
"""

from __future__ import annotations

from pathlib import Path

GEMS = """
import sys

import torch

sys.path.insert(0, {here!r})
import stand_ins

from flag_gems.runtime.{module} import {registrar}

__version__ = {version!r}
vendor_name = {vendor!r}
aten_lib = torch.library.Library("aten", "IMPL")
registrar = {registrar}
current_work_registrar = None
_FULL_CONFIG = tuple((kernel.key, kernel.function) for kernel in stand_ins.KERNELS)
FULL_CONFIG_BY_FUNC = {{kernel.name: [] for kernel in stand_ins.KERNELS}}


def enable(lib=aten_lib, unused=None, registrar=registrar, record=False, once=False, path=None):
    global current_work_registrar
    current_work_registrar = registrar(_FULL_CONFIG, user_exclude_ops=list(unused or ()), lib=lib)


def only_enable(lib=aten_lib, include=None, registrar=registrar, record=False, once=False, path=None):
    global current_work_registrar
    current_work_registrar = registrar(_FULL_CONFIG, user_include_ops=list(include), lib=lib)


class use_gems:
    def __enter__(self):
        self.lib = torch.library.Library("aten", "IMPL")
        enable(lib=self.lib)

    def __exit__(self, *raised):
        global current_work_registrar
        self.lib._destroy()
        del current_work_registrar


def all_registered_keys():
    return current_work_registrar.get_all_keys()
"""

REGISTRAR = """
import logging


class {registrar}:
    def __init__(self, config, user_include_ops=None, user_exclude_ops=None, cpp_patched_ops=None, lib=None):
        self.lib, self.reg_key, self.all_ops, self.all_keys = lib, "CPU", [], []
        if {cambricon}:
            self.torch_ops_map = {{}}
        for key, function in config:
            name = function.__name__
            if name in (user_exclude_ops or ()) or (user_include_ops and name not in user_include_ops):
                continue
            try:
                self.register_impl(key, function)
            except Exception as error:
                logging.warning("Skipped registering operator: %s", error)

    def register_impl(self, key, function, extra_dispatch_keys=()):
        self.all_ops.append(function.__name__)
        self.all_keys.append(key)
        self.lib.impl(key, function, self.reg_key)

    def get_all_ops(self):
        return self.all_ops

    def get_all_keys(self):
        return self.all_keys
"""


VENDORS_OWN = """
import stand_ins
import torch

_mm_aten_lib = torch.library.Library("aten", "IMPL")
_mm_aten_lib.impl("mm", stand_ins.mm, "CPU")
"""


def flag_gems(
    folder: Path,
    version: str = "5.3.4",
    vendor: str = "nvidia",
    *,
    before_five: bool = False,
    at_import: bool = False,
) -> None:
    """Write the package ``flag_gems``; one ``before_five`` has a registrar that takes other arguments.

    ``at_import``: the vendor's part registers a kernel by itself, as those of arm and thead do.
    """
    old = version in ("5.0.0", "5.0.2", "5.3.0")
    names = {"module": "register" if old else "op_registrar", "registrar": "Register" if old else "GeneralOpRegistrar"}
    runtime = folder / "flag_gems" / "runtime"
    runtime.mkdir(parents=True)
    (runtime / "__init__.py").write_text("")
    text = REGISTRAR.format(**names, cambricon=vendor == "cambricon")
    if before_five:
        text = text.replace("user_include_ops=None, user_exclude_ops=None", "user_unused_ops_list=None").replace(
            "name in (user_exclude_ops or ()) or (user_include_ops and name not in user_include_ops)", "False"
        )
    (runtime / f"{names['module']}.py").write_text(text)
    here = str(Path(__file__).parent)
    init = GEMS.format(**names, version=version, vendor=vendor, here=here)
    if at_import:
        (runtime / "vendor.py").write_text(VENDORS_OWN)
        init += "\nfrom flag_gems.runtime import vendor\n"
    (folder / "flag_gems" / "__init__.py").write_text(init)


PLUGIN = {
    "__init__.py": """
from verl_hardware_plugin.engines import register_all_engines

register_all_engines()
""",
    "engines/__init__.py": """
def register_all_engines():
    from verl_hardware_plugin.engines import fsdp_flagos
""",
    "engines/fsdp_flagos.py": """
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
from verl_hardware_plugin.utils import may_enable_flag_gems


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="flagos")
class FSDPFlagOSEngineWithLMHead(FSDPEngineWithLMHead):
    def initialize(self):
        may_enable_flag_gems(phase="training")
        super().initialize()


@EngineRegistry.register(model_type="value_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="flagos")
class FSDPFlagOSEngineWithValueHead(FSDPEngineWithValueHead):
    def initialize(self):
        may_enable_flag_gems(phase="training")
        super().initialize()
""",
    "utils/__init__.py": "from .config_manager import may_enable_flag_gems\n",
    "utils/config_manager.py": """
import os


def may_enable_flag_gems(phase="training"):
    if os.getenv("TRAINING_FL_FLAGGEMS_ENABLE", "").lower() not in ("1", "true"):
        return
    import flag_gems

    white, black = (
        [name for name in os.getenv(f"TRAINING_FL_FLAGOS_{kind}LIST", "").split(",") if name]
        for kind in ("WHITE", "BLACK")
    )
    if white:
        flag_gems.only_enable(include=white, record=True, once=True, path=None)
    elif black:
        flag_gems.enable(unused=black, record=True, once=True, path=None)
    else:
        flag_gems.enable(record=True, once=True, path=None)
""",
}


def hardware_plugin(folder: Path) -> None:
    """Write the package ``verl_hardware_plugin``, whose engines enable FlagGems before they initialise."""
    for name, text in PLUGIN.items():
        file = folder / "verl_hardware_plugin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
