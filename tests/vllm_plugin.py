"""A stand-in for vllm-plugin-FL that reads its lists as the real one does: the environment before the chip's file."""

from __future__ import annotations

from pathlib import Path

INIT = """
import os, subprocess, sys

def register():
    return "vllm_fl.platform.PlatformFL"

def lists(vendor):
    import yaml
    file = os.environ.get("VLLM_FL_CONFIG") or os.path.join(os.path.dirname(__file__), f"dispatch/config/{vendor}.yaml")
    config = yaml.safe_load(open(file)) if os.path.isfile(file) else {}
    names = {"flagos_blacklist": "VLLM_FL_FLAGOS_BLACKLIST", "oot_blacklist": "VLLM_FL_OOT_BLACKLIST"}
    return {key: [n for n in os.environ.get(name, "").split(",") if n] or config.get(key, [])
            for key, name in names.items()}

def in_a_worker(vendor):
    # vLLM's workers are processes of their own, which need not have loaded verl
    code = f"import json, sys, vllm_fl; print(json.dumps([vllm_fl.lists({vendor!r}), 'verl' in sys.modules]))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
"""

METAX = "flagos_blacklist: [copy_, index]\noot_blacklist: [rotary_embedding]\n"


def write(folder: Path) -> None:
    """Write the package ``vllm_fl`` into ``folder``; it knows metax."""
    config = folder / "vllm_fl" / "dispatch" / "config"
    config.mkdir(parents=True)
    (folder / "vllm_fl" / "__init__.py").write_text(INIT)
    (config / "metax.yaml").write_text(METAX)
