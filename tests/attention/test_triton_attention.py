"""The Triton kernels of attention against float64 in Triton's interpreter, and that a compiler takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from processes import output, run  # noqa: E402

from attention.interpreted import CASES  # noqa: E402
from attention.reference import packed, random_case  # noqa: E402
from verl_fl_overlay.kernels.sequences import Form  # noqa: E402

pytestmark = pytest.mark.xdist_group("interpreted attention")  # they share the run

BOUND = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""fp32: what exp2 and sums may lose; else: weights and results are rounded to the type, 2 ** -11 and 2 ** -8."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    program, cache = Path(__file__).with_name("interpreted.py"), str(tmp_path_factory.mktemp("cache"))
    done = run(program, env={"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": cache})
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_match_float64(told, name):
    assert len(told[name]) == (5 if CASES[name].sinks else 4)
    assert all(value < BOUND[CASES[name].dtype] for value in told[name]), told[name]


def test_blocks_of_a_chip_give_the_same(told):
    assert all(value < BOUND["float16"] for value in told["blocks as on a chip"]), told["blocks as on a chip"]


def test_any_strides_give_the_same_bits(told):
    assert told["strides"] == [True] * 7


def test_two_backwards_give_the_same_bits(told):
    assert told["twice"]


def test_heads_are_divided_among_as_many_programs_as_it_takes(told):
    assert told["number of parts"] == [1, 2, 6, 6]
    assert all(value < BOUND["float32"] for value in told["parts"])


def test_what_comes_after_the_last_sequence_reaches_nobody(told):
    assert told["NaN after the last sequence"] == [[True, 0.0]] * 4


def test_longest_may_be_larger(told):
    assert told["longest may be larger"]


def test_no_tokens_give_no_results(told):
    assert told["no tokens"] == [[0, 2, 32]] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (5, 3, 32)}, r"key \(5, 3, 32\)"),
        ({"key": (5, 2, 16)}, r"key \(5, 2, 16\)"),
        ({"value": (4, 2, 32)}, r"value \(4, 2, 32\)"),
        ({"sinks": (3,)}, r"sinks \(3,\)"),
        ({"value": (5, 2, 257)}, "larger than 256"),
    ],
)
def test_misfits_are_refused_with_what_was_found(change, message):
    from verl_fl_overlay.kernels.triton.attention import attend

    shapes = {"query": (5, 4, 32), "key": (5, 2, 32), "value": (5, 2, 32), **change}
    with pytest.raises(ValueError, match=message):
        attend(**{name: torch.zeros(shape) for name, shape in shapes.items()}, sequences=packed([5]), form=Form(1.0))


def test_another_type_or_a_scale_that_is_not_positive_is_refused():
    from verl_fl_overlay.kernels.triton.attention import attend

    query, key, value, _ = random_case(5, 5, 2, 2, 32)
    with pytest.raises(ValueError, match=r"value \(5, 2, 32\) torch\.float16"):
        attend(query, key, value.half(), packed([5]), Form(1.0))
    with pytest.raises(ValueError, match="scale must be positive, it is -1"):
        attend(query, key, value, packed([5]), Form(-1.0))


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verl_fl_overlay.kernels.sequences import Form
from verl_fl_overlay.kernels.triton import attention

FORMS = [Form(0.1), Form(0.1, window=(4095, 0), softcap=50.0)]
TABLES = {
    attention._forward: attention.FORWARD,
    attention._query_gradient: attention.QUERY_GRADIENT,
    attention._key_gradient: attention.KEY_GRADIENT,
}
INTEGERS, FLOATS = {"tokens", "other_tokens", "sequences"}, {"scale", "inner", "factor"}


def kind(name):
    if name in FLOATS or name in ("normalizer", "delta", "sinks"):
        return "fp32" if name in FLOATS else "*fp32"
    if name.startswith("ends"):
        return "*i32"
    return "i32" if name in INTEGERS or name.endswith(("_token", "_head")) else "*bf16"


query, key, value = (torch.empty(1, heads, 128, dtype=torch.bfloat16) for heads in (12, 2, 2))
for form in FORMS:
    for kernel, table in TABLES.items():
        constants = attention._constants(attention._cut(table, query, value), query, key, value, form)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {"PARTS": 6} if kernel is attention._key_gradient else {}
        constants |= {"sinks": None} if kernel is attention._forward and not form.softcap else {}
        types = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
        aligned = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n.endswith(("_token", "_head"))]
        attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(made.metadata.shared, file=sys.stderr)
        assert made.metadata.shared <= 163 * 1024, f"{kernel.__name__} takes {made.metadata.shared} bytes"
        assert "cp.async" in made.asm["ptx"]
print("compiled")
"""


def test_every_kernel_compiles_and_fits_an_a100(tmp_path):
    assert output(COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path)}) == "compiled"
