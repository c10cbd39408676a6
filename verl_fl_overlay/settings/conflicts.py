"""Rules between variables, and between the components that read them: where the stack would not do what a user means.

A contradiction is an error at any time.  A conflict is a setting that a component ignores, reads another way than its
neighbour, or that its own documents describe wrongly: a warning, and an error under ``VERL_FL_STRICT=1``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from verl_fl_overlay.errors import nearest
from verl_fl_overlay.packages import installed
from verl_fl_overlay.settings.loading import LOADED_BY, modules
from verl_fl_overlay.settings.stack import PREFER, REPLACED_LISTS
from verl_fl_overlay.settings.table import EXCLUSIVE, TABLE, Settings

Rule = Callable[[Settings], Iterator[str]]


ROLLOUTS_LIBRARY = "build/lib/libflagcx.so"
FLAGCX_LIBRARIES = ("lib/libflagcx.so", ROLLOUTS_LIBRARY, "libflagcx.so")
"""Where FlagCX's library may lie in FLAGCX_PATH: installed, built, or beside the torch plugin (``pip install``)."""


class Remark(str):
    """A conflict that is only a warning, under VERL_FL_STRICT=1 too.

    Either no other value avoids it, and an error would leave no way to set the variable; or training does as it is
    told, and only rollout, which says so in its own log, does not.
    """


def conflicts(settings: Settings) -> list[str]:
    """Return what does not do what it says, each with the variable, its value, why, and what to do."""
    return [finding for rule in RULES for finding in rule(settings)]


def _spelling(settings: Settings) -> Iterator[str]:
    """Yield a conflict for each true value that its component takes for false."""
    for name, text in settings.given.items():
        variable = TABLE[name]
        if not variable.truths or settings[name] is not True:
            continue
        if text.lower() not in variable.truths:
            yield (
                f"{name}={text!r} is on for verl-fl-overlay and off for {variable.component}, which takes only "
                f"{' and '.join(variable.truths)} for on; write {name}=1"
            )


def _rollout_without_flaggems(settings: Settings) -> Iterator[str]:
    prefer = settings["VLLM_FL_PREFER"]
    if prefer == PREFER[0] or settings["USE_FLAGGEMS"] is False:
        return
    yield (
        f"VLLM_FL_PREFER={prefer} also switches all of FlagGems off in rollout, whatever USE_FLAGGEMS says; "
        "to choose for the dispatched operators alone, set prefer in the file of VLLM_FL_CONFIG"
    )


def _training_lists(settings: Settings) -> Iterator[str]:
    for name in EXCLUSIVE[0]:
        if settings[name] and not settings.flaggems_in_training:
            yield (
                f"{name} has no effect: training uses FlagGems only with TRAINING_FL_FLAGGEMS_ENABLE=1 or "
                "USE_FLAGGEMS=1"
            )


def _two_enablers(settings: Settings) -> Iterator[str]:
    asked = settings.given.get("TRAINING_FL_FLAGGEMS_ENABLE", "").lower() in ("1", "true")
    if asked and settings["VERL_ENGINE_VENDOR"] == "flagos" and installed("verl_hardware_plugin"):
        yield (
            "VERL_ENGINE_VENDOR=flagos with TRAINING_FL_FLAGGEMS_ENABLE=1: the engines of verl-hardware-plugin enable "
            "FlagGems for the whole process, also the operators that cut gradients, and nobody can take them back; "
            "unset VERL_ENGINE_VENDOR, and the overlay alone routes FlagGems"
        )


def _flagcx(settings: Settings) -> Iterator[str]:
    folder, asked = settings["FLAGCX_PATH"], settings["USE_FLAGCX"]
    if asked and "FLAGCX_PATH" not in settings.given:
        yield Remark(
            "USE_FLAGCX is on without FLAGCX_PATH: training uses FlagCX if its torch plugin is installed, rollout "
            "(vllm-plugin-FL) goes by FLAGCX_PATH and does not; export FLAGCX_PATH=<the directory FlagCX was built in>"
        )
    if "FLAGCX_PATH" in settings.given and not asked:
        yield (
            f"FLAGCX_PATH={folder!r} is set without USE_FLAGCX: rollout (vllm-plugin-FL) uses FlagCX, training (verl) "
            "does not; export USE_FLAGCX=1, or unset FLAGCX_PATH"
        )
    if not asked and "flagcx" in sys.modules:
        yield Remark(
            "torch loaded FlagCX's plugin when it was imported, and USE_FLAGCX is not on: the plugin replaces "
            "torch.distributed.batch_isend_irecv for all backends, and gloo's then fails; export "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )
    holds = [place for place in FLAGCX_LIBRARIES if os.path.isfile(os.path.join(folder, place))]
    if folder and not os.path.isdir(folder):
        yield f"FLAGCX_PATH={folder!r} does not exist on this machine"
    elif folder and not holds:
        yield f"FLAGCX_PATH={folder!r} holds none of {', '.join(FLAGCX_LIBRARIES)}; build FlagCX there"
    elif folder and ROLLOUTS_LIBRARY not in holds:
        yield Remark(
            f"FLAGCX_PATH={folder!r} holds no {ROLLOUTS_LIBRARY}, the only place where rollout (vllm-plugin-FL) "
            f"looks, and goes on without FlagCX's communicator when it is not there; training uses its {holds[0]}"
        )


def _te_fl_vendors(settings: Settings) -> Iterator[str]:
    for name in ("TE_FL_ALLOW_VENDORS", "TE_FL_DENY_VENDORS"):
        for vendor in settings[name]:
            if vendor != vendor.upper() or vendor == "NVIDIA":
                yield f"{name} names {vendor!r}, which matches no vendor of TransformerEngine-FL; {_vendor(vendor)}"


def _vendor(name: str) -> str:
    return f"write {'CUDA' if name.upper() in ('NVIDIA', 'CUDA') else name.upper()}, names are in capitals"


def _te_fl_tokens(settings: Settings) -> Iterator[str]:
    for op, tokens in settings["TE_FL_PER_OP"].items():
        for token in tokens:
            kind, _, name = token.partition(":")
            if kind == "vendor" and name and (name != name.upper() or name == "NVIDIA"):
                yield f"TE_FL_PER_OP: {op}={token} matches no implementation; {_vendor(name)}"
            elif token not in PREFER and not (kind in ("vendor", "impl") and name):
                yield (
                    f"TE_FL_PER_OP: {op}={token} matches no implementation; "
                    "tokens are flagos, reference, vendor, vendor:<NAME>, impl:<id>"
                )


def _te_fl_strict(settings: Settings) -> Iterator[str]:
    if "TE_FL_STRICT" in settings.given:
        value = settings["TE_FL_STRICT"]
        does = "does not try" if value == "0" else "tries"
        yield Remark(
            f"TE_FL_STRICT={value} is read the other way round where TransformerEngine-FL calls an operator: it {does} "
            f"another implementation when one fails; {'1' if value == '0' else '0'} does the opposite"
        )


def _te_fl_prefer(settings: Settings) -> Iterator[str]:
    if "TE_FL_PREFER" in settings.given and "TE_FL_PREFER_VENDOR" in settings.given:
        yield "TE_FL_PREFER_VENDOR has no effect: TE_FL_PREFER is set and goes before it; unset TE_FL_PREFER_VENDOR"


def _vllm_config(settings: Settings) -> Iterator[str]:
    file = settings["VLLM_FL_CONFIG"]
    if not file:
        return
    if not os.path.isfile(file):
        yield (
            f"VLLM_FL_CONFIG={file!r} is no file on this machine; vllm-plugin-FL goes on without a word, and without "
            "the chip's own configuration too"
        )
        return
    for name in ("PREFER", "STRICT", "PER_OP", "ALLOW_VENDORS", "DENY_VENDORS"):
        if f"VLLM_FL_{name}" in settings.given:
            yield f"VLLM_FL_{name} is not read by the dispatch: VLLM_FL_CONFIG takes its place; write it into {file}"


def _vllm_policy(settings: Settings) -> Iterator[str]:
    for name in ("VLLM_FL_ALLOW_VENDORS", "VLLM_FL_DENY_VENDORS"):
        yield from vendor_faults(name, settings[name])
    for op, tokens in settings["VLLM_FL_PER_OP"].items():
        yield from token_faults(f"VLLM_FL_PER_OP: {op}", tokens)


def vendor_faults(where: str, vendors: Iterable[Any]) -> Iterator[str]:
    """Yield what is wrong with a list of vendors; each text begins with ``where``, the place of the list."""
    for vendor in vendors:
        if str(vendor) != str(vendor).lower():
            yield f"{where}: {vendor!r} matches no vendor; write {str(vendor).lower()!r}, names are in lower case"


def token_faults(where: str, tokens: Iterable[Any]) -> Iterator[str]:
    """Yield what is wrong with an operator's order of implementations; each text begins with ``where``, its place."""
    for token in (str(token).strip() for token in tokens):
        kind, _, name = token.partition(":")
        if token not in PREFER and not (kind in ("vendor", "impl") and name):
            yield f"{where}: {token!r} matches nothing{nearest(token, PREFER)}"
        elif kind == "vendor" and name != name.lower():
            yield f"{where}: {token!r} matches no vendor; write vendor:{name.lower()}"


def _oplist_path(settings: Settings) -> Iterator[str]:
    if "ROLLOUT_FLAGGEMS_PATH" in settings.given:
        yield "ROLLOUT_FLAGGEMS_PATH is read by nothing; rollout reads FLAGGEMS_ENABLE_OPLIST_PATH"


def _vllm_lists(settings: Settings) -> Iterator[str]:
    if settings["VLLM_FL_FLAGOS_WHITELIST"] and settings["VLLM_FL_FLAGOS_BLACKLIST_APPEND"]:
        yield "VLLM_FL_FLAGOS_BLACKLIST_APPEND has no effect beside VLLM_FL_FLAGOS_WHITELIST; keep one of them"
    if "*" in settings.disable or "rollout.lists" in settings.disable:
        for name in REPLACED_LISTS:
            if settings[name]:
                yield (
                    f"{name} takes the place of the list in the chip's configuration, whose operators come back into "
                    "use, since VERL_FL_DISABLE leaves rollout.lists out; name them too, or write the list into the "
                    "file of VLLM_FL_CONFIG"
                )


def _vllm_plugins(settings: Settings) -> Iterator[str]:
    if "VLLM_PLUGINS" not in settings.given or "fl" in settings["VLLM_PLUGINS"]:
        return
    unread = sorted(name for name in settings.given if name.startswith("VLLM_FL_"))
    if unread:
        yield (
            f"VLLM_PLUGINS={settings.given['VLLM_PLUGINS']!r} leaves vllm-plugin-FL out, so nothing reads "
            f"{', '.join(unread)}; add fl to VLLM_PLUGINS"
        )


def _external_modules(settings: Settings) -> Iterator[str]:
    text, right = settings.given.get(LOADED_BY, ""), ",".join(modules(settings.given))
    if text and any(part != part.strip() or not part for part in text.split(",")):
        yield f"{LOADED_BY}={text!r}: verl cannot import names with blanks or empty ones; write {right!r}"


RULES: tuple[Rule, ...] = (
    _spelling,
    _rollout_without_flaggems,
    _training_lists,
    _two_enablers,
    _flagcx,
    _te_fl_vendors,
    _te_fl_tokens,
    _te_fl_strict,
    _te_fl_prefer,
    _vllm_config,
    _vllm_policy,
    _oplist_path,
    _vllm_lists,
    _vllm_plugins,
    _external_modules,
)
