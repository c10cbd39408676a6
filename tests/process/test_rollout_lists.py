"""The lists that vllm-plugin-FL ends up with in a process of rollout and in its workers; the plugin is a stand-in."""

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


def lists(folder, **environment):
    """Return what the plugin reads in a worker of a rollout server, and what the server said."""
    vllm_plugin.write(folder)
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
