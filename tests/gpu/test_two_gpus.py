"""Two GPUs of one host.  NCCL: FSDP2, Ulysses 2, and Megatron with each way of being parallel, as plain verl's.

FlagCX, where its torch plugin can be imported: the engines' numbers are NCCL's, and the guards hold.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import PLAIN, before_others, result

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("runs"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

PROGRAM = Path(__file__).with_name("megatron_engine.py")
STAND_IN = PROGRAM.parents[2] / "benchmarks" / "flash_attn_stand_in"  # plain verl needs flash-attn for Ulysses
WITH = {"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay", "VERL_FL_STRICT": "1"}
WITH_FLAGCX = {**WITH, "USE_FLAGCX": "1"}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
STEPS = 8

needs_flagcx = pytest.mark.skipif(find_spec("flagcx") is None, reason="needs FlagCX's torch plugin on Python's path")


def both(sides: dict[str, dict[str, str]], *command: str | Path) -> dict[str, dict]:
    """Return what the program prints in each side's environment; they run at the same time."""
    with ThreadPoolExecutor() as pool:
        found = {
            side: pool.submit(result, *TORCHRUN, *command, env={**env, "NCCL_NVLS_ENABLE": "0"}, timeout=400)
            for side, env in sides.items()
        }
    return {side: future.result() for side, future in found.items()}


def needs_packages_of(strategy: str) -> None:
    if strategy == "megatron":
        pytest.importorskip("megatron.core", reason="needs megatron-core")
        pytest.importorskip("mbridge", reason="needs mbridge")


ENGINES = {
    "fsdp2": ("fsdp2", {}),
    "hsdp": ("fsdp2", {"fsdp_size": 1}),
    "fsdp1": ("fsdp", {}),
    "ulysses": ("fsdp2", {"ulysses_sequence_parallel_size": 2}),
    "dp2": ("megatron", {}),
    "tp2": ("megatron", {"tensor_model_parallel_size": 2}),
    "pp2": ("megatron", {"pipeline_model_parallel_size": 2}),
    "ep2": ("megatron", {"expert_model_parallel_size": 2}),
}


def options_of(name: str) -> tuple[str | int, ...]:
    """Return the program's options for an engine; Ulysses packs, the others pad with FSDP."""
    strategy, engine = ENGINES[name]
    needs_packages_of(strategy)
    packed = ("--packed",) if name == "ulysses" else ()
    return "--strategy", strategy, "--engine", json.dumps(engine), "--steps", STEPS, *packed


@pytest.fixture(scope="module", params=["fsdp2", "ulysses", "dp2", "tp2", "pp2", "ep2"])
def runs(request):
    model = request.getfixturevalue("experts_model" if request.param == "ep2" else "tiny_model")
    stand_in = before_others(STAND_IN) if request.param == "ulysses" and not find_spec("flash_attn") else {}
    return both({"with": WITH, "plain": {**PLAIN, **stand_in}}, PROGRAM, model, *options_of(request.param))


def floats(found: dict, name: str) -> list[float]:
    return [float.fromhex(step[name]) for step in found["steps"]]


def test_both_ranks_learn_inside_the_phase(runs, record_property):
    found = runs["with"]
    losses = floats(found, "loss")
    record_property("losses", losses)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert len(found["inside"]["train"]) >= STEPS
    assert all(found["inside"]["train"] + found["inside"]["infer"])
    assert found["after"] is False


def test_numbers_are_plain_verls(runs, record_property):
    assert runs["plain"]["report"] is None, "the overlay was not loaded there"
    for name in ("loss", "grad_norm"):
        ours, theirs = floats(runs["with"], name), floats(runs["plain"], name)
        record_property(
            f"largest relative difference of {name}", max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        )
        assert ours == pytest.approx(theirs, rel=2e-2), name  # bf16


@needs_flagcx
@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "fsdp1", "dp2", "tp2"])
def test_an_engine_over_flagcx_has_nccls_numbers(tiny_model, name):
    export = () if ENGINES[name][0] == "megatron" else ("--export",)
    found = both({"flagcx": WITH_FLAGCX, "nccl": WITH}, PROGRAM, tiny_model, *options_of(name), *export)
    used = found["flagcx"]["report"]["features"]["flagcx"]
    assert used["on"], used
    assert used["detail"]["device"] == "cuda"
    assert used["detail"]["library"].endswith("libflagcx.so")
    assert found["nccl"]["report"]["features"]["flagcx"]["on"] is False
    assert len(found["flagcx"]["steps"]) == STEPS
    for part in ("steps", "values", "exported"):  # floats as hexadecimal; what rollout's weights would be
        assert found["flagcx"][part] == found["nccl"][part], part


@pytest.fixture(scope="module")
def guarded():
    if find_spec("flagcx") is None:
        pytest.skip("needs FlagCX's torch plugin on Python's path")
    sides = {"guarded": WITH_FLAGCX, "bare": {**WITH_FLAGCX, "VERL_FL_DISABLE": "flagcx.memory"}}
    program = PROGRAM.with_name("flagcx_collectives.py")
    return {side: both({side: env}, program)[side] for side, env in sides.items()}


def test_flagcx_gets_no_memory_that_is_used_anew(guarded, record_property):
    record_property("wrong numbers without the guard", guarded["bare"]["wrong"])
    assert not any(guarded["guarded"]["wrong"].values()), guarded["guarded"]["wrong"]
    assert guarded["guarded"]["kept"] == 0
    assert any(guarded["bare"]["wrong"].values()), "FlagCX holds its tensors by now: the guard is not needed"


def test_what_flagcx_does_without_a_word_is_refused_or_told(guarded):
    found = guarded["guarded"]
    assert "not contiguous (shape [4, 2], strides [4, 1])" in found["slice"]
    assert "asks for a reduction that FlagCX does not have" in found["premul"]
    assert found["barrier waited"]
    assert len(found["told"]) == 1
    assert found["described"]["guards"] == ["barrier", "contiguous", "memory", "reductions", "sizes", "timeout"]


def test_verls_checkpoint_engine_of_nccl_is_refused(guarded):
    said = guarded["guarded"]["engine"]
    if said.startswith(("ModuleNotFoundError", "ImportError")):
        pytest.skip(f"verl's checkpoint engines cannot be imported: {said}")
    assert "checkpoint engine 'nccl' communicates through NCCL" in said
