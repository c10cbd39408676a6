"""Stand-ins for FlagOS' plugins that read their lists as the real ones do: the environment before a file."""

from __future__ import annotations

from pathlib import Path

INIT = """
import os, subprocess, sys

def register():
    return "vllm_fl.platform.PlatformFL"

def lists(vendor):
    import yaml
    from vllm_fl.dispatch.config.utils import get_config_path
    file = get_config_path(vendor)
    config = yaml.safe_load(open(file)) if os.path.isfile(file) else {}
    names = {"flagos_blacklist": "VLLM_FL_FLAGOS_BLACKLIST", "oot_blacklist": "VLLM_FL_OOT_BLACKLIST"}
    return {key: [n for n in os.environ.get(name, "").split(",") if n] or config.get(key, [])
            for key, name in names.items()}

def in_a_worker(vendor):
    # vLLM's workers are processes of their own, which need not have loaded verl
    code = f"import json, sys, vllm_fl; print(json.dumps([vllm_fl.lists({vendor!r}), 'verl' in sys.modules]))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
"""

SGLANG = """
import os

_loaded = False

def activate_platform():
    return "sglang_fl.platform:PlatformFL"

def load_plugin():
    global _loaded
    _loaded = True

def lists(platform):
    import yaml
    given = os.environ.get("SGLANG_FL_CONFIG", "")
    own = os.path.join(os.path.dirname(__file__), f"dispatch/config/{platform}.yaml")
    file = given if os.path.isfile(given) else own
    config = yaml.safe_load(open(file)) if os.path.isfile(file) else {}
    names = {"flagos_blacklist": "SGLANG_FL_FLAGOS_BLACKLIST", "oot_blacklist": "SGLANG_FL_OOT_BLACKLIST"}
    return {key: [n for n in os.environ.get(name, "").split(",") if n] or config.get(key, [])
            for key, name in names.items()}
"""

FINDERS = {
    "newer": """
import os
def get_config_path(platform=None):
    \"\"\"Find the file.\"\"\"
    config_path = os.environ.get("VLLM_FL_CONFIG", "").strip()
    return config_path or os.path.join(os.path.dirname(__file__), f"{platform}.yaml")
""",
    "older": """
import os
def get_config_path(platform=None):
    \"\"\"Find the chip's file; VLLM_FL_CONFIG goes before it in the policy.\"\"\"
    return os.path.join(os.path.dirname(__file__), f"{platform}.yaml")
def get_effective_config():
    return os.environ.get("VLLM_FL_CONFIG", "")
""",
}
"""How vllm-plugin-FL finds the file with its lists, before and after September 2026."""

METAX = "flagos_blacklist: [copy_, index]\noot_blacklist: [rotary_embedding]\n"


def write(folder: Path, version: str = "newer") -> None:
    """Write the package ``vllm_fl`` into ``folder``; it knows metax."""
    config = folder / "vllm_fl" / "dispatch" / "config"
    config.mkdir(parents=True)
    (folder / "vllm_fl" / "__init__.py").write_text(INIT)
    (config / "metax.yaml").write_text(METAX)
    (config / "utils.py").write_text(FINDERS[version])


def write_sglang(folder: Path) -> None:
    """Write the package ``sglang_fl`` into ``folder``; it knows MUSA."""
    config = folder / "sglang_fl" / "dispatch" / "config"
    config.mkdir(parents=True)
    (folder / "sglang_fl" / "__init__.py").write_text(SGLANG)
    (config / "musa.yaml").write_text("flagos_blacklist: [mm, cumsum]\noot_blacklist: [TopK]\n")
