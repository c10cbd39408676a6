"""What torch's FSDP1 calls the module that it wraps; this imports no torch."""

from __future__ import annotations

HOLDS = "_fsdp_wrapped_module"
"""The attribute for that module, and so a part of the names of all that is in it."""
