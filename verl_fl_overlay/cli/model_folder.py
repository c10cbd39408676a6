"""The model's folder that commands take, and the batch for it: what is wrong with them, told before anything is run.

Only files are read: torch, transformers and verl are not imported, so that a typo is told at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verl_fl_overlay import compat
from verl_fl_overlay.compat.trial import Trial
from verl_fl_overlay.errors import NOT_JSON, OverlayError, UnsupportedVerlError, nearest
from verl_fl_overlay.packages import source
from verl_fl_overlay.settings.loading import OVERLAY, modules

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files from which transformers loads a model, in its order."""

POINTER = b"version https://git-lfs"
"""How a file begins that git has put in the place of a large one."""

TYPES = ("transformers/models/auto/configuration_auto.py", "transformers/models/auto/auto_mappings.py")
"""The files with the model types that transformers knows; the second one is there since transformers 5."""

LONGEST_SEED = 2**63 - 1


class ModelError(OverlayError):
    """A model's folder that cannot be used, or a batch that does not fit the model."""


@dataclass(frozen=True)
class Model:
    """A folder in Hugging Face's format, and its config.json."""

    folder: Path
    config: dict[str, Any]

    @property
    def text(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def positions(self) -> int | None:
        """How many tokens a sequence may have, None if the configuration does not say."""
        return self._number("max_position_embeddings", "n_positions", "max_sequence_length")

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model has rows for, None if the configuration does not say."""
        return self._number("vocab_size")

    def _number(self, *keys: str) -> int | None:
        named = (self.text.get(key) for key in keys)
        return next((number for number in named if isinstance(number, int) and number > 0), None)

    @property
    def layers_without_attention(self) -> bool:
        """Whether some layers are linear attention, a state-space model or convolutions, by what describes them."""
        types = self.text.get("layer_types")
        if isinstance(types, list):
            return not all(str(kind).endswith("attention") and not str(kind).startswith("linear") for kind in types)
        return any(key.startswith(("linear_", "mamba_", "conv_L_")) for key in self.text)

    @property
    def words(self) -> int | None:
        """How many tokens the tokenizer numbers, None if it has no tokenizer.json that tells."""
        try:
            tokenizer = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocabulary = tokenizer["model"]["vocab"]
            added = [token["id"] for token in tokenizer.get("added_tokens", ())]
            known = vocabulary.values() if isinstance(vocabulary, dict) else (len(vocabulary) - 1,)
            return 1 + int(max([*known, *added]))
        except (OSError, *NOT_JSON, KeyError, TypeError, OverflowError):
            return None


def add_batch(parser: argparse.ArgumentParser, *, rows: int, length: int, micro_batch: int | None = None) -> None:
    """Add the options of the batch, with these defaults; a command without ``micro_batch`` computes all rows at once.

    ``checked`` refuses what they do not allow.
    """
    told = {
        "rows": (rows, "sequences in the batch, 1 or more"),
        "length": (length, "tokens in the longest of them, 2 or more"),
        "micro-batch": (micro_batch, "sequences computed at a time, 1 or more"),
    }
    for name, (default, what) in told.items():
        if default is not None:
            what += " (default: %(default)s)"
            parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=what)


def opened(name: str) -> Model:
    """Return the model in the folder ``name``; a model of the hub that was downloaded may be named by its id.

    Raises:
        ModelError: there is no such folder, or no model in it that transformers could load with its tokenizer.
    """
    model = described(name)
    folder = model.folder
    _refuse_unknown_type(folder, model.config)
    _refuse_without_weights(folder)
    if not any(_is_of_a_tokenizer(file.name) for file in folder.iterdir()):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy it there from "
            "the model that this one was made from"
        )
    return model


def described(name: str) -> Model:
    """Return the model in the folder ``name``, of which only its config.json has to be there.

    Raises:
        ModelError: there is no such folder, or no configuration in it from which verl could choose the model's class.
    """
    folder = _folder(name)
    return Model(folder, _config(folder))


def checked(trial: Trial) -> Trial:
    """Return the trial with the folder of its model, if a step of it can be run here.

    Raises:
        ModelError: the model's folder cannot be used, or the batch does not fit the model.
        UnsupportedVerlError: there is no verl here, or one that the overlay has no hooks for.
    """
    model = opened(trial.model)
    _refuse_batch(trial, model)
    found = compat.find_verl()
    if found is None:
        raise UnsupportedVerlError("no verl is installed here, whose engine is run: verl-fl install-hint verl")
    compat.select(found)
    return replace(trial, model=str(model.folder))


def _folder(name: str) -> Path:
    folder = Path(os.path.expanduser(name))
    try:
        if name and folder.is_dir():
            os.listdir(folder)
            return folder
        if name and folder.exists():
            raise ModelError(f"{name} is a file; needed is the folder of a model, with {CONFIG} in it")
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ModelError(
            f"there is no folder {name or repr(name)}; needed is the folder of a model, with {CONFIG} in it"
        )
    if cached := _in_the_hubs_cache(name):
        return cached
    raise ModelError(
        f"there is no folder {name}; if it is a model of Hugging Face's hub, download it first: "
        f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    )


def _in_the_hubs_cache(name: str) -> Path | None:
    """Return the folder in which huggingface_hub keeps what it downloaded of a model, None if it did not."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))
    kept = hub / f"models--{name.replace('/', '--')}"
    try:
        folder = kept / "snapshots" / (kept / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))[:3]
        there = f"; {' and '.join(below)} in it {'has' if len(below) == 1 else 'have'} one" if below else ""
        raise ModelError(f"{folder} is no model's folder: there is no {CONFIG} in it{there}") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except NOT_JSON as error:
        raise ModelError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, not an object with model_type and architectures")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelError(f"{file} has no model_type, by which transformers chooses the model's class")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ModelError(f"{file} has to name one class in architectures, as verl asks; it has {architectures!r}")
    return config


def _refuse_unknown_type(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what transformers has no class for; another module that verl imports may bring one."""
    known = {name for file in TYPES for name in re.findall(r'"([\w.-]+)"', source(file) or "")}
    kind = config["model_type"]
    if known and kind not in known and not set(modules(os.environ)) - {OVERLAY}:
        own = " and its own code (auto_map) is not run" if config.get("auto_map") else ""
        raise ModelError(
            f"{folder / CONFIG} has model_type {kind!r}, which the installed transformers does not know{own}"
            f"{nearest(kind, known, likeness=0.8)}; another version of transformers may know it"
        )


def _refuse_without_weights(folder: Path) -> None:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"{folder} holds no weights: there is none of {', '.join(WEIGHTS)}")
    files = [found]
    if found.suffix == ".json":
        try:
            files = [folder / name for name in sorted(set(json.loads(found.read_text())["weight_map"].values()))]
        except (OSError, *NOT_JSON, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{found} is no index of weights: {type(error).__name__}: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks {missing[0]}{more} of the {len(files)} files that {found.name} names")
    for file in files:
        with file.open("rb") as opened_file:
            if opened_file.read(len(POINTER)) == POINTER:
                raise ModelError(f"{file} is git's pointer to the weights, not the weights: git lfs pull")


def _is_of_a_tokenizer(name: str) -> bool:
    return name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece", "tekken")) or name.endswith(".tiktoken")


def _refuse_batch(trial: Trial, model: Model) -> None:
    least = {"--rows": (trial.rows, 1), "--micro-batch": (trial.micro_batch, 1), "--length": (trial.length, 2)}
    for option, (given, allowed) in least.items():
        if given < allowed:
            raise ModelError(f"{option} {given}: allowed is {allowed} or more")
    if trial.micro_batch > trial.rows or trial.rows % trial.micro_batch:
        raise ModelError(
            f"--micro-batch {trial.micro_batch} does not divide --rows {trial.rows}, the sequences of the batch"
        )
    if model.positions is not None and trial.length > model.positions:
        raise ModelError(
            f"--length {trial.length} is longer than the {model.positions} positions of {model.folder / CONFIG}"
        )
    if not 0 <= trial.seed <= LONGEST_SEED:
        raise ModelError(f"--seed {trial.seed}: allowed is 0 to {LONGEST_SEED}")
    known = _attentions()
    if known and trial.attention not in known and "/" not in trial.attention:  # with a slash it is a kernel of the hub
        raise ModelError(
            f"--attention {trial.attention}: the installed transformers has no such attention; it has "
            f"{', '.join(sorted(known))}"
        )


def _attentions() -> set[str]:
    """Return the attentions that training can take from the installed transformers; none if that cannot be told."""
    table = re.search(r"_global_mapping = \{(.*?)\}", source("transformers/modeling_utils.py") or "", re.DOTALL)
    named = re.findall(r'"(\w+)":', table[1]) if table else []
    return {"eager", *(name for name in named if "paged" not in name)} if named else set()
