"""The hooks on the verl that is installed: present, effective, in every import order, and gone again when removed."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import OVERLAY, PLAIN, output, python, run, warm
from schemas import faults

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)

VERL = version("verl")
SHARES_THE_STUB, SHARES_THE_MODULES = (pytest.mark.xdist_group(name) for name in ("stub", "modules"))

STUB = """
    import torch
    from verl.workers.engine.base import BaseEngine, BaseEngineCtx, EngineRegistry
    from verl_fl_overlay import events, phase

    seen = []
    events.engine_built.subscribe(lambda engine: seen.append("built"))
    phase.training.entered.subscribe(lambda: seen.append("entered"))
    phase.training.left.subscribe(lambda: seen.append("left"))

    class Mode(BaseEngineCtx):
        pass

    @EngineRegistry.register(model_type="stub", backend="stub", device=["cuda", "npu", "cpu"])
    class Stub(BaseEngine):
        is_param_offload_enabled = is_optimizer_offload_enabled = False
        def to(self, **kwargs): pass
        def train_mode(self, **kwargs): return Mode(self, "train")
        def eval_mode(self, **kwargs): return Mode(self, "eval")
        def optimizer_zero_grad(self): pass
        def optimizer_step(self): return 0.0
        def is_mp_src_rank_with_outputs(self): return True
        def forward_backward_batch(self, data, loss_function, forward_only=False):
            seen.append(f"depth {phase.training.depth}")
            if loss_function is not None: loss_function()
            return {"metrics": {}}
"""


def test_every_hook_installs_on_this_release():
    done = run("-m", "verl_fl_overlay", "doctor", "--json", env=OVERLAY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert faults(report, "doctor") == []
    assert report["verl"]["version"] == VERL
    assert report["problems"] == []
    for hook in report["hooks"]:
        if hook["detail"].startswith("not needed here"):
            assert hook["state"] == "waiting"
        else:
            assert hook["state"] in {"installed", "disabled"}, hook
        assert hook["pinned"] in {"yes", "-"}, hook


@SHARES_THE_STUB
def test_without_asking_for_the_cpu_its_hooks_stay_off(stub):
    program = "import verl; from verl.utils.device import get_nccl_backend; print(get_nccl_backend())"
    done = python(program, env={"VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay"}, start=warm)
    assert done.stdout.strip().endswith("nccl"), done.stderr
    assert stub["backend"] == "gloo"


CONFIGURED = """
    import verl
    from omegaconf import OmegaConf
    from verl.utils.device import auto_set_device
    config = OmegaConf.create({"trainer": {"device": %r}})
    auto_set_device(config)
    auto_set_device(OmegaConf.create({"actor": {}}))
    print(config.trainer.device)
"""


@pytest.mark.parametrize("given", ["cuda", "cpu"])
def test_the_configured_device_follows_the_chip(given):
    done = python(CONFIGURED % given, env=OVERLAY, start=warm)
    assert done.stdout.split()[-1] == "cpu", done.stderr
    assert done.stderr.count("trainer.device is cuda, and this process trains on cpu: ") == (given == "cuda")
    left_out = {**OVERLAY, "VERL_FL_DISABLE": "chip.configured_device"}
    assert output(CONFIGURED % given, env=left_out, start=warm) == given


STEPS = """
    import json
    from verl.utils.device import get_nccl_backend

    found = {"backend": get_nccl_backend(), "raised": {}}
    engine = EngineRegistry.new("stub", "stub")
    with engine.train_mode():
        with engine.train_mode():
            engine.train_batch({}, lambda: None)
    with engine.eval_mode():
        engine.infer_batch({})
    engine.train_batch({}, lambda: None)
    found["followed"] = list(seen)

    class Offloaded(Stub):
        is_param_offload_enabled = is_optimizer_offload_enabled = True
        def to(self, **kwargs): seen.append(f"moved at depth {phase.training.depth}")

    seen.clear()
    for mode in (Offloaded().train_mode, Offloaded().eval_mode):
        with mode():
            pass
    found["moved"] = list(seen)

    for raised in (RuntimeError("CUDA out of memory"), FloatingPointError(), KeyboardInterrupt()):
        engine = EngineRegistry.new("stub", "stub")
        def fails(): raise raised
        try:
            with engine.train_mode():
                engine.train_batch({}, fails)
        except BaseException as caught:
            alone = caught is raised and caught.__cause__ is None and caught.__context__ is None
            found["raised"][type(raised).__name__] = [alone, phase.training.depth, engine.mode, seen[-1]]
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stub():
    """Return what the stub engine saw in one process."""
    return json.loads(output("import verl\n" + (STUB + STEPS).replace("\n    ", "\n"), env=OVERLAY, start=warm))


@SHARES_THE_STUB
def test_phase_follows_the_engine(stub):
    once = ["entered", "depth 3", "left", "entered", "depth 2", "left", "entered", "depth 1", "left"]
    assert stub["followed"] == ["built", *once]


@SHARES_THE_STUB
def test_weights_are_moved_to_the_device_and_back_outside_the_phase(stub):
    assert stub["moved"] == ["moved at depth 0", "entered", "left", "moved at depth 0"] * 2


@SHARES_THE_STUB
@pytest.mark.parametrize("error", ["RuntimeError", "FloatingPointError", "KeyboardInterrupt"])
def test_a_step_that_raises_leaves_the_phase_and_its_error_alone(stub, error):
    assert stub["raised"][error] == [True, 0, None, "left"]


def test_a_feature_that_fails_strictly_leaves_its_error_and_verl_clean():
    """In a mode of verl's base class and in those of its own engine, which begin otherwise."""
    code = (
        STUB
        + """
    from verl.workers.engine.fsdp.transformer_impl import EngineEvalModeCtx, EngineTrainModeCtx, FSDPEngine

    def fails(): raise ValueError("feature")
    engine, its = EngineRegistry.new("stub", "stub"), object.__new__(FSDPEngine)
    phase.training.entered.subscribe(fails)
    found = []
    for owner, mode in (
        (engine, engine.train_mode()),
        (its, EngineEvalModeCtx(its, disable_auto_offload=True)),
        (its, EngineTrainModeCtx(its, disable_auto_offload=True)),
    ):
        try:
            with mode:
                raise SystemExit("the body ran")
        except ValueError as error:
            found.append((str(error), phase.training.depth, owner.mode))
    print(found)
    """
    )
    strict = {**OVERLAY, "VERL_FL_STRICT": "1"}
    said = output("import verl\n" + code.replace("\n    ", "\n"), env=strict, start=warm)
    assert said == str([("feature", 0, None)] * 3)


ORDERS = {
    "verl, then engines": "import verl; from verl.workers.engine.base import BaseEngine",
    "engines at once": "from verl.workers.engine.base import BaseEngine",
    "overlay first": "import verl_fl_overlay; import verl; from verl.workers.engine.base import BaseEngine",
    "overlay twice": "import verl, verl_fl_overlay, importlib; importlib.import_module('verl_fl_overlay')\n"
    "from verl.workers.engine.base import BaseEngine",
    "in a thread": "import threading\ndef go():\n    import verl.workers.engine.base\n"
    "t = threading.Thread(target=go); t.start(); t.join()\nfrom verl.workers.engine.base import BaseEngine",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_orders(order):
    program = f"""{ORDERS[order]}
from verl_fl_overlay.phase import training
class E(BaseEngine):
    def forward_backward_batch(self, *a, **k): return training.depth
print(E().infer_batch({{}}))"""
    assert output(program, env=OVERLAY, start=run if order == "overlay first" else warm) == "1"


def test_overlay_imported_by_hand_after_the_engines():
    program = """
    from verl.workers.engine.base import BaseEngine
    import verl_fl_overlay
    from verl_fl_overlay.phase import training
    class E(BaseEngine):
        def forward_backward_batch(self, *a, **k): return training.depth
    print(E().infer_batch({}))"""
    assert output(program, env={**PLAIN, "VERL_FL_DEVICE": "cpu"}, start=warm) == "1"


MODULES = "import verl, sys, json; print(json.dumps(sorted(sys.modules)))"


@pytest.fixture(scope="module")
def plain_modules():
    """Return what verl alone imports."""
    return set(json.loads(output(MODULES, env=PLAIN, start=warm)))


@SHARES_THE_MODULES
def test_entry_point_alone_loads_it_where_verl_looks_for_plugins(plain_modules):
    assert ("verl_fl_overlay" in json.loads(output(MODULES, env={}, start=warm))) == (VERL >= "0.9")
    assert "verl_fl_overlay" not in plain_modules


def test_removal_is_exact():
    program = """
    import sys
    from verl.utils import device
    from verl.workers.engine import base
    import torch.distributed
    places = [(base.BaseEngine, "train_batch"), (base.BaseEngine, "infer_batch"), (base.EngineRegistry, "new"),
              (base.BaseEngineCtx, "__enter__"), (base.BaseEngineCtx, "__exit__"), (device, "get_nccl_backend"),
              (torch.distributed, "init_process_group"), (base.EngineRegistry, "get_engine_cls")]
    before = [vars(owner)[name] for owner, name in places]
    import verl_fl_overlay
    from verl_fl_overlay import activation
    during = [vars(owner)[name] for owner, name in places]
    activation.deactivate()
    after = [vars(owner)[name] for owner, name in places]
    assert sum(a is not b for a, b in zip(before, during)) >= 7
    print(all(a is b for a, b in zip(before, after)))"""
    assert output(program, env={**PLAIN, "VERL_FL_DEVICE": "cpu"}, start=warm) == "True"


@SHARES_THE_MODULES
def test_loading_imports_nothing_heavy(plain_modules):
    more = set(json.loads(output(MODULES, env={**OVERLAY, **PLAIN}, start=warm))) - plain_modules
    heavy = {m for m in more if m.split(".")[0] in {"torch", "verl", "flag_gems", "transformers", "rich", "yaml"}}
    assert "verl_fl_overlay" in more
    assert not heavy


def test_disabled_hook_has_no_effect():
    program = """
    import verl
    from verl.workers.engine.base import BaseEngine
    from verl_fl_overlay.phase import training
    class E(BaseEngine):
        def forward_backward_batch(self, *a, **k): return training.depth
    print(E().infer_batch({}))"""
    assert output(program, env={**OVERLAY, "VERL_FL_DISABLE": "engine.infer_batch"}, start=warm) == "0"
    assert output(program, env={**OVERLAY, "VERL_FL_DISABLE": "*"}, start=warm) == "0"


def test_leaving_left_out_leaves_no_phase_on():
    program = (
        STUB
        + """
    engine = EngineRegistry.new("stub", "stub")
    with engine.train_mode():
        engine.train_batch({}, lambda: None)
    print(seen[-1], phase.training.depth)"""
    )
    environment = {**OVERLAY, "VERL_FL_DISABLE": "engine.exit"}
    assert output("import verl\n" + program.replace("\n    ", "\n"), env=environment, start=warm) == "left 0"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"VERL_FL_DISABLE": "engine.infer_bach"}, "'engine.infer_bach': did you mean engine.infer_batch"),
        ({"VERL_FL_DEVICE": "tpu"}, "VERL_FL_DEVICE='tpu': allowed is one of 'auto', 'cpu'"),
    ],
)
def test_bad_settings_stop_the_import(setting, said):
    done = python("import verl", env={**OVERLAY, **setting}, start=warm)
    assert done.returncode == 1
    assert said in done.stderr


def test_verl_itself_fails_on_a_space_in_the_list():
    done = python("import verl", env={**OVERLAY, "VERL_USE_EXTERNAL_MODULES": "verl_fl_overlay, json"}, start=warm)
    assert "No module named ' json'" in done.stderr


BASE = "verl/workers/engine/base.py"


def edited(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """Return ``folder`` with a copy of this verl in it; an edit is a file, a text in it and what takes its place."""
    import importlib.util

    spec = importlib.util.find_spec("verl")
    shutil.copytree(Path(spec.origin).parent, folder / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in edits:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="module")
def renamed(tmp_path_factory) -> Path:
    """Return a copy of this verl in which a hooked method has another name."""
    return edited(tmp_path_factory.mktemp("renamed"), (BASE, "def infer_batch(", "def forward_batch("))


def test_renamed_target_is_refused_whole(renamed):
    program = """
    import verl
    from verl.utils import device
    hooked = type(device.get_nccl_backend).__name__
    for attempt in range(2):
        try:
            import verl.workers.engine.base
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[0])
        else:
            raise SystemExit("imported")
    from verl_fl_overlay import activation
    states = {s.state.value for s in activation.active().hooks.report()}
    print(states <= {"removed", "failed", "disabled"}, type(device.get_nccl_backend).__name__)"""
    done = python(program, env={**OVERLAY, "PYTHONPATH": str(renamed)}, start=warm)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    said = "HookError hook 'engine.infer_batch' cannot be put on verl.workers.engine.base:BaseEngine.infer_batch"
    assert [line.startswith(said) for line in lines[-3:-1]] == [True, True]
    assert lines[-1] == "True function"


def test_doctor_refuses_the_renamed_target(renamed):
    done = warm("-m", "verl_fl_overlay", "doctor", env={**OVERLAY, "PYTHONPATH": str(renamed)})
    assert done.returncode == 1
    assert "NOT SUPPORTED" in done.stdout
    assert "BaseEngine has no infer_batch" in done.stdout or "has no BaseEngine.infer_batch" in done.stdout
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("engine.infer_batch ")]
    assert row[:3] == ["engine.infer_batch", "yes", "missing"], "it is listed without --all"


def test_doctor_tells_what_was_edited_and_what_cannot_be_tried(tmp_path):
    module = "verl.workers.engine.fsdp.transformer_impl"
    fsdp = f"{module.replace('.', '/')}.py"
    folder = edited(
        tmp_path,
        (BASE, "engine_cls(*args, **kwargs)", "engine_cls(*args, **kwargs, more=1)"),
        ("verl/utils/model.py", "def load_valuehead_model(local_path,", "def load_valuehead_model(folder,"),
        (fsdp, "class FSDPEngine(", "raise OSError('no such device')\nclass FSDPEngine("),
    )
    done = warm("-m", "verl_fl_overlay", "doctor", "--json", env={**OVERLAY, "PYTHONPATH": str(folder)})
    assert done.returncode == 1
    report = json.loads(done.stdout)
    hooks = {hook["name"]: hook for hook in report["hooks"]}
    assert hooks["engine.new"]["pinned"] == "body differs"
    assert hooks["engine.new"]["state"] == "installed"
    assert hooks["attention.value_model"]["pinned"] == "parameters differ"
    assert hooks["attention.value_model"]["state"] == "failed"
    assert hooks["engine.enter"]["pinned"] == "yes"
    untried = [problem for problem in report["problems"] if "cannot be tried" in problem]
    required = [h["name"] for h in report["hooks"] if h["required"] and h["target"].startswith(f"{module}:")]
    assert "engine.initialize.fsdp" in required
    for name, problem in zip(required, untried, strict=True):
        assert problem.startswith(f"hook {name} cannot be tried: import of ")
        assert problem.endswith(" raises OSError: no such device")


def test_git_checkout_of_this_release_gets_the_same_shim(tmp_path, renamed):
    """Git tags call themselves X.dev; the same tree must get the same hooks as its wheel."""
    import importlib.util

    spec = importlib.util.find_spec("verl")
    (tmp_path / "verl").symlink_to(Path(spec.origin).parent)
    program = "from verl_fl_overlay import compat; s = compat.select(compat.InstalledVerl({!r}, {!r})); print(s.name)"
    folder = str(tmp_path / "verl")
    wheel = output(program.format(VERL, folder), env=PLAIN)
    assert output(program.format(f"{VERL}.dev0", folder), env=PLAIN) == wheel
    assert wheel == "v" + "_".join(VERL.split(".")[:2])
