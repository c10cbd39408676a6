"""Write the table of families and the kernels that their models run on: ``python tools/families.py [--check]``.

It is made from tiny models, by ``tests/fused/families.py``, with the transformers that is installed here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version

from tables import DOCS, ROOT, markdown, replaced

PAGE = DOCS / "families.md"
KINDS = ("norms", "MLPs", "experts", "rotary")
LIGER = {
    "NMR": "qwen2 llama mistral ministral smollm3 granite qwen3 olmo2 olmo3 hunyuan_v1_dense exaone4 qwen2_vl "
    "qwen2_5_vl gemma2 gemma3_text llama4_text phi3",
    "NM": "qwen3_5_text gemma4_text glm4 glm4v",
    "NME": "qwen3_next qwen3_5_moe_text deepseek_v2 deepseek_v3",
    "NER": "qwen3_moe mixtral qwen3_vl_moe",
    "NMER": "hunyuan_v1_moe",
    "NR": "qwen3_vl gpt_oss",
    "M": "nemotron",
}
"""What Liger-Kernel 0.8.5 patches when nothing is said: norms, MLPs, experts, rotary.  It has none of the others."""


def measured() -> dict[str, dict[str, tuple[int, int]]]:
    """Return family -> kind -> how many modules ran on a kernel, and how many there are."""
    program = [sys.executable, str(ROOT / "tests" / "fused" / "families.py")]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr)
    results = json.loads(lines[-1].removeprefix("RESULT "))
    if failed := {family: found for family, found in results.items() if isinstance(found, str)}:
        raise SystemExit("\n".join(f"{family}: {why}" for family, why in failed.items()))
    return dict(results)


def families(results: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Return the part of the page."""
    of_liger = {family: kinds for kinds, families in LIGER.items() for family in families.split()}
    words = dict(zip("NMER", KINDS, strict=True))
    rows = []
    for family, found in results.items():
        cells = [f"{ran}/{all_of_them}" if all_of_them else "-" for ran, all_of_them in (found[kind] for kind in KINDS)]
        rows.append([family, *cells, ", ".join(words[kind] for kind in of_liger.get(family, "")) or "-"])
    table = markdown(["family", *KINDS, "Liger"], rows)
    return f"With transformers {version('transformers')}:\n\n{table}"


def main() -> None:
    """Write the file, or compare it with what the models give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the file differs")
    text = PAGE.read_text(encoding="utf-8")
    made = replaced(text, "families", "tools/families.py", families(measured()))
    if parser.parse_args().check:
        if text != made:
            raise SystemExit(
                f"{PAGE.relative_to(ROOT)} is not what its models give; run: python tools/families.py\n{made}"
            )
        return
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
