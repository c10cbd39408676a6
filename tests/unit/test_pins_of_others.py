"""Packages beside verl: what hooks use of transformers is pinned, verified, checked and reported like verl's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import verl_trees
from verl_trees import from_no_index  # noqa: F401

from verl_fl_overlay import cli, compat
from verl_fl_overlay.cli import doctor
from verl_fl_overlay.cli.check import as_text
from verl_fl_overlay.compat import pins
from verl_fl_overlay.compat.pins import PACKAGES, VERL, Package
from verl_fl_overlay.compat.release import check, pinning, sources
from verl_fl_overlay.compat.release.check import Outcome, Status
from verl_fl_overlay.compat.release.sources import Tree, opened
from verl_fl_overlay.errors import HookError, OverlayError
from verl_fl_overlay.hooks import Hook

FOLDER = Path(compat.__file__).parent
OTHERS = [package for package in PACKAGES.values() if package != VERL]
TRANSFORMERS = PACKAGES["transformers"]
FLASH = "transformers.modeling_flash_attention_utils"
MEGATRON = Package("megatron", "megatron-core", "megatron/core/package_info.py")
each_package = pytest.mark.parametrize("package", OTHERS, ids=lambda package: package.distribution)
each_release = pytest.mark.parametrize(
    ("package", "release"), [(p, release) for p in OTHERS for release in p.releases], ids=str
)


def hook(name: str) -> Hook:
    return next(h for h in compat.select(compat.InstalledVerl(compat.RELEASES[-1], "")).hooks if h.name == name)


@each_release
def test_all_that_hooks_use_is_pinned(package: Package, release: str) -> None:
    pinned = pins.load(release, package=package)
    used = pinning.targets(pinning.hooks_that_use(package), package)
    assert sorted(pinned) == used, "the hooks changed: run verl-fl pin --write for every pinned release"
    assert [target for target, pin in pinned.items() if pin.kind == "missing"] == []


@each_release
def test_pins_are_what_the_release_has(package: Package, release: str) -> None:
    tree = verl_trees.tree(release, package)
    file = FOLDER / package.folder / f"{release}.json"
    assert pinning.as_text(pinning.pins_of(tree)) == file.read_text(encoding="utf-8")
    assert check.check(tree).verdict == f"{package.distribution} {release} works"


@each_package
def test_a_package_has_pins_and_hooks_and_is_no_release_of_verl(package: Package) -> None:
    assert {file.stem for file in (FOLDER / package.folder).iterdir()} == set(package.releases) != set()
    assert pinning.hooks_that_use(package)
    assert package.distribution not in compat.RELEASES


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder with the newest pinned transformers, as far as hooks use it, and with what it says of itself."""
    for path, text in verl_trees.read_for_pins(verl_trees.newest(TRANSFORMERS)).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


def tree_of(site: Path) -> Tree:
    return Tree(site, "a copy", package=TRANSFORMERS)


def edit(site: Path, module: str, old: str, new: str) -> None:
    file = site / f"{module.replace('.', '/')}.py"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def found_in(site: Path) -> tuple[check.Report, dict[str, check.Finding]]:
    report = check.check(tree_of(site), source_of=verl_trees.find)
    return report, {finding.hook.name: finding for finding in report.findings}


def test_untouched(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(site)]) == 0
    first, versions, *_, verdict = capsys.readouterr().out.splitlines()
    version = tree_of(site).version
    assert first == f"transformers {version} from folder {site}, hooks of every verl release"
    assert versions == f"transformers {version} (pinned: {', '.join(TRANSFORMERS.releases)})"
    assert verdict == f"transformers {version} works"


def test_renamed_function(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(site, FLASH, "def is_flash_attn_available(", "def is_some_flash_attn_available(")
    assert cli.main(["check", str(site / "transformers")]) == 0
    said = capsys.readouterr().out
    version = tree_of(site).version
    assert f"MOVED {FLASH}:is_flash_attn_available -> {FLASH}:is_some_flash_attn_available" in said
    assert f"(against transformers {version})" in said
    # the hooks of one feature on one module go together
    assert said.splitlines()[-1] == f"transformers {version} works with less: attention.functions, attention.available"


def test_changed_parameters(site: Path) -> None:
    edit(site, FLASH, "def is_flash_attn_available(", "def is_flash_attn_available(implementation")
    report, findings = found_in(site)
    target = findings["attention.available"].target
    assert (target.status, target.breaks) == (Status.SIGNATURE, True)
    assert target.detail == "function () -> function (implementation)"
    assert target.diff[0].startswith("--- transformers ")
    assert findings["attention.available"].outcome is Outcome.WITHOUT
    assert report.holds
    assert " works with less: " in report.verdict


def test_parameters_of_another_pinned_version(site: Path) -> None:
    """Hooks know them, so they are no reason to go without."""
    text = (site / "transformers/modeling_utils.py").read_text(encoding="utf-8")
    begins = text.index("    def _check_and_adjust_attn_implementation(")
    header = text[begins : text.index(":\n", begins)]
    edit(
        site,
        "transformers.modeling_utils",
        header,
        header.partition("(")[0] + "(self, attn_implementation, is_init_check=False)",
    )
    report, findings = found_in(site)
    target = findings["attention.dispatch"].target
    assert target.detail.endswith(", which is that of transformers 4.57.6")
    assert findings["attention.dispatch"].outcome is Outcome.REVIEW
    assert report.verdict.endswith(" works, review these: attention.dispatch")


def test_changed_body(site: Path) -> None:
    header = "def is_flash_attn_available():\n"
    edit(site, FLASH, header, f"{header}    print('asked')\n")
    report, findings = found_in(site)
    assert findings["attention.available"].target.status is Status.BODY
    assert any(line == "+    print('asked')" for line in findings["attention.available"].target.diff)
    assert report.verdict.endswith(" works, review these: attention.available")


def test_module_that_is_gone(site: Path) -> None:
    (site / f"{FLASH.replace('.', '/')}.py").unlink()
    report, findings = found_in(site)
    assert findings["attention.functions"].target.detail == f"the module {FLASH} is gone"
    assert {name for name, f in findings.items() if f.outcome is Outcome.WITHOUT} >= {
        "attention.dispatch",
        "attention.functions",
        "attention.available",
        "attention.lengths",
    }
    assert report.holds, "none of them is required"


def test_name_of_an_input_that_is_gone(site: Path) -> None:
    """The lengths' names are declared and nowhere assigned: the hook is put on, and the input is not as it was."""
    edit(site, FLASH, "    max_length_q: ", "    longest_q: ")
    report, findings = found_in(site)
    assert findings["attention.lengths"].meaning.startswith("attention goes on with less: the hook is installed")
    assert f"{FLASH}:FlashAttentionKwargs.max_length_q" in findings["attention.lengths"].meaning
    assert "; what it relies on: MISSING" in as_text(report, wide=True)


def test_required_hook(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = tuple(dataclasses.replace(h, required=True) for h in pinning.hooks_that_use(TRANSFORMERS))
    monkeypatch.setattr(pinning, "hooks_that_use", lambda package: every)
    edit(site, FLASH, "def is_flash_attn_available(", "def is_some_flash_attn_available(")
    report, findings = found_in(site)
    refused = f"verl-fl-overlay will refuse to load on transformers {report.version}: "
    assert report.verdict == f"{refused}attention.available"
    assert f"refuses to load when {FLASH} is imported" in findings["attention.available"].meaning


def test_with_a_verl_the_installed_one_is_compared(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(site, FLASH, "def is_flash_attn_available(", "def is_some_flash_attn_available(")
    monkeypatch.setattr(sources, "folders", lambda name: [str(site / name)] if name == "transformers" else [])
    verl = verl_trees.newest()
    version = tree_of(site).version
    assert cli.main(["check", str(verl.folder)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[1] == f"transformers {version} (pinned: {', '.join(TRANSFORMERS.releases)})"
    assert f"(against transformers {version})" in said
    assert said.splitlines()[-1] == f"verl {verl.version} works with less: attention.functions, attention.available"
    assert cli.main(["check", str(verl.folder), "--json", "--against", verl.version]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["packages"] == {"transformers": {"version": version, "pinned": list(TRANSFORMERS.releases)}}


def test_with_a_verl_and_nothing_installed_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "folders", lambda name: [])
    assert cli.main(["check", str(verl_trees.newest().folder), "--all", "--wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"transformers not installed (pinned: {', '.join(TRANSFORMERS.releases)})"
    (line,) = [line for line in lines if line.startswith("attention.dispatch")]
    assert line.endswith("not compared: transformers is not installed here")
    (line,) = [line for line in lines if line.startswith("attention.lengths ")]
    assert line.endswith("  OK"), "what is not here is no worse than what is"
    (line,) = [line for line in lines if line.startswith("ray.init")]
    assert line.endswith("not compared: nothing in ray is pinned")


def test_doctor_names_the_versions_once() -> None:
    packages = {"transformers": {"version": "5.11.0", "pinned": ["4.57.6", "5.10.4"]}}
    result = dict.fromkeys(("overlay", "overlay folder", "torch", "device", "summary"), "")
    result |= {
        "versions": {},
        "components": {},
        "settings": {},
        "features": {},
        "hooks": [],
        "problems": [],
        "packages": packages,
    }
    result |= {"verl": {"version": "0.9.1", "shim": "", "supported": True}}
    assert doctor.as_text(result).count("transformers     5.11.0 (pinned: 4.57.6, 5.10.4)") == 1


@pytest.mark.parametrize("version", ["5.9.0.post1", "5.11.0", "4.0.0", "of a vendor"])
def test_any_version_is_compared_with_one_that_is_near(version: str, site: Path) -> None:
    version_file = site / TRANSFORMERS.version_file
    text = version_file.read_text(encoding="utf-8")
    version_file.write_text(text.replace(tree_of(site).version, version), encoding="utf-8")
    report, findings = found_in(site)
    nearest = {"5.9.0.post1": "5.9.0", "4.0.0": "4.57.6"}.get(version, TRANSFORMERS.releases[-1])
    assert findings["attention.functions"].target.against == nearest
    assert report.verdict.startswith(f"transformers {version} works")


# What the process itself says, of live functions.


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return a module that stands for transformers' functions, as they are in its newest pinned release."""
    module = types.ModuleType(FLASH)
    exec(
        "def _lazy_imports(implementation, attention_wrapper=None, allow_all_kernels=False): ...\n"
        "def _pad_input(hidden_states, indices, batch, seqlen): ...\n"
        "def _unpad_input(hidden_states, attention_mask, unused_mask=None): ...\n",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, FLASH, module)
    return module


def test_live_function_as_in_any_pinned_version(loaded: types.ModuleType) -> None:
    pins.verify(hook("attention.functions"), loaded._lazy_imports)
    pins.verify(hook("attention.functions"), lambda implementation: None)


def test_live_function_with_other_parameters(loaded: types.ModuleType) -> None:
    def _lazy_imports(kind: Any) -> None: ...

    oldest, newest = (
        rf"as in transformers {release}" for release in (TRANSFORMERS.releases[0], TRANSFORMERS.releases[-1])
    )
    with pytest.raises(HookError, match=rf"it is function \(kind\), expected .* {oldest} or function .* {newest}$"):
        pins.verify(hook("attention.functions"), _lazy_imports)


def test_live_reliance_that_is_gone(loaded: types.ModuleType) -> None:
    del loaded._pad_input
    with pytest.raises(HookError, match=f"relies on {FLASH}:_pad_input, which is not there"):
        pins.verify(hook("attention.functions"), loaded._lazy_imports)
    loaded.__getattr__ = lambda name: None  # as transformers' own modules give names when they are asked for
    pins.verify(hook("attention.functions"), loaded._lazy_imports)


def test_live_wrapper_of_others(loaded: types.ModuleType) -> None:
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> None: ...

    wrapper.__module__ = "verl.models.transformers.monkey_patch"
    pins.verify(hook("attention.functions"), wrapper)
    wrapper.__module__ = FLASH
    with pytest.raises(HookError, match=r"is function \(first, \*args, \*\*kwargs\)"):
        pins.verify(hook("attention.functions"), wrapper)


def test_pins_are_read_when_a_target_of_theirs_is_verified(loaded: types.ModuleType) -> None:
    """Not before: whoever hooks nothing in transformers does not pay for its pins."""
    program = """
        import json, sys
        from verl_fl_overlay import compat
        from verl_fl_overlay.compat import pins

        read = []
        get = pins.pkgutil.get_data
        pins.pkgutil.get_data = lambda package, file: (read.append(file), get(package, file))[1]
        hooks = {h.name: h for h in compat.select(compat.InstalledVerl(compat.RELEASES[-1], "")).hooks}
        pins.verify(hooks["engine.train_batch"], lambda self, data, loss_function: None)
        pins.verify(hooks["attention.patch"], lambda *args, **kwargs: None)  # relies on modules that are not loaded
        before = list(read)
        pins.verify(hooks["attention.functions"], lambda implementation: None)
        print(json.dumps([before, read[len(before):]]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before == [f"pins/{release}.json" for release in compat.RELEASES]
    assert after == [f"pins/transformers/{release}.json" for release in TRANSFORMERS.releases]


@pytest.mark.parametrize("damage", ["cut", "removed", "all removed"])
def test_pins_that_are_damaged_or_gone(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER / "pins", tmp_path / "other_compat" / "pins")
    (tmp_path / "other_compat" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_compat", raising=False)  # that of the test before
    monkeypatch.setattr(pins, "__package__", "other_compat")
    pins.load.cache_clear()
    file = tmp_path / "other_compat" / TRANSFORMERS.folder / f"{TRANSFORMERS.releases[0]}.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:3000])
    else:
        file.unlink()
    told = rf"pins/transformers/{TRANSFORMERS.releases[0]}.json is missing or damaged"
    if damage == "all removed":
        monkeypatch.setattr(compat, "releases_in", lambda folder: ())
        told = "pins/transformers holds no pins"
    with pytest.raises(OverlayError, match=f"{told}.*: reinstall"):
        pins.verify(hook("attention.functions"), lambda implementation: None)


# A wheel, a folder, a release on the index; and a package that is not pinned yet.


FILES = {"transformers/__init__.py": '__version__ = "5.9.0"\n', "transformers/utils.py": "x = 1\n"}


def wheel(path: Path, files: dict[str, str]) -> str:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, text in files.items():
            zipped.writestr(name, text)
    return str(path)


def folder(path: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return str(path)


def test_what_a_target_holds_is_seen(tmp_path: Path) -> None:
    verl = {"verl/version/version": "0.9.1\n", "verl/models/transformers/__init__.py": '__version__ = "0"\n'}
    both = Path(folder(tmp_path / "both", {**FILES, **verl}))
    targets = {
        wheel(tmp_path / "t.whl", FILES): TRANSFORMERS,
        wheel(tmp_path / "sdist.zip", {f"t-5.9.0/src/{name}": text for name, text in FILES.items()}): TRANSFORMERS,
        wheel(tmp_path / "v.whl", verl): VERL,
        folder(tmp_path / "t", FILES): TRANSFORMERS,
        str(both): VERL,
        str(both / "verl"): VERL,
        str(both / "transformers"): TRANSFORMERS,
    }
    for target, package in targets.items():
        with opened(target) as tree:
            assert tree.package == package
            assert tree.version == {VERL: "0.9.1", TRANSFORMERS: "5.9.0"}[package]
    with opened(str(both / "transformers")) as tree:
        assert tree.files() == sorted(FILES)


def test_a_version_on_the_index_is_asked_for_by_name(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(package: Package, version: str, scratch: Path) -> None:
        asked.append((package, version))
        shutil.copytree(site / "transformers", scratch / "transformers")

    monkeypatch.setattr(sources, "_download", download)
    for target in ("transformers==5.9.0", "transformers==latest"):
        with opened(target) as tree:
            assert tree.package == TRANSFORMERS
    version = tree_of(site).version
    assert cli.main(["check", "transformers==5.9.0"]) == 0
    assert capsys.readouterr().out.endswith(f"transformers {version} works\n"), "also when the download is gone"
    assert asked == [(TRANSFORMERS, "5.9.0"), (TRANSFORMERS, "latest"), (TRANSFORMERS, "5.9.0")]
    with pytest.raises(OverlayError, match="no file, no folder and no version"), opened("numpy==2.0"):
        pass


def test_neither_verl_nor_another(tmp_path: Path) -> None:
    told = "does not hold verl or transformers: there is no verl/version/version or transformers/__init__.py in it"
    with pytest.raises(OverlayError, match=told), opened(folder(tmp_path, {"other/__init__.py": ""})):
        pass


def test_release_that_is_not_pinned(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(site), "--against", "5.8.0"]) == 2
    assert "transformers 5.8.0 is not pinned; pinned are 4.57.6, " in capsys.readouterr().err


def test_pinning_a_release(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "compat" / "pins").mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    monkeypatch.setattr(pinning, "__file__", str(checkout / "compat" / "release" / "pinning.py"))
    version = tree_of(site).version
    assert cli.main(["pin", str(site), "--write"]) == 0
    written = checkout / "compat/pins/transformers" / f"{version}.json"
    assert capsys.readouterr().out == f"{written}\n"
    assert written.read_text() == (FOLDER / f"pins/transformers/{version}.json").read_text()
    assert json.loads(written.read_text()).keys() == {"transformers", "functions"}

    written.unlink()
    edit(site, FLASH, "def is_flash_attn_available(", "def is_some_flash_attn_available(")
    assert cli.main(["pin", str(site), "--write"]) == 1
    lacks = f"transformers {version} has no {FLASH}:is_flash_attn_available"
    assert capsys.readouterr().err == f"verl-fl pin: nothing was written; {lacks}\n"
    assert not list(written.parent.iterdir())


CORE = {
    "megatron/core/package_info.py": "MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = ''\n\n"
    "VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\n"
    "__version__ = '.'.join(map(str, VERSION[:3])) + ''.join(VERSION[3:])\n",
    "megatron/core/optimizer.py": "from megatron.core.inner import step\n",
    "megatron/core/inner.py": "def step(self, closure=None): return closure\n",
}


def test_another_package_needs_a_row_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose top level is a namespace, and whose distribution has another name."""
    monkeypatch.setitem(PACKAGES, "megatron", MEGATRON)
    new = dataclasses.replace(
        hook("attention.functions"), name="new", module="megatron.core.optimizer", attribute="step"
    )
    new = dataclasses.replace(new, relies_on=())
    monkeypatch.setattr(pinning, "hooks_that_use", lambda package: (new,))
    (tmp_path / "checkout/compat/pins").mkdir(parents=True)
    (tmp_path / "checkout/pyproject.toml").touch()
    monkeypatch.setattr(pinning, "__file__", str(tmp_path / "checkout/compat/release/pinning.py"))
    made = wheel(tmp_path / "megatron_core.whl", CORE)
    assert cli.main(["pin", made, "--write"]) == 0
    written = tmp_path / "checkout/compat/pins/megatron-core/0.16.1.json"
    assert capsys.readouterr().out == f"{written}\n"
    pinned = json.loads(written.read_text())
    assert pinned["megatron-core"] == "0.16.1"
    assert pinned["functions"]["megatron.core.optimizer:step"]["at"] == "megatron.core.inner:step"

    with pytest.raises(OverlayError, match="pins/megatron-core holds no pins: reinstall"):
        pins.verify(new, lambda self: None)
    monkeypatch.setattr(compat, "releases_in", lambda folder: ("0.16.1",))
    prints = {target: pins.Fingerprint.from_json(pin) for target, pin in pinned["functions"].items()}
    monkeypatch.setattr(pins, "load", lambda release, part, package: prints)
    pins.verify(new, lambda self, closure=None: None)
    with pytest.raises(HookError, match=r"expected function \(self, closure=None\) as in megatron-core 0.16.1"):
        pins.verify(new, lambda self: None)
    assert cli.main(["check", made]) == 0
    assert capsys.readouterr().out.endswith("megatron-core 0.16.1 works\n")
    (tmp_path / "elsewhere/megatron/training").mkdir(parents=True)
    spread = [str(tmp_path / "elsewhere/megatron"), f"{folder(tmp_path / 'core', CORE)}/megatron"]
    monkeypatch.setattr(sources, "folders", lambda name: spread if name == "megatron" else [])
    installed = sources.installed(MEGATRON)
    assert installed is not None
    assert installed.version == "0.16.1"
