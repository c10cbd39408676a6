"""The environment variables of the FlagOS stack's other components, one row each.

Defaults and allowed values follow the components' code, even if their documents say something else.
"""

from __future__ import annotations

from typing import Any

from verl_fl_overlay.settings.variables import (
    Variable,
    choice,
    choices_per_op,
    directory,
    flag,
    integer,
    json_file,
    names,
    words,
)

PREFER = ("flagos", "vendor", "reference")
FLAG = "1 or 0"
CSV = "names, comma-separated"
PER_OP = "op=token|token;op=token, tokens: flagos, reference, vendor, vendor:<NAME>, impl:<id>"
LEVELS = ("debug", "info", "warning", "error", "critical")
ONE_TRUE = ("1", "true")
OF_ONE_PROCESS = ("FLAGCX_HOSTID", "FLAGCX_COMM_ID", "FLAGCX_RANK", "FLAGCX_TUNER_DONE")
"""FlagCX's variables of one node, rank or process; the first shows which ranks share a node, FlagCX sets the last."""
VENDOR_NAMES = ("GEMS_VENDOR", "FLAGGEMS_VENDOR", "GEMS_BACKEND", "FLAGGEMS_BACKEND")
"""FlagGems' names for one variable, in the order in which it reads them; it knows the last three since 5.3.0."""
VENDOR_FINDER = "flag_gems/runtime/backend/device_finder.py"


def _flaggems() -> list[Variable[Any]]:
    component = "FlagGems"
    return [
        Variable("GEMS_VENDOR", words, "", "a vendor's name", "The chip's vendor, instead of finding it.", component),
        *(
            Variable(
                name,
                words,
                "",
                "a vendor's name",
                "Another name of GEMS_VENDOR.",
                component,
                since="5.3.0",
                read_by=VENDOR_FINDER,
            )
            for name in VENDOR_NAMES[1:]
        ),
        Variable(
            "PPU_SDK",
            words,
            "",
            "a directory",
            "T-Head's SDK; where it is set the chip is T-Head's, whatever GEMS_VENDOR says.",
            component,
            since="5.3.0",
        ),
        Variable(
            "USE_C_EXTENSION",
            flag,
            False,
            FLAG,
            "FlagGems' operators in C++, where built.",
            component,
            truths=("1",),
        ),
        Variable("ARCH", words, "", "an architecture's name", "The chip's architecture within its vendor.", component),
        Variable("FLAGGEMS_CACHE_DIR", words, "~/.flaggems", "a directory", "Generated code and tuning.", component),
        Variable("FLAGGEMS_DB_URL", words, "", "an SQLAlchemy URL", "Where tuning results are kept.", component),
        Variable("USE_FLAGTUNE", flag, False, FLAG, "FlagGems' wider search for tile sizes.", component, since="5.3.0"),
    ]


def _flagcx() -> list[Variable[Any]]:
    component = "FlagCX"
    return [
        Variable(
            "USE_FLAGCX",
            flag,
            False,
            FLAG,
            "Collectives of training through FlagCX.",
            "verl",
            truths=ONE_TRUE,
        ),
        Variable(
            "FLAGCX_PATH",
            directory,
            "",
            "the directory FlagCX was built in",
            "Where FlagCX lies; its being set makes rollout (vllm-plugin-FL) use it.",
            component,
        ),
        Variable("FLAGCX_ADAPTOR", words, "", "a vendor's name", "The chip FlagCX is built for.", component, "build"),
        Variable("FLAGCX_DEBUG", words, "", "a level", "What FlagCX logs.", component),
        Variable("FLAGCX_USE_HOST_COMM", words, "", FLAG, "Communicate through the hosts' memory.", component),
        Variable("FLAGCX_USE_HETERO_COMM", words, "", FLAG, "Communicate between unlike chips.", component),
        Variable("FLAGCX_SOCKET_IFNAME", words, "", "a network interface", "The interface for sockets.", component),
        Variable("FLAGCX_IB_HCA", words, "", "device names", "The InfiniBand adapters.", component),
    ]


def _te_fl() -> list[Variable[Any]]:
    def row(name: str, read: Any, default: Any, allowed: str, text: str) -> Variable[Any]:
        return Variable(name, read, default, allowed, text, "TransformerEngine-FL", "training")

    return [
        row("TE_FL_PREFER", choice(*PREFER), "flagos", ", ".join(PREFER), "Which kind of implementation goes first."),
        row("TE_FL_PREFER_VENDOR", flag, False, FLAG, "Older form of TE_FL_PREFER=vendor, which goes before it."),
        row("TE_FL_STRICT", choice("0", "1"), "", FLAG, "Whether another implementation is tried when one fails."),
        row("TE_FL_ALLOW_VENDORS", names, (), CSV, "The only vendors whose implementations are used."),
        row("TE_FL_DENY_VENDORS", names, (), CSV, "Vendors whose implementations are not used."),
        row("TE_FL_PER_OP", choices_per_op, {}, PER_OP, "The implementations to try, operator by operator."),
        row("TE_FL_PLUGIN_MODULES", names, (), CSV, "Modules that register further implementations."),
        row("TE_FL_SKIP_CUDA", integer, 0, FLAG, "Import without the CUDA library."),
        row("TEFL_LOG_LEVEL", choice(*LEVELS), "info", ", ".join(LEVELS), "What TransformerEngine-FL logs."),
    ]


def _vllm_fl() -> list[Variable[Any]]:
    def row(
        name: str, read: Any, default: Any, allowed: str, text: str, truths: tuple[str, ...] = (), **version: str
    ) -> Variable[Any]:
        return Variable(name, read, default, allowed, text, "vllm-plugin-FL", "rollout", truths=truths, **version)

    dumper = "vllm_fl/dispatch/io_dumper.py"

    return [
        Variable("VLLM_PLUGINS", names, (), CSV, "The plugins vLLM loads; all when not set.", "vLLM", "rollout"),
        row("VLLM_FL_PREFER_ENABLED", flag, True, FLAG, "0 turns FlagGems and the dispatch off.", ONE_TRUE),
        row("VLLM_FL_PREFER", choice(*PREFER), "flagos", ", ".join(PREFER), "Which kind of implementation goes first."),
        row("VLLM_FL_STRICT", choice("0", "1"), "0", FLAG, "Raise when the chosen implementation fails."),
        row("VLLM_FL_PER_OP", choices_per_op, {}, PER_OP, "The implementations to try, operator by operator."),
        row("VLLM_FL_ALLOW_VENDORS", names, (), CSV, "The only vendors whose implementations are used."),
        row("VLLM_FL_DENY_VENDORS", names, (), CSV, "Vendors whose implementations are not used."),
        row("VLLM_FL_PLUGIN_MODULES", names, (), CSV, "Modules that register further implementations."),
        row("VLLM_FL_LOG_LEVEL", choice(*LEVELS), "info", ", ".join(LEVELS), "What the plugin logs."),
        row("VLLM_FL_DISPATCH_DEBUG", flag, False, FLAG, "Log every choice of an implementation.", ONE_TRUE),
        row("VLLM_FL_CONFIG", words, "", "a YAML file", "The policy as a file; lists in it count in newer versions."),
        row("VLLM_FL_PLATFORM", words, "", "a platform's name", "The chip, instead of finding it."),
        row("VLLM_FL_OP_CONFIG", json_file, "", "a JSON file, op: backend", "As VLLM_FL_PER_OP, and before it."),
        row("VLLM_FL_FLAGOS_WHITELIST", names, (), CSV, "The only FlagGems operators that rollout uses."),
        row("VLLM_FL_FLAGOS_BLACKLIST", names, (), CSV, "FlagGems operators left out besides the chip's."),
        row(
            "VLLM_FL_FLAGOS_BLACKLIST_APPEND",
            names,
            (),
            CSV,
            "The same; the plugin itself adds these, since September 2026.",
            read_by="vllm_fl/utils.py",
        ),
        row("VLLM_FL_OOT_ENABLED", flag, True, FLAG, "Replace vLLM's custom operators.", ONE_TRUE),
        row("VLLM_FL_OOT_WHITELIST", names, (), CSV, "The only custom operators that are replaced."),
        row("VLLM_FL_OOT_BLACKLIST", names, (), CSV, "Custom operators left alone besides the chip's."),
        row("VLLM_FL_OP_FAST_PATH", flag, True, FLAG, "Call chosen implementations without looking them up again."),
        row("VLLM_FL_USE_FLAGGEMS_VLLM", flag, True, FLAG, "Operators that FlagGems made for vLLM.", ONE_TRUE),
        row("VLLM_FL_USE_FLAGGEMS_ATTN", flag, False, FLAG, "FlagGems' attention.", ONE_TRUE),
        row("VLLM_FL_HOPPER_LONG_CONTEXT_OPT", flag, False, FLAG, "Native kernels for long contexts on Hopper."),
        row("VLLM_FL_IO_DUMP", words, "", "a directory, or 1", "Write operators' inputs and outputs there."),
        row("VLLM_FL_IO_DUMP_OPS", names, (), CSV, "The operators to write."),
        row("VLLM_FL_IO_DUMP_MODULES", names, (), "class names, comma-separated", "The modules to write."),
        row("VLLM_FL_IO_DUMP_LAYERS", words, "", "numbers, ranges or globs", "The layers to write."),
        row("VLLM_FL_IO_DUMP_MAX_CALLS", words, "", "a whole number", "The calls of each operator to write."),
        row("VLLM_FL_IO_DUMP_STEP_RANGE", words, "", "first-last", "The steps to write."),
        row("VLLM_FL_IO_DUMP_RANK", words, "", "a rank", "The rank that writes."),
        row(
            "VLLM_FL_IO_DUMP_WITH_TORCH_FUNCS", words, "", "1 or names", "Write torch's functions too.", read_by=dumper
        ),
        row(
            "VLLM_FL_IO_DUMP_WITH_METAS", flag, False, FLAG, "Write shapes and types as JSON.", ONE_TRUE, read_by=dumper
        ),
        row("VLLM_FL_IO_DUMP_WITH_VALUES", flag, False, FLAG, "Write the tensors.", ONE_TRUE, read_by=dumper),
        row("VLLM_FL_IO_DUMP_WITH_PRINT", flag, False, FLAG, "Log what is written.", ONE_TRUE, read_by=dumper),
        row("VLLM_FL_IO_DUMP_BG_WORKERS", integer, 8, "a whole number", "Threads that write.", read_by=dumper),
        row(
            "VLLM_FL_IO_DUMP_TORCH_FUNCS",
            words,
            "",
            "1 or names",
            "Older name of VLLM_FL_IO_DUMP_WITH_TORCH_FUNCS.",
            read_by=dumper,
            now="VLLM_FL_IO_DUMP_WITH_TORCH_FUNCS",
        ),
        row(
            "FLAGGEMS_ENABLE_OPLIST_PATH",
            words,
            "/tmp/flaggems_enable_oplist.txt",
            "a file",
            "Where rollout records its FlagGems operators.",
        ),
        row("ROLLOUT_FLAGGEMS_PATH", words, "", "a file", "Older name of FLAGGEMS_ENABLE_OPLIST_PATH, read no more."),
    ]


def _sglang_fl() -> list[Variable[Any]]:
    def row(name: str, read: Any, default: Any, allowed: str, text: str, truths: tuple[str, ...] = ()) -> Variable[Any]:
        return Variable(name, read, default, allowed, text, "sglang-plugin-FL", "rollout", truths=truths)

    true = (*ONE_TRUE, "yes")
    classes = "class names, comma-separated"
    platform = "The platform plugin SGLang takes, of several."
    return [
        Variable("SGLANG_PLUGINS", names, (), CSV, "The plugins SGLang loads; all when not set.", "SGLang", "rollout"),
        Variable("SGLANG_PLATFORM", words, "", "a plugin's name", platform, "SGLang", "rollout"),
        row(
            "SGLANG_FL_PREFER", choice(*PREFER), "flagos", ", ".join(PREFER), "Which kind of implementation goes first."
        ),
        row("SGLANG_FL_STRICT", choice("0", "1"), "1", FLAG, "1: try another implementation when one fails."),
        row("SGLANG_FL_PER_OP", choices_per_op, {}, PER_OP, "The implementations to try, operator by operator."),
        row("SGLANG_FL_ALLOW_VENDORS", names, (), CSV, "The only vendors whose implementations are used."),
        row("SGLANG_FL_DENY_VENDORS", names, (), CSV, "Vendors whose implementations are not used."),
        row("SGLANG_FL_CONFIG", words, "", "a YAML file", "The configuration as a file; variables go before it."),
        row("SGLANG_FL_PLATFORM", words, "", "a platform's name", "The chip, where torch shows none."),
        row("SGLANG_FL_FLAGOS_WHITELIST", names, (), CSV, "The only FlagGems operators that rollout uses."),
        row("SGLANG_FL_FLAGOS_BLACKLIST", names, (), CSV, "FlagGems operators left out besides the chip's."),
        row("SGLANG_FL_OOT_ENABLED", flag, True, FLAG, "Replace SGLang's operators.", true),
        row("SGLANG_FL_OOT_WHITELIST", names, (), classes, "The only classes that are replaced."),
        row("SGLANG_FL_OOT_BLACKLIST", names, (), classes, "Classes left alone besides the chip's."),
        row("SGLANG_FL_DIST_BACKEND", words, "", "nccl, hccl, flagcx ...", "The collectives, instead of the chip's."),
        row("SGLANG_FL_LOG_LEVEL", choice(*LEVELS), "info", ", ".join(LEVELS), "What the plugin logs."),
        row("SGLANG_FL_DISPATCH_LOG", words, "", "a file", "Where every choice of an implementation is written."),
        row("SGLANG_FL_DISPATCH_DEBUG", words, "", FLAG, "Named in the plugin's documents, and read by nothing."),
        row("SGLANG_FL_LOG_DIR", words, "", "a directory", "A log for each rank, on TsingMicro's chips."),
        row("SGLANG_FL_TIMER_ENABLE", choice("0", "1"), "0", FLAG, "Time each forward, on TsingMicro's chips."),
        row("SGLANG_FL_STUB_MODULES_EXTRA", names, (), CSV, "Modules to stand in for, on TsingMicro's chips."),
        row("SGLANG_FLAGGEMS_RECORD", flag, False, FLAG, "Record the calls of FlagGems' operators.", true),
        row("SGLANG_FLAGGEMS_LOG_ONCE", flag, True, FLAG, "Record each operator once.", true),
        row("SGLANG_FLAGGEMS_LOG_PATH", words, "", "a file", "Where the calls are recorded."),
    ]


def _megatron() -> list[Variable[Any]]:
    component = "Megatron-LM-FL"
    fp16 = "Allow Megatron's deprecated fp16 path."
    return [
        Variable("MG_FL_PREFER", words, "", "a vendor's name", "Whose override goes first.", component, "training"),
        Variable("MG_ALLOW_DEPRECATED_FP16", words, "", FLAG, fp16, component, "training"),
    ]


def _verl() -> list[Variable[Any]]:
    def row(name: str, default: str, allowed: str, text: str, since: str = "0.9.0") -> Variable[Any]:
        return Variable(name, words, default, allowed, text, "verl", since=since)

    return [
        row("VERL_USE_EXTERNAL_MODULES", "", CSV, "Modules verl imports; no blanks, no comma at the end.", ""),
        row("VERL_USE_EXTERNAL_PLUGINS", "auto", "auto, none or names", "Installed plugins that verl loads."),
        row("VERL_PLATFORM", "", "a platform's name", "The chip, instead of finding it."),
        row("VERL_ENGINE_DEVICE", "", "a device", "Choose the training engine's class by this device."),
        row("VERL_ENGINE_VENDOR", "", "a vendor", "Choose the training engine's class by this vendor."),
    ]


_GROUPS = (_flaggems, _flagcx, _te_fl, _vllm_fl, _sglang_fl, _megatron, _verl)

STACK: dict[str, Variable[Any]] = {variable.name: variable for group in _GROUPS for variable in group()}
"""Name -> variable, for every variable that another component reads."""

PREFIXES = (
    *("FLAGCX_", "FLAGGEMS_", "FLAG_GEMS_", "FLAGTREE_", "GEMS_", "MG_FL_", "TE_FL_", "TEFL_"),
    *("ROLLOUT_FL_", "ROLLOUT_FLAGGEMS_", "TRAINING_FL_", "TRAINING_FLAGGEMS_"),
    *("SGLANG_FL_", "SGLANG_FLAGGEMS_", "VLLM_FL_"),
)
"""Beginnings of names that belong to the stack alone: components read more of them than the table has."""
