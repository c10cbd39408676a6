"""Which packages are here, told without importing them; only the package that a dotted name is in is imported."""

from __future__ import annotations

from importlib.util import find_spec


def installed(name: str) -> bool:
    """Return whether ``name`` can be imported, or was made by hand and stands in ``sys.modules``."""
    try:
        return find_spec(name) is not None
    except ValueError:  # it is in sys.modules without a spec
        return True
    except Exception:  # the package that it would be in is not there, or cannot be imported
        return False


def folders(name: str) -> list[str]:
    """Return the folders of the package ``name``; none where it is not here, is a module, or was made by hand."""
    try:
        spec = find_spec(name)
    except ValueError:
        return []
    return list(spec.submodule_search_locations or ()) if spec else []
