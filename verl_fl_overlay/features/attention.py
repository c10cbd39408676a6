"""Whether this environment has a flash-attn package that can really be imported."""

from __future__ import annotations

import functools


@functools.cache
def flash_attn_imports() -> bool:
    """Try the import once: a package built for another torch is found, yet fails when it is loaded."""
    try:
        import flash_attn.bert_padding  # noqa: F401
    except ImportError:
        return False
    return True
