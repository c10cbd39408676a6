"""verl's own code from logits to log-probs and entropy, with the hook around it and alone, in a process of its own.

python tests/logprobs/engine_outputs.py prints JSON: case -> what differs, and how often verl's own functions ran.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verl.utils.torch_functional as verl_functional
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode

from verl_fl_overlay import activation
from verl_fl_overlay.compat import token_logprobs
from verl_fl_overlay.compat.model_outputs import ENGINES, outputs_hook
from verl_fl_overlay.features.logprobs import Logprobs
from verl_fl_overlay.settings import Settings

VOCABULARY = 61
LENGTHS = [5, 1, 7, 3]


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that verl's engines import and that are not installed."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: type(name, (), {"Config": type("Config", (), {})})
        return module

    def exec_module(self, module):
        pass


class Counted:
    """Counts the calls of verl's functions that read logits."""

    NAMES = ("entropy_from_logits", "entropy_from_logits_with_chunking", "logprobs_from_logits_v2")

    def __init__(self) -> None:
        self.calls = 0
        for name in self.NAMES:
            setattr(verl_functional, name, self.counting(getattr(verl_functional, name)))

    def counting(self, function):
        def counted(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return counted


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def case_of(name, packed, temperature, **flags):
    """Return the logits of a batch, and the arguments of ``prepare_model_outputs`` but the output."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    values = torch.cat(ids)
    per_row = torch.full((len(LENGTHS),), temperature) if isinstance(temperature, float) else torch.tensor(temperature)
    labels = values.roll(-1)
    batch = tu.get_tensordict(
        {"input_ids": nested(ids)},
        {
            "use_remove_padding": packed,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "temperature": temperature if isinstance(temperature, float) else per_row,
            **flags,
        },
    )
    tokens, longest = sum(LENGTHS), max(LENGTHS)
    shape = (1, tokens, VOCABULARY) if packed else (len(LENGTHS), longest, VOCABULARY)
    logits = torch.randn(shape, generator=generator) * 3
    told = {"input_ids_rmpad_rolled": labels, "labels": labels, "pad_size": 0, "temperature": per_row}
    if packed:
        told["temperature_rmpad"] = torch.cat([each.expand(n) for each, n in zip(per_row, LENGTHS, strict=True)])
    if name != "torchtitan":
        del told["labels"]
    return logits, {"output_args": told, "micro_batch": batch}


def outputs(function, name, logits, given):
    """Return verl's outputs as plain tensors, and the gradient of a loss that uses each of them."""
    leaf = logits.clone().requires_grad_()
    made = leaf * 1
    first = {"logits": made} if name == "torchtitan" else {"output": SimpleNamespace(logits=made)}
    found = {key: value.values() for key, value in function(**first, **given).items()}
    generator = torch.Generator().manual_seed(4)
    loss = sum((value * torch.randn(value.shape, generator=generator)).sum() for value in found.values())
    loss.backward()
    return {**{key: value.detach() for key, value in found.items()}, "gradient": leaf.grad}


def off(found, expected):
    """Return by how much each of these differs, relative."""
    return {key: float((found[key] - value).norm() / value.norm()) for key, value in expected.items()}


def compare(name, counted, **case):
    """Return by how much each output differs, relative, and how often verl's functions ran with the hook."""
    owner, _ = ENGINES[name]
    module = importlib.import_module(f"verl.workers.engine.{name}.transformer_impl")
    cls = getattr(module, owner)
    engine = object.__new__(cls)
    engine.engine_config = SimpleNamespace(
        entropy_checkpointing=case.pop("checkpointing", False),
        entropy_from_logits_with_chunking=False,
        entropy_from_logits_chunk_size=4,
    )
    engine.use_ulysses_sp = False
    engine.compute_entropy_from_logits = verl_functional.entropy_from_logits
    native, wrapper = cls.prepare_model_outputs.__get__(engine), outputs_hook(name).wrapper
    logits, given = case_of(name, **case)
    if "logits_processor_func" in native.__code__.co_varnames:
        given["logits_processor_func"] = None
    expected = outputs(native, name, logits, given)
    counted.calls = 0
    found = outputs(lambda **kwargs: wrapper(native, engine, (), kwargs), name, logits, given)
    assert list(found) == list(expected), (list(found), list(expected))
    return {"off": off(found, expected), "calls": counted.calls}


def through(wrapper, native, *args, **kwargs):
    """Call verl's function as with the hook installed."""
    return wrapper(native, None, args, kwargs)


def prefix_grouper(counted):
    """Return, as ``compare``, what the prefix grouper's function gives for suffixes of unequal length."""
    module = importlib.import_module("verl.trainer.ppo.prefix_grouper_utils")
    hooks = {hook.attribute: hook.wrapper for hook in token_logprobs.hooks(["prefix_grouper"])}
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 6, VOCABULARY, generator=generator)
    ids, mask = torch.randint(0, VOCABULARY, (3, 5), generator=generator), torch.ones(3, 6)
    grouper = SimpleNamespace(
        split_output=lambda logits, include_prefix_last: (None, None, logits, mask),
        convert_padding=lambda ids, mask, padding_mode: ids,
    )

    def outputs():
        leaf = logits.clone().requires_grad_()
        model = lambda **inputs: SimpleNamespace(logits=leaf * 1)  # noqa: E731
        more = {"temperature": 0.7, "calculate_entropy": True, "entropy_fn": verl_functional.entropy_from_logits}
        log_probs, entropy, _ = module.pg_forward(model, grouper, ids, mask, None, ids, mask[:, 1:], **more)
        (log_probs.sum() + 0.3 * entropy.square().sum()).backward()
        return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "gradient": leaf.grad}

    expected = outputs()
    for name, wrapper in hooks.items():
        native = getattr(module, name)
        setattr(module, name, partial(through, wrapper, native))
    counted.calls = 0
    found = outputs()
    return {"off": off(found, expected), "calls": counted.calls}


def main() -> None:
    sys.meta_path.append(Absent("torchtitan", "nemo_automodel", "prefix_grouper"))
    activation.deactivate()  # importing the package activated it; here the hook is called by hand
    counted, feature, told = Counted(), Logprobs(Settings()), {}
    feature.start()
    squares = "calculate_sum_pi_squared" in tu_flags()
    for name in ENGINES:
        try:
            importlib.import_module(f"verl.workers.engine.{name}.transformer_impl")
        except ModuleNotFoundError as error:
            told[name] = f"not in this verl: {error}"
            continue
        for packed, temperature, entropy in product((True, False), (1.0, 0.7, [1.0, 0.5, 2.0, 1.5]), (True, False)):
            if isinstance(temperature, list) and (name == "torchtitan" or not per_sample()):
                continue
            case = {"packed": packed, "temperature": temperature, "calculate_entropy": entropy}
            told[f"{name}, {case}"] = compare(name, counted, **case)
        told[f"{name}, checkpointing"] = compare(
            name, counted, packed=True, temperature=0.7, calculate_entropy=True, checkpointing=True
        )
        if squares and name == "fsdp":
            for packed in (True, False):
                case = {"packed": packed, "temperature": 0.7, "calculate_entropy": True}
                told[f"{name}, squares, {packed}"] = compare(name, counted, calculate_sum_pi_squared=True, **case)
    try:
        told["prefix grouper"] = prefix_grouper(counted)
    except ModuleNotFoundError as error:
        told["prefix grouper"] = f"not in this verl: {error}"
    told["kernels"] = feature.describe()["kernels"]
    print(json.dumps(told))


def tu_flags():
    """Return the names in the code of the FSDP engine's method, its flags among them."""
    module = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    return module.FSDPEngineWithLMHead.prepare_model_outputs.__code__.co_consts


def per_sample():
    """Whether this verl takes a temperature for each sample: those after 0.7.0."""
    return "temperature_rmpad" in tu_flags()


if __name__ == "__main__":
    main()
