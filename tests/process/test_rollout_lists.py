"""The lists that the plugins end up with in a process of rollout and in its workers; the plugins are stand-ins."""

from __future__ import annotations

import json

import pytest
import vllm_plugin
from processes import OVERLAY, python

pytest.importorskip("torch")
pytest.importorskip("verl")
pytest.importorskip("yaml")

SERVER = """
    import verl, vllm_fl
    vllm_fl.register()
    vllm_fl.register()
    print(vllm_fl.in_a_worker("metax"))
"""


def lists(folder, version="newer", **environment):
    """Return what the plugin reads in a worker of a rollout server, and what the server said."""
    vllm_plugin.write(folder, version)
    env = {**OVERLAY, "GEMS_VENDOR": "metax", "PYTHONPATH": str(folder), **environment}
    done = python(SERVER, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    read, has_verl = json.loads(done.stdout.splitlines()[-1])
    assert not has_verl
    return read, [line[line.index("VLLM_FL") :] for line in done.stderr.splitlines() if ": added " in line]


def test_a_list_extends_the_chips_own_and_it_is_said_once(tmp_path):
    read, said = lists(tmp_path, VLLM_FL_FLAGOS_BLACKLIST=" softmax , copy_")
    assert read == {"flagos_blacklist": ["softmax", "copy_", "index"], "oot_blacklist": ["rotary_embedding"]}
    file = tmp_path / "vllm_fl/dispatch/config/metax.yaml"
    assert said == [
        f"VLLM_FL_FLAGOS_BLACKLIST: added index from {file}, whose list it would have replaced "
        "(VERL_FL_DISABLE=rollout.lists keeps yours)"
    ]


def test_custom_operators_too(tmp_path):
    read, said = lists(tmp_path, VLLM_FL_OOT_BLACKLIST="rms_norm")
    assert read == {"flagos_blacklist": ["copy_", "index"], "oot_blacklist": ["rms_norm", "rotary_embedding"]}
    assert len(said) == 1


def test_exactly_this_list_is_a_file_or_a_hook_left_out(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("flagos_blacklist: [softmax]")
    read, said = lists(tmp_path / "file", VLLM_FL_CONFIG=str(mine))
    assert (read["flagos_blacklist"], said) == (["softmax"], [])
    left_out = {"VLLM_FL_FLAGOS_BLACKLIST": "softmax", "VERL_FL_DISABLE": "rollout.lists"}
    read, said = lists(tmp_path / "hook", **left_out)
    assert (read["flagos_blacklist"], said) == (["softmax"], [])


def test_a_list_extends_the_users_file(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("flagos_blacklist: [mm]")
    read, _ = lists(tmp_path, VLLM_FL_CONFIG=str(mine), VLLM_FL_FLAGOS_BLACKLIST="softmax")
    assert read == {"flagos_blacklist": ["softmax", "mm"], "oot_blacklist": []}


def test_a_version_that_reads_no_lists_from_a_file_keeps_the_chips_own(tmp_path):
    """Until August 2026 at least: the file's list counted for nothing, and the chip's own came back into use."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("prefer: vendor\nflagos_blacklist: [sort]")
    environment = {"VLLM_FL_CONFIG": str(mine), "VLLM_FL_FLAGOS_BLACKLIST": "mm"}
    read, said = lists(tmp_path, "older", **environment)
    assert read == {"flagos_blacklist": ["mm", "copy_", "index"], "oot_blacklist": ["rotary_embedding"]}
    assert len(said) == 1


@pytest.mark.parametrize("call", ["activate_platform", "load_plugin"])
def test_sglangs_lists_extend_the_chips_own(tmp_path, call):
    """verl's server only asks for the platform; the processes that load the plugin come from it."""
    vllm_plugin.write_sglang(tmp_path)
    code = f"import json, verl, sglang_fl; sglang_fl.{call}(); print(json.dumps(sglang_fl.lists('musa')))"
    own = {"SGLANG_FL_FLAGOS_BLACKLIST": "softmax", "SGLANG_FL_OOT_BLACKLIST": "RMSNorm"}
    env = {**OVERLAY, "GEMS_VENDOR": "mthreads", "PYTHONPATH": str(tmp_path), **own}
    done = python(code, env=env)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "flagos_blacklist": ["softmax", "mm", "cumsum"],
        "oot_blacklist": ["RMSNorm", "TopK"],
    }, done.stderr[-3000:]
    done = python(code, env={**env, "VERL_FL_DISABLE": "rollout.sglang_lists"})
    assert json.loads(done.stdout.splitlines()[-1])["flagos_blacklist"] == ["softmax"], done.stderr[-3000:]
    done = python(code, env={**env, "SGLANG_FL_CONFIG": str(tmp_path / "no.yaml")})
    assert json.loads(done.stdout.splitlines()[-1])["oot_blacklist"] == ["RMSNorm", "TopK"], done.stderr[-3000:]


def test_lists_to_which_nothing_of_a_chip_is_added_are_told_once(tmp_path):
    vllm_plugin.write(tmp_path)
    environment = {"GEMS_VENDOR": "hygon", "VLLM_FL_FLAGOS_BLACKLIST": "softmax", "PYTHONPATH": str(tmp_path)}
    done = python(SERVER, env={**OVERLAY, **environment})
    assert done.stderr.count("has no configuration for hygon here (GEMS_VENDOR=hygon)") == 1, done.stderr[-3000:]


def test_a_file_that_cannot_be_read_stops_verl_where_that_is_asked_for(tmp_path):
    """Raised in the plugin it would be lost in vLLM, which then goes on without the plugin."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("flagos_blacklist: [mm]\nflagos_blacklist: [sort]")
    environment = {"VLLM_FL_CONFIG": str(mine), "VLLM_FL_FLAGOS_BLACKLIST": "softmax", "VERL_FL_STRICT": "1"}
    done = python("import verl", env={**OVERLAY, **environment})
    assert done.returncode == 1
    assert (
        f"OverlayError: {mine} says flagos_blacklist twice, and only the last counts; keep one of them" in done.stderr
    )
