"""The real FlagGems registers into torch's real dispatcher, and is taken back; only its device probes are answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from verl_fl_overlay.errors import SettingsError  # noqa: E402
from verl_fl_overlay.flaggems import names, safety  # noqa: E402
from verl_fl_overlay.flaggems.choice import select  # noqa: E402
from verl_fl_overlay.flaggems.dispatcher import registered_in  # noqa: E402
from verl_fl_overlay.flaggems.routing import Router  # noqa: E402
from verl_fl_overlay.settings import Settings  # noqa: E402

FOLDER = Path(__file__).parent
ROUTING = os.path.join("verl_fl_overlay", "flaggems", "routing.py")


def dumps(kernels):
    return {kernel.key: torch._C._dispatch_dump(f"aten::{kernel.key}") for kernel in kernels}


def test_it_offers_hundreds_of_kernels_for_cuda_and_only_operators_torch_has(real_gems):
    assert len(real_gems.kernels) > 300
    assert real_gems.vendor == "nvidia"
    assert {kernel.dispatch_keys[0] for kernel in real_gems.kernels} == {"CUDA"}
    by_key = {kernel.key: kernel.name for kernel in real_gems.kernels}
    assert by_key["mm"] == "mm"
    assert by_key["_to_copy"] == "to_copy"
    assert by_key["div.Tensor"] == by_key["true_divide.Tensor"] == "true_divide"
    assert "nll_loss_nd_forward" not in by_key
    assert "nll_loss_nd_forward" in real_gems.not_here


def test_asking_what_it_has_registers_nothing_and_leaves_its_own_note_alone(real_gems):
    import flag_gems

    assert flag_gems.current_work_registrar is None
    assert ROUTING not in registered_in("mm", "CUDA")
    assert "flag_gems" not in registered_in("mm", "CUDA")


def test_all_safe_operators_go_in_and_the_dispatcher_is_the_same_afterwards(real_gems):
    kernels = select(Settings(), real_gems).kernels
    before = dumps(kernels)
    router = Router(kernels)
    for _ in range(2):
        router.enter()
        assert all(registered_in(k.key, "CUDA").endswith(ROUTING) for k in kernels)
        assert registered_in("rms_norm", "AutogradCUDA").endswith(ROUTING)
        assert not registered_in("mm", "AutogradCUDA").endswith(ROUTING)
        assert not router.failed
        assert not router.held
        router.leave()
        assert dumps(kernels) == before


@pytest.mark.parametrize("key", ["conv1d", "conv2d", "conv2d.padding", "rms_norm"])
def test_an_autograd_function_is_kept_although_torch_only_decomposes(real_gems, key):
    kernel = next(kernel for kernel in real_gems.kernels if kernel.key == key)
    assert safety.differentiated_by_decomposition(key)
    assert safety.why_unsafe(kernel) == ""


@pytest.mark.parametrize("key", ["div.Tensor", "mm", "mul.Tensor", "where.self", "copy_", "_to_copy", "_log_softmax"])
def test_what_has_a_derivative_formula_is_kept(real_gems, key):
    kernel = next(kernel for kernel in real_gems.kernels if kernel.key == key)
    assert safety.why_unsafe(kernel) == ""


@pytest.mark.parametrize(
    "key", ["true_divide.Tensor", "divide.Tensor", "pad", "tile", "hstack", "vstack", "kron", "prelu", "selu", "conv3d"]
)
def test_a_kernel_in_place_of_a_decomposition_is_left_out(real_gems, key):
    kernel = next(kernel for kernel in real_gems.kernels if kernel.key == key)
    assert "gradient would be cut" in safety.why_unsafe(kernel)
    selection = select(Settings(), real_gems)
    assert key in selection.left_out
    assert key not in {k.key for k in selection.kernels}
    assert key in {k.key for k in select(Settings.of(unsafe_ops=(f"aten::{key}",)), real_gems).kernels}


@pytest.mark.parametrize("key", ["native_layer_norm", "native_layer_norm_backward"])
def test_what_is_known_to_be_wrong_is_left_out_too(real_gems, key):
    kernel = next(kernel for kernel in real_gems.kernels if kernel.key == key)
    assert not safety.differentiated_by_decomposition(key)
    selection = select(Settings(), real_gems)
    assert "FlagGems/issues/5392" in selection.left_out[key]
    assert key not in {k.key for k in selection.kernels}
    assert kernel in select(Settings.of(unsafe_ops=(key,)), real_gems).kernels


def test_the_names_in_the_stacks_own_documents_are_explained(real_gems):
    with pytest.raises(SettingsError) as error:
        names.check(["rmsnorm", "layernorm", "softmax"], "TRAINING_FL_FLAGOS_WHITELIST", real_gems)
    text = str(error.value)
    assert "'rmsnorm': FlagGems calls it rms_norm" in text
    assert "'layernorm': FlagGems calls it layer_norm" in text
    assert "'softmax'" not in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_to_copy", "its function is to_copy"),
        ("mm.out", "its function is mm_out"),
        ("aten::add.Tensor", "its function is add"),
        ("where_scalar_other", "gone since FlagGems 5.0"),
        ("flash_attention", "FlagGems calls it flash_attention_forward"),
        ("nll_loss_nd_forward", "leaves it out"),
        ("silu_and_mul", "no aten operator"),
        ("sofmax", "did you mean softmax"),
        ("no_such_thing_at_all", "nothing like it"),
    ],
)
def test_every_wrong_name_is_explained(real_gems, name, said):
    with pytest.raises(SettingsError, match=said):
        names.check([name], "VERL_FL_OPS", real_gems)


def run_with_probes(code: str, tmp_path: Path, **environment: str) -> str:
    program = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nfrom stubs import device_probes\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={**os.environ, "FLAGGEMS_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_what_was_enabled_before_is_reported_and_stays(real_gems, tmp_path):
    said = run_with_probes(
        """
import json, torch
with device_probes():
    import flag_gems
    flag_gems.only_enable(include=["mm", "mul"])
    from verl_fl_overlay import phase
    from verl_fl_overlay.features.enablers import Enablers
    from verl_fl_overlay.features.flaggems import Routing
    from verl_fl_overlay.flaggems.dispatcher import registered_in
    from verl_fl_overlay.settings import Settings
    settings = Settings.of(ops=("mm", "mul", "add"))
    routing, enablers = Routing(settings), Enablers(settings)
    routing.start()
    enablers.start()
    with phase.training.inside("train"):
        inside = {key: registered_in(key, "CUDA") for key in ("mm", "mul.Tensor", "add.Tensor")}
    outside = {key: registered_in(key, "CUDA") for key in ("mm", "mul.Tensor", "add.Tensor")}
print(json.dumps([routing.describe(), enablers.describe(), inside, outside, flag_gems.all_registered_keys()]))
""",
        tmp_path,
    )
    described, enablers, inside, outside, theirs = json.loads(said)
    assert set(enablers["held"]) == {"mm", "mul.Tensor"}
    assert not enablers["harmful"]
    assert set(described["held by others"]) == {"mm", "mul.Tensor"}
    assert described["routed"] == ["add.Tensor"]
    assert inside["add.Tensor"].endswith(ROUTING)
    for place in (inside, outside):
        assert all("flag_gems" in place[key] and not place[key].endswith(ROUTING) for key in ("mm", "mul.Tensor"))
    assert not outside["add.Tensor"].endswith(ROUTING)
    assert len(theirs) == 2


def test_all_of_it_enabled_inside_the_phase_is_told_with_what_it_cuts(real_gems, tmp_path):
    said = run_with_probes(
        """
import json
with device_probes():
    from verl_fl_overlay import phase
    from verl_fl_overlay.features.enablers import Enablers
    from verl_fl_overlay.features.flaggems import Routing
    from verl_fl_overlay.settings import Settings
    settings = Settings.of(ops=("mm", "mul"))
    routing, enablers = Routing(settings), Enablers(settings)
    routing.start()
    enablers.start()
    with phase.training.inside("train"):
        import flag_gems
        flag_gems.enable(unused=[])
print(json.dumps([routing.describe(), enablers.describe()]))
""",
        tmp_path,
    )
    described, enablers = json.loads(said)
    assert len(enablers["held"]) > 300
    assert {"true_divide.Tensor", "hstack", "native_layer_norm_backward"} <= enablers["harmful"].keys()
    assert f"{len(enablers['harmful'])} of them cut or falsify gradients" in enablers["state"]
    assert ("held by others" in described["state"]) is ("mm" in enablers["held"])


OURS = "from verl_fl_overlay.flaggems import library\n    library.load()"
SOMEBODY_FIRST = f"import flag_gems\n    {OURS}"
SOMEBODY_ALONE = """from verl_fl_overlay.features.enablers import Enablers
    from verl_fl_overlay.settings import Settings
    Enablers(Settings()).start()
    import flag_gems"""


@pytest.mark.parametrize("imports", [OURS, SOMEBODY_FIRST, SOMEBODY_ALONE])
def test_each_process_has_a_tuning_database_of_its_own_unless_the_user_names_one(real_gems, tmp_path, imports):
    code = f"""
import os
with device_probes():
    {imports}
    from flag_gems.utils.libentry import libcache
    from sqlalchemy import text
    with libcache.model.engine.connect() as connection:
        print(connection.execute(text("PRAGMA database_list")).fetchone()[2])
"""
    assert run_with_probes(code, tmp_path, RANK="3").endswith("rank3.db")
    given = f"sqlite:///{tmp_path}/mine.db"
    assert run_with_probes(code, tmp_path, FLAGGEMS_DB_URL=given) == f"{tmp_path}/mine.db"


def test_the_command_lists_what_training_may_use_and_why_not(real_gems, monkeypatch, capsys):
    from verl_fl_overlay.cli import main
    from verl_fl_overlay.flaggems import library

    monkeypatch.setattr(library, "load", lambda: real_gems)
    assert main(["ops", "--json", "true_divide"]) == 0
    listed = json.loads(capsys.readouterr().out)
    by_name = {entry["function"]: entry["keys"] for entry in listed}
    assert by_name["true_divide"]["div.Tensor"] == ""
    assert "gradient would be cut" in by_name["true_divide"]["divide.Tensor"]
    assert main(["ops", "--unsafe"]) == 0
    unsafe = capsys.readouterr().out
    assert "conv3d" in unsafe
    assert "conv2d" not in unsafe
    assert main(["ops", "nothing*like*it"]) == 1
    capsys.readouterr()
    assert main(["ops", "--faults", "--json"]) == 0
    told = {fault["key"] for fault in json.loads(capsys.readouterr().out)}
    assert "nll_loss_backward" in told
    assert "mse_loss_backward" not in told, "it came with 5.3.1"


def test_the_dispatch_file_that_is_written_passes_its_own_check(real_gems, tmp_path, capsys):
    pytest.importorskip("yaml")
    from verl_fl_overlay.cli import main

    assert main(["dispatch", "render", "--vendor", "nvidia"]) == 0
    file = tmp_path / "rendered.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["dispatch", "check", str(file)]) == 0
    *notes, last = capsys.readouterr().out.splitlines()
    assert last == f"{file}: no faults"
    assert "note: flagos_blacklist: the FlagGems that is installed has no function mhc_pre" in notes
    file.write_text("flagos_whitelist: [mm, mhc_pre]")
    assert main(["dispatch", "check", str(file)]) == 1
    assert capsys.readouterr().out == "flagos_whitelist: the FlagGems that is installed has no function mhc_pre\n"


TUNE = """
import os, time
from types import SimpleNamespace
import torch
with device_probes():
    from verl_fl_overlay.flaggems import library
    library.load()
    from flag_gems.ops.mm import mm_kernel_general as entry
    tuner = entry.fn
    while not hasattr(tuner, "configs_hash"):
        tuner = tuner.fn
    timed = []

    def bench(*args, config, **kwargs):  # there is no device to time them on
        timed.append(config)
        time.sleep(0.02)
        return [config.num_warps + config.kwargs["BLOCK_M"] / 1000] * 3

    tuner._bench, tuner.prune_configs = bench, lambda kwargs: tuner.configs
    tuner.fn = SimpleNamespace(run=lambda *args, **kwargs: chosen.append(kwargs), fn=tuner.fn)
    tuner.cache_key, tuner.kernel_hash, chosen = "x", "x", []
    a = torch.empty(64, 64, dtype=torch.bfloat16)
    tuner.run(a, a, a, 64, 64, 64, *[64] * (len(tuner.arg_names) - 6))
print(len(timed), sorted((k, v) for k, v in chosen[0].items() if isinstance(v, int)))
"""


def test_one_of_several_ranks_tunes_a_kernel_and_the_others_take_its_choice(real_gems, tmp_path):
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda rank: run_with_probes(TUNE, tmp_path, RANK=str(rank)), range(3)))
    counts, choices = zip(*(line.split(" ", 1) for line in told), strict=True)
    assert sum(count != "0" for count in counts) == 1
    assert len(set(choices)) == 1
