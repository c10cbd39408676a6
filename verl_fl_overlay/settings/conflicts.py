"""Rules between variables, and between the components that read them: where the stack would not do what a user means.

A contradiction is an error at any time.  A conflict is a setting that a component ignores, reads another way than its
neighbour, or that its own documents describe wrongly: a warning, and an error under ``VERL_FL_STRICT=1``.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from verl_fl_overlay.errors import nearest
from verl_fl_overlay.packages import folders, installed, source
from verl_fl_overlay.settings.loading import LOADED_BY, modules
from verl_fl_overlay.settings.plugins import PLUGINS, SGLANG, VLLM, Plugin
from verl_fl_overlay.settings.stack import PREFER
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


def _unread(settings: Settings) -> Iterator[str]:
    """Yield a conflict for each variable that the installed version, or the newest where none is, does not read."""
    for variable in filter(lambda v: v.read_by and v.name in settings.given, TABLE.values()):
        text = source(variable.read_by)
        if variable.name not in text if text is not None else variable.now:
            which = (
                f"the {variable.component} that is installed" if text is not None else f"{variable.component}'s newest"
            )
            since = f"it is read since {variable.since}" if variable.since else "newer versions read it"
            yield f"{variable.name} is not read by {which}; {f'write {variable.now}' if variable.now else since}"


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
            if vendor != _te_fl_name(vendor):
                yield f"{name} names {vendor!r}, which matches no vendor of TransformerEngine-FL; {_vendor(vendor)}"


def _te_fl_name(vendor: str) -> str:
    """Return TransformerEngine-FL's name of a vendor; some are called by what their torch calls the device.

    Ascend was ``Ascend`` in one version and is ``NPU`` now, so the installed version's names go first.
    """
    here = [name for text in _te_fl_registrations() for name in re.findall(r'\bvendor="(\w+)"', text)]
    meant = {"NVIDIA": "CUDA", "ASCEND": "NPU", "MTHREADS": "MUSA"}.get(vendor.upper(), vendor.upper())
    return next((name for name in here if name.upper() in (vendor.upper(), meant)), meant)


def _te_fl_registrations() -> Iterator[str]:
    for folder in folders("transformer_engine"):
        for file in Path(folder, "plugin/core/backends/vendor").glob("*/register_ops.py"):
            yield file.read_text(encoding="utf-8", errors="replace")


def _vendor(name: str) -> str:
    return f"write {_te_fl_name(name)}, names are case-sensitive"


def _te_fl_tokens(settings: Settings) -> Iterator[str]:
    for op, tokens in settings["TE_FL_PER_OP"].items():
        for token in tokens:
            kind, _, name = token.partition(":")
            if kind == "vendor" and name and name != _te_fl_name(name):
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


def _config(settings: Settings) -> Iterator[str]:
    for plugin in PLUGINS:
        file = settings[plugin.config]
        if file and not os.path.isfile(file):
            own = (
                "without the chip's own configuration too" if plugin.file_first else "with the chip's own configuration"
            )
            yield (
                f"{plugin.config}={file!r} is no file on this machine; {plugin.name} goes on without a word, and {own}"
            )
        elif file and plugin.file_first:
            yield from _lists_in_file(plugin, file)
            for name in ("PREFER", "STRICT", "PER_OP", "OP_CONFIG", "ALLOW_VENDORS", "DENY_VENDORS"):
                if f"{plugin.prefix}{name}" in settings.given:
                    yield (
                        f"{plugin.prefix}{name} is not read by the dispatch: {plugin.config} takes its place; write it "
                        f"into {file}"
                    )


def _lists_in_file(plugin: Plugin, file: str) -> Iterator[str]:
    text = ""
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace") as opened:
        text = opened.read(1 << 16)  # a limit, because a device never ends
    has_lists = re.search(r"^(flagos|oot)_(white|black)list *:", text, re.MULTILINE)
    if has_lists and not plugin.reads_lists_from_file():
        yield (
            f"{plugin.config}={file!r} has lists of operators, and the {plugin.name} that is installed reads none "
            f"there; verl-fl dispatch check {file} says what to export"
        )


def _policy(settings: Settings) -> Iterator[str]:
    for prefix in (plugin.prefix for plugin in PLUGINS):
        for name in (f"{prefix}ALLOW_VENDORS", f"{prefix}DENY_VENDORS"):
            yield from vendor_faults(name, settings[name])
        for op, tokens in settings[f"{prefix}PER_OP"].items():
            yield from token_faults(f"{prefix}PER_OP: {op}", tokens)


def _replaced(settings: Settings) -> Iterator[str]:
    for plugin in PLUGINS:
        for name in (f"{plugin.prefix}OOT_WHITELIST", f"{plugin.prefix}OOT_BLACKLIST"):
            known = {*plugin.replaced, *plugin.replaced_here()} if settings[name] else set()
            for op in (op for op in settings[name] if op not in known):
                meant = [right for right in known if right.lower() == op.replace("_", "").lower()]
                yield f"{name}: {plugin.name} replaces no {op}{f'; {meant[0]}?' if meant else nearest(op, known)}"


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


def _sglang_strict(settings: Settings) -> Iterator[str]:
    if "SGLANG_FL_STRICT" in settings.given:
        value = settings["SGLANG_FL_STRICT"]
        yield Remark(
            f"SGLANG_FL_STRICT={value} {'lets' if value == '1' else 'does not let'} {SGLANG.name} try another "
            "implementation when one fails; its README says the opposite"
        )


def _sglang_debug(settings: Settings) -> Iterator[str]:
    if "SGLANG_FL_DISPATCH_DEBUG" in settings.given:
        yield f"SGLANG_FL_DISPATCH_DEBUG is read by nothing; {SGLANG.name} writes its choices to SGLANG_FL_DISPATCH_LOG"


def _append(settings: Settings) -> Iterator[str]:
    if settings["VLLM_FL_FLAGOS_WHITELIST"] and settings["VLLM_FL_FLAGOS_BLACKLIST_APPEND"]:
        yield "VLLM_FL_FLAGOS_BLACKLIST_APPEND has no effect beside VLLM_FL_FLAGOS_WHITELIST; keep one of them"


def _lists_alone(settings: Settings) -> Iterator[str]:
    for plugin in PLUGINS:
        out = next((hook for hook in plugin.hooks if {hook, "*"} & set(settings.disable)), None)
        for name in (name for name in plugin.lists if out and settings[name]):
            yield (
                f"{name} takes the place of the list in the chip's configuration, whose operators come back into use, "
                f"since VERL_FL_DISABLE leaves {out} out; name them too{_or_file(plugin)}"
            )


def _or_file(plugin: Plugin) -> str:
    return f", or write the list into the file of {plugin.config}" if plugin.reads_lists_from_file() else ""


def _plugins(settings: Settings) -> Iterator[str]:
    for plugin in PLUGINS:
        switch, platform, entry = plugin.switch, plugin.platform, plugin.entry
        out, remedy = "", ""
        everything = "" if plugin is VLLM else entry  # what an empty list of plugins means
        if switch in settings.given and entry not in (settings[switch] or (everything,)):
            out, remedy = switch, f"add {entry} to {switch}"
        elif platform and settings[platform] not in ("", entry):
            out, remedy = platform, f"write {platform}={entry}"
        unread = ", ".join(sorted(name for name in settings.given if name.startswith(plugin.prefix)))
        if out and unread:
            yield f"{out}={settings.given[out]!r} leaves {plugin.name} out, so nothing reads {unread}; {remedy}"


def _relative(settings: Settings) -> Iterator[str]:
    for name in ("VERL_FL_REPORT_DIR", "VERL_FL_PROFILE", "TRAINING_FLAGGEMS_PATH"):
        value = str(settings[name])
        if name in settings.given and value not in ("", "auto") and not os.path.isabs(value):
            yield Remark(
                f"{name}={value!r} is a relative path, and every process takes it from the folder that it runs in, "
                "which is another one for Ray's workers; write an absolute one"
            )


def _external_modules(settings: Settings) -> Iterator[str]:
    text, right = settings.given.get(LOADED_BY, ""), ",".join(modules(settings.given))
    if text and any(part != part.strip() or not part for part in text.split(",")):
        yield f"{LOADED_BY}={text!r}: verl cannot import names with blanks or empty ones; write {right!r}"


RULES: tuple[Rule, ...] = (
    _spelling,
    _unread,
    _rollout_without_flaggems,
    _training_lists,
    _two_enablers,
    _flagcx,
    _te_fl_vendors,
    _te_fl_tokens,
    _te_fl_strict,
    _te_fl_prefer,
    _config,
    _policy,
    _replaced,
    _oplist_path,
    _sglang_strict,
    _sglang_debug,
    _append,
    _lists_alone,
    _plugins,
    _relative,
    _external_modules,
)
