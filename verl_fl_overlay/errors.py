"""The errors that the overlay raises, and the nearest real name for a wrong name of a user.

None of these is an ImportError: verl wraps several of its imports in ``except ImportError`` and would swallow it.
"""

from __future__ import annotations

from collections.abc import Iterable


class OverlayError(RuntimeError):
    """Base of every error that the overlay raises itself; verl's own errors are never wrapped in one."""


class SettingsError(OverlayError):
    """The environment variables contradict each other or hold values that are not allowed; lists all of them."""


class UnsupportedVerlError(OverlayError):
    """The verl that is here is older than the overlay supports, or differs from every release it was written for."""


class HookError(OverlayError):
    """A hook could not be put on its target, although the target's module was imported."""


class FlagCXError(OverlayError):
    """FlagCX was asked for, but its plugin or library is missing, does not load, or cannot do what verl asks for."""


class AttentionInputError(OverlayError):
    """Queries, keys, values and sequences that do not belong together."""


class PackingError(OverlayError):
    """A model that does not keep packed sequences apart was given some; its numbers would be wrong."""


class HeadError(OverlayError):
    """A model or an engine cannot give log-probs without all logits, as VERL_FL_HEAD=chunked asks."""


class AdapterError(OverlayError):
    """verl would give rollout a part of a model's LoRA adapters; its answers would be another model's."""


class MegatronError(OverlayError):
    """Megatron was asked for what only NVIDIA's TransformerEngine computes, and that is not what is installed."""


NOT_JSON = (ValueError, RecursionError)
"""What json raises for a text that is not JSON, or not UTF-8, and for brackets in thousands of brackets."""


def first_line(error: BaseException) -> str:
    """Return what was raised: its type, and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def nearest(name: object, known: Iterable[str], most: int = 1, words: str = "; {}?", likeness: float = 0.6) -> str:
    """Return ``words`` with the names of ``known`` that look most like ``name``, at most ``most``; "" if none does.

    ``likeness`` is the least ratio of equal characters, 0 to 1.
    """
    from difflib import get_close_matches

    found = ", ".join(get_close_matches(str(name), sorted(known), n=most, cutoff=likeness))
    return words.format(found) if found else ""
