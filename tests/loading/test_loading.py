"""The overlay in processes that start in unusual ways.

Each test asks verl for what the overlay changes: its backend on a CPU, or what happens inside an engine's mode.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from processes import OVERLAY, clean_environment, output, run

import verl_fl_overlay
from verl_fl_overlay import compat

pytest.importorskip("verl", reason="needs verl", exc_type=ImportError)


def program(*parts: str) -> str:
    return "\n".join(textwrap.dedent(part) for part in parts)


BACKEND = "import verl; from verl.utils.device import get_nccl_backend; print(get_nccl_backend())"

MODE = """
    from verl.workers.engine.base import BaseEngine, BaseEngineCtx, EngineRegistry
    from verl_fl_overlay import events, phase

    class Engine(BaseEngine):
        is_param_offload_enabled = is_optimizer_offload_enabled = False
        def __init__(self): pass
        def to(self, **kwargs): pass

    def inside():
        with BaseEngineCtx(Engine(), "train"):
            return phase.training.depth
"""


def test_fork_and_spawn_after_loading(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(f"def backend():\n    {BACKEND.replace('print', 'return ')}\n")
    code = program(
        "import verl",
        MODE,
        """
    import multiprocessing, child
    def forked():
        outer = phase.training.depth
        return child.backend(), outer, inside(), phase.training.depth
    if __name__ == "__main__":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            forks = pool.apply(forked)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(forks, pool.apply(child.backend))
    """,
    )
    assert output(code, env={**OVERLAY, "PYTHONPATH": str(tmp_path)}) == "('gloo', 0, 1, 0) gloo"


def test_threads_import_verl_at_once() -> None:
    """verl first: threads that import verl and its submodules at once deadlock in Python, without the overlay too."""
    code = program(
        """
    import importlib, threading

    def at_once(modules):
        start, failures = threading.Barrier(len(modules)), []
        def work(name):
            start.wait()
            try:
                importlib.import_module(name)
            except BaseException as error:
                failures.append(repr(error))
        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in modules]
        for thread in threads: thread.start()
        for thread in threads: thread.join(240)
        return failures + [thread.name for thread in threads if thread.is_alive()]

    failures = at_once(["verl"] * 8)
    failures += at_once(["verl.workers.engine.base", "verl.utils.model", "verl.utils.device"] * 3)
        """,
        MODE,
        """
    from verl.utils.device import get_nccl_backend
    print(failures, get_nccl_backend(), inside())
        """,
    )
    assert output(code, env=OVERLAY) == "[] gloo 1"


def test_reload() -> None:
    """A reloaded verl makes new functions; the overlay, reloaded too, does not wrap anything twice."""
    code = program(
        "import importlib, verl",
        MODE,
        """
    import verl_fl_overlay
    built = []
    events.engine_built.subscribe(built.append)
    EngineRegistry._engines.setdefault("x", {}).setdefault("x", {})["cpu"] = Engine
    for module in (verl_fl_overlay, verl, verl_fl_overlay):
        importlib.reload(module)
    EngineRegistry.new("x", "x")
    print(len(built), inside(), phase.training.depth)
    """,
    )
    assert output(code, env=OVERLAY) == "1 1 0"


@pytest.mark.parametrize("how", ["wrapt", "setattr"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_plugin_on_the_same_functions(how: str, when: str, tmp_path: Path) -> None:
    """Both are called, whoever came first."""
    (tmp_path / "another.py").write_text(
        """
calls = []

def patch(how):
    from verl.workers.engine.base import BaseEngineCtx, EngineRegistry
    if how == "wrapt":
        import wrapt

        @wrapt.patch_function_wrapper("verl.workers.engine.base", "BaseEngineCtx.__enter__")
        def enter(wrapped, instance, args, kwargs):
            calls.append("enter")
            return wrapped(*args, **kwargs)

        @wrapt.patch_function_wrapper("verl.workers.engine.base", "EngineRegistry.new")
        def new(wrapped, instance, args, kwargs):
            calls.append("new")
            return wrapped(*args, **kwargs)
    else:
        original_enter, original_new = BaseEngineCtx.__enter__, EngineRegistry.new

        def enter(self):
            calls.append("enter")
            return original_enter(self)

        def new(cls, *args, **kwargs):
            calls.append("new")
            return original_new(*args, **kwargs)

        BaseEngineCtx.__enter__ = enter
        EngineRegistry.new = classmethod(new)
"""
    )
    (tmp_path / "another_first.py").write_text(f"import another\nanother.patch({how!r})\n")
    code = program(
        f"import verl, another\nif {when!r} == 'after': another.patch({how!r})",
        MODE,
        """
    built = []
    events.engine_built.subscribe(built.append)
    # A plugin that imports the engines first lets verl choose its device before the overlay can say "cpu".
    EngineRegistry._engines["x"] = {"x": {"cpu": Engine, "cuda": Engine}}
    EngineRegistry.new("x", "x")
    print(inside(), phase.training.depth, len(built), another.calls)
    """,
    )
    first = "another_first," if when == "before" else ""
    env = {**OVERLAY, "VERL_USE_EXTERNAL_MODULES": f"{first}verl_fl_overlay", "PYTHONPATH": str(tmp_path)}
    assert output(code, env=env) == "1 0 1 ['new', 'enter']"


def test_cloudpickle_of_engines_configurations_and_functions() -> None:
    """What Ray sends: an object of a hooked class, a configuration of verl's, hooked functions and methods."""
    code = program(
        "import verl",
        MODE,
        """
    import cloudpickle
    from verl.utils import model
    from verl.workers.config import FSDPEngineConfig

    def again(value):
        return cloudpickle.loads(cloudpickle.dumps(value))

    mode = again(BaseEngineCtx(Engine(), "train"))
    with mode:
        depth = phase.training.depth
    config = again(FSDPEngineConfig(strategy="fsdp2"))
    print(
        depth,
        config.strategy,
        again(model.load_valuehead_model) is model.load_valuehead_model,
        again(EngineRegistry.get_engine_cls).__self__ is EngineRegistry,
        again(Engine().train_batch).__func__.__name__,
        again(lambda: inside())(),
    )
    """,
    )
    assert output(code, env=OVERLAY) == "1 fsdp2 True True train_batch 1"


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        pytest.param(["-O"], {}, id="python -O"),
        pytest.param(["-OO"], {"PYTHONDONTWRITEBYTECODE": "1"}, id="python -OO, no bytecode"),
        pytest.param([], {"HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere"}, id="no home directory"),
        pytest.param([], {"WRAPT_DISABLE_EXTENSIONS": "1"}, id="wrapt without its extension"),
    ],
)
def test_interpreter(options: list[str], environment: dict[str, str]) -> None:
    done = run(*options, "-c", BACKEND, env={**OVERLAY, **environment})
    assert done.stdout.strip().endswith("gloo"), done.stderr[-3000:]


def package(folder: Path) -> dict[str, Path]:
    """Return where each file of the installed overlay goes under ``folder``."""
    own, shims = Path(verl_fl_overlay.__file__).parent, Path(compat.__file__).parent
    files = {f"verl_fl_overlay/{file.relative_to(own).as_posix()}": file for file in own.rglob("*") if file.is_file()}
    files |= {
        f"verl_fl_overlay/compat/{file.relative_to(shims).as_posix()}": file
        for file in shims.rglob("*")
        if file.is_file()
    }
    return {name: file for name, file in files.items() if "__pycache__" not in name}


def test_from_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "overlay.whl", "w") as zipped:
        for name, file in package(tmp_path).items():
            zipped.write(file, name)
    code = BACKEND + (
        "\nimport verl_fl_overlay, verl_fl_overlay.compat.pins as pins"
        "\nprint(verl_fl_overlay.__file__.split('/')[-3:-1], get_nccl_backend(), len(pins.load('0.9.1')) > 5)"
    )
    said = output(code, env={**OVERLAY, "PYTHONPATH": str(tmp_path / "overlay.whl")})
    assert said == "['overlay.whl', 'verl_fl_overlay'] gloo True"


def test_from_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    for name, file in package(tmp_path).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(file.read_bytes())
    folders = [folder for folder in tmp_path.rglob("*") if folder.is_dir()]
    # Python keeps no bytecode elsewhere unless told; root could write anyway, so what is there is compared.
    before = sorted(tmp_path.rglob("*"))
    for folder in folders:
        folder.chmod(0o555)
    try:
        code = BACKEND + "\nimport verl_fl_overlay; print(verl_fl_overlay.__file__, get_nccl_backend())"
        env = {**OVERLAY, "PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(tmp_path.parent / "bytecode")}
        assert output(code, env=env) == f"{tmp_path}/verl_fl_overlay/__init__.py gloo"
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_eight_processes_start_at_once() -> None:
    environment = clean_environment(OVERLAY)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BACKEND], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(8)
    ]
    results = [process.communicate(timeout=500) for process in started]
    assert [out.decode().strip().splitlines()[-1:] for out, _ in results] == [["gloo"]] * 8, results[0][1][-2000:]
    assert os.getpid() not in {process.pid for process in started}
