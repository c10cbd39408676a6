"""What ``verl-fl estimate`` says: fitted to some measurements, held to the others, refused where nothing is known."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cost as fit
import pytest

from verl_fl_overlay import cli
from verl_fl_overlay.cli import cost
from verl_fl_overlay.cli.cost import CHIPS, PHASES, Shape
from verl_fl_overlay.cli.estimate import responses

ROOT = Path(__file__).parents[2]
FIGURES = fit.figures()
COSTS = fit.fitted(FIGURES)
ERROR = 0.25
"""How far an estimate may be from a measured time to which nothing was fitted, relative to that."""

SHAPE = Shape(24, 896, 4864, 14, 2, 64, 151936, tied=True)
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


LARGE = {"num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
"""The shape of Qwen2.5-1.5B, beside ``CONFIG``: a model that its chip limits, not its host."""


def test_the_page_and_the_unit_costs_are_those_of_the_measurements():
    done = subprocess.run([sys.executable, ROOT / "tools" / "cost.py", "--check"], cwd="/", check=False)
    assert done.returncode == 0, "run: python tools/cost.py"


@pytest.mark.parametrize(
    ("figure", "says", "waiting"),
    [pytest.param(*row, id=f"{row[0].source}-{row[0].row}-{row[0].what}") for row in fit.held_out(FIGURES)],
)
def test_what_was_not_fitted_is_foretold(figure, says, waiting):
    """Where waiting for the host is more than a quarter of the time, the machine's host decides."""
    if waiting < says / 4:
        assert says == pytest.approx(figure.seconds, rel=ERROR)


def test_much_is_foretold():
    """The test above is about what it finds: other models, another card, all kinds of rows."""
    found = [figure for figure, says, waiting in fit.held_out(FIGURES) if waiting < says / 4]
    assert len(found) >= 12
    assert len({figure.parameters for figure in found}) >= 2
    assert {figure.chip for figure in found} == CHIPS.keys()
    assert {figure.stack for figure in found} >= {"padded", "padded overlay", "overlay"}


@pytest.mark.parametrize("figure", [figure for figure in FIGURES if figure.peak], ids=lambda f: f"{f.row}-{f.what}")
def test_the_memory_of_an_engine_is_foretold(figure):
    measured, says = figure.peak
    assert says == pytest.approx(measured, rel=0.1)


def test_work_is_counted_as_by_hand():
    """Two sequences of 3 and 5 tokens in a micro-batch: 8 tokens packed, 10 padded."""
    tiny = Shape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head=4, vocabulary=32, tied=False)
    layers, head = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16), 32 * 8
    assert tiny.parameters == layers + 2 * head
    packed = cost.work(tiny, [[5, 3]], "overlay", train=False)
    attention = 2 * 8 * 2 * (3**2 + 5**2)
    assert packed == {
        "products": 2 * 8 * (layers + head) + cost.ATTENTION * attention,
        "memory": 2 * 8 * 2 * (10 * 8 + 4 * 12 + 3 * 16) + 2 * 8 * 32,
        "host overlay infer": 2,
    }
    padded = cost.work(tiny, [[5, 3]], "padded", train=True, chips=2)
    assert padded["products"] == 2 * 10 * (4 * layers + 3 * head)
    assert padded["masked attention"] == 4.5 * 4 * 8 * 2 * 2 * 5**2
    assert padded["loop train"] == 8
    assert padded["link"] == tiny.parameters / 2 * 8
    assert cost.work(tiny, [[5, 3]], "flash-attn", train=True, entropy=True)["entropy train"] == 2 * 8 * 32


def test_micro_batches_are_as_few_as_fit():
    lengths = [700, 650, 600, 400, 300, 100, 50]
    made = cost.micro_batches(lengths, tokens=1000)
    assert sorted(n for rows in made for n in rows) == sorted(lengths)
    assert len(made) == 3
    assert max(map(sum, made)) <= 1000
    assert len(cost.micro_batches(lengths, tokens=1000, updates=4)) == 4
    halves = cost.micro_batches(lengths, tokens=10_000, chips=2)
    assert len(halves) == 1
    assert sum(lengths) / 2 <= sum(halves[0]) <= 0.6 * sum(lengths)
    assert cost.micro_batches(lengths, rows=3, chips=2) == [[700, 600, 300], [50]]
    with pytest.raises(cost.CostError, match="a sequence has 700 tokens, a micro-batch up to 699: verl refuses that"):
        cost.micro_batches(lengths, tokens=699)


DISPATCH = 0.002
"""Seconds that a sequence takes under Ray in each phase, in a run that is made up."""


def grpo_of(stack: str, chips: int, count: int) -> dict:
    """Return what benchmarks/grpo.py writes of a row, with times that the model itself gives but for the first step."""
    size = fit.SIZES["0.5B"]
    lengths = [size.prompt // 2 + n for n in responses(size.response, size.longest, count)]
    tokens = count * (size.prompt // 2 + size.response)  # before those beyond the longest were cut
    micro = cost.micro_batches(lengths, tokens=fit.GRPO["ROWS"][stack].tokens, chips=chips)
    step = {"tokens": float(tokens), "gen": 2.0, "step": 9.0, "counted": True}
    for phase, (train, entropy) in PHASES.items():
        work = cost.work(SHAPE, micro, stack, train=train, entropy=entropy, chips=chips)
        step["old" if phase == "old_log_prob" else phase] = count * DISPATCH + cost.seconds(work, COSTS, CHIPS["H100"])
    slow = {name: 10 * value for name, value in step.items()} | {"counted": False}
    about = {"row": stack, "variant": "", "took turns": True, "device": "NVIDIA H100 80GB HBM3"}
    return {"steps": [slow, step], "model": "0.5B", "gpus": chips, "sequences": count, **about}


def ranks_of(chips: int, times: int, stack: str) -> dict:
    """Return what benchmarks/ranks.py writes of a configuration, with times that the model itself gives."""
    shape, lengths = fit.shape_of(fit.REAL, tied=True), [sum(both) for both in fit.REAL.lengths()] * times
    micro = cost.micro_batches(lengths, tokens=fit.REAL.tokens, chips=chips)
    work = cost.work(shape, micro, stack, train=True, chips=chips)
    ms = 1000 * cost.seconds(work, COSTS, CHIPS["H200"])
    peak = cost.peak_bytes(shape, micro, stack, train=True, chips=chips) / 1e9
    return {"steps ms": [9 * ms, ms, ms], "peak GB": [peak - 1, peak], "device": "NVIDIA H200"}


def test_runs_of_grpo_and_of_ranks_are_read(monkeypatch, tmp_path):
    rows = {f"{stack}": grpo_of(stack, 1, 128) for stack in ("padded", "flash-attn", "overlay")}
    left_out = {
        "overlay lora": {**rows["overlay"], "variant": "lora"},
        "flash-attn overlay": {**rows["overlay"], "row": "flash-attn overlay"},
        "padded overlay": {"row": "padded overlay", "variant": "", "error": "out of memory"},
    }
    two = {stack: grpo_of(stack, 2, 512) for stack in ("flash-attn", "overlay")}
    at_once = {"overlay": {**rows["overlay"], "took turns": False}}
    scaling = {
        mode: {name: ranks_of(*how, stack) for name, how in fit.SCALING.items()} | {"fsdp2": {}, "tp2": {"error": "x"}}
        for mode, stack in {"plain": "flash-attn", "overlay": "overlay"}.items()
    }
    monkeypatch.setattr(fit, "MEASUREMENTS", shutil.copytree(fit.MEASUREMENTS, tmp_path / "measurements"))
    for file in [*fit.MEASUREMENTS.glob("grpo-*.json"), *fit.MEASUREMENTS.glob("ranks-*.json")]:
        file.unlink()
    for name, found in {"grpo-1": rows | left_out, "grpo-2": two, "grpo-3": at_once, "ranks-1": scaling}.items():
        (fit.MEASUREMENTS / f"{name}.json").write_text(json.dumps(found))
    found = fit.figures()
    assert fit.fitted(found) == pytest.approx({**COSTS, "dispatch": DISPATCH}, rel=2e-3)
    told = [figure for figure in found if figure.source.startswith(("grpo", "ranks"))]
    assert [(figure.source, figure.chips) for figure in told] == (
        [("grpo-1", 1)] * 9 + [("grpo-2", 2)] * 6 + [("ranks-1", 1), ("ranks-1", 2), ("ranks-1", 2)] * 2
    )
    held = {id(figure): says for figure, says, _ in fit.held_out(found)}
    assert all(held.get(id(figure), figure.seconds) == pytest.approx(figure.seconds, rel=1e-2) for figure in told)
    assert all(figure.peak[0] == pytest.approx(figure.peak[1]) for figure in told if figure.source == "ranks-1")
    assert json.loads(fit.data(found))["measured"]["most chips"] == 2
    cells = [line.strip("| ").split(" | ") for line in fit.savings(found).splitlines()[2:]]
    assert [(run, gpus, against) for run, gpus, against, *_ in cells] == [
        *(("grpo-1: GRPO, 0.5B", "1", stack) for stack in ("padded", "flash-attn")),
        ("grpo-2: GRPO, 0.5B", "2", "flash-attn"),
        *((f"ranks-1: {name}", str(chips), "flash-attn") for name, (chips, _) in fit.SCALING.items()),
    ]
    assert [float(row[-1]) for row in cells] == pytest.approx([float(row[-2]) for row in cells], abs=0.02)


def test_a_figure_that_leaves_nothing_is_no_basis():
    figure = next(figure for figure in FIGURES if figure.what == "train, busy" and figure.stack == "overlay")
    wrong = fit.Figure(**{**vars(figure), "seconds": 0.01})
    with pytest.raises(SystemExit, match="packed overlay, train, busy: nothing is left for products"):
        fit.fitted([wrong if each is figure else each for each in FIGURES])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def estimated(folder, capsys, *options: str) -> dict:
    assert cli.main(["estimate", str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_overlay_saves(folder, capsys):
    found = estimated(folder, capsys, "--gen-seconds", "5")
    seconds = found["seconds"]
    assert seconds["padded"]["step"] > seconds["flash-attn"]["step"] > seconds["overlay"]["step"] > 5
    assert sum(seconds["overlay"].values()) == pytest.approx(2 * seconds["overlay"]["step"])
    saved = found["seconds saved a step"]["padded"]
    assert saved == pytest.approx(seconds["padded"]["step"] - seconds["overlay"]["step"])
    assert found["chip-hours saved in 1,000 steps"]["padded"] == pytest.approx(saved * 1000 / 3600)
    peaks = found["peak GB of a chip"]
    assert found["does not fit"] == [stack for stack in peaks if peaks[stack] > 80]
    assert "padded" in estimated(folder, capsys, "--max-response", "8192")["does not fit"]
    assert peaks["padded"] > peaks["flash-attn"] > peaks["overlay"] > 16 * SHAPE.parameters / 1e9
    assert cli.main(["estimate", str(folder)]) == 0
    assert f"{seconds['overlay']['ref']:.2f}\n" in capsys.readouterr().out


def test_lengths_of_a_file_count(folder, capsys):
    (folder / "lines.txt").write_text("100\n200\n300\n")
    (folder / "list.json").write_text("[100, 200,\n 300]\n")
    both = [estimated(folder, capsys, "--lengths", str(folder / name)) for name in ("lines.txt", "list.json")]
    assert both[0] == both[1]
    assert both[0]["sequences"] == {"number": 3, "tokens": 600, "longest": 300}


def test_each_epoch_trains_on_all_sequences(folder, capsys):
    found = [estimated(folder, capsys, "--epochs", epochs) for epochs in ("1", "2", "3")]
    one, two, three = (each["seconds"]["overlay"] for each in found)
    more = two["update_actor"] - one["update_actor"]
    dispatched_once = COSTS["dispatch"] * found[0]["sequences"]["number"]
    assert one["update_actor"] == pytest.approx(dispatched_once + more)
    assert three["update_actor"] == pytest.approx(one["update_actor"] + 2 * more)
    assert three["ref"] == one["ref"]


def test_what_was_not_measured_is_said(folder, capsys):
    def said(*options: str) -> str:
        return " / ".join(estimated(folder, capsys, *options)["extrapolated"])

    (folder / "config.json").write_text(json.dumps({**CONFIG, **LARGE}))
    assert said("--mean-response", "900", "--max-response", "4096") == ""
    assert "the most chips that were measured" in said("--chips", "8")
    assert "measured was on H100 and H200" in said("--chip", "new", "--chip-tflops", "400", "--chip-tbs", "2")
    assert "is waiting for the host" in said("--batch", "4", "--answers", "1", "--mean-response", "16")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 240}))
    assert "measured were models of" in said()


def test_a_chip_of_twice_the_peaks_computes_twice_as_fast(folder, capsys):
    """What the host takes stays; so the whole is less than twice as fast, and no faster once the host is the limit."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **LARGE}))
    slow, once, most, more = (
        estimated(folder, capsys, "--chip", "x", "--chip-tflops", str(989 * n), "--chip-tbs", str(3.35 * n))["seconds"]
        for n in (1 / 4, 1 / 2, 8, 16)
    )
    assert slow["overlay"]["step"] / 2 < once["overlay"]["step"] < 0.7 * slow["overlay"]["step"]
    assert more["overlay"] == most["overlay"]


def test_an_h100_is_what_its_peaks_say(folder, capsys):
    given = estimated(folder, capsys, "--chip", "x", "--chip-tflops", "989", "--chip-tbs", "3.35")
    assert given["seconds"] == estimated(folder, capsys)["seconds"]


@pytest.mark.parametrize(("tied", "heads"), [({"tie_word_embeddings": False}, 2), ({}, 1)])
def test_a_head_that_nothing_is_said_of_is_the_embedding(tied, heads):
    """Only models that are tied by default, such as Gemma, are written without a word of it."""
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    layers, head = cost.shape(config).matrices
    assert cost.shape({**config, **tied}).parameters == layers + heads * head


@pytest.mark.parametrize(("more", "status"), [(0.0, 0), (0.27, 0), (-0.25, 2), (0.5, 2)])
def test_weights_that_are_there_are_as_many_as_counted(more, status, folder, capsys):
    """A tied head that is stored makes 0.27 times more here; an MLP without a gate makes less."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16"}))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(round(2 * SHAPE.parameters * (1 + more)))  # a file of holes
    assert cli.main(["estimate", str(folder)]) == status
    said = capsys.readouterr().err
    assert all((word in said) == bool(status) for word in ("it has other parts", "files of its", "are missing")), said


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"num_experts": 60}, [], "is a mixture of experts (num_experts in its config.json)"),
        ({"vision_config": {"depth": 2}}, [], "reads more than text"),
        ({"kv_lora_rank": 512}, [], "has latent attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, [], "have no attention"),
        ({"intermediate_size": None}, [], "config.json has intermediate_size = None; needed is a whole number"),
        ({"num_hidden_layers": True}, [], "config.json has num_hidden_layers = True"),
        ({"num_key_value_heads": 0}, [], "config.json has num_key_value_heads = 0"),
        ({"head_dim": 0}, [], "config.json has head_dim = 0"),
        ({"num_key_value_heads": 3}, [], "heads, and 3 of keys and values, which they cannot share"),
        ({"num_key_value_heads": 512}, [], "heads, and 512 of keys and values, which they cannot share"),
        (
            {"tie_word_embeddings": "false"},
            [],
            "config.json has tie_word_embeddings = 'false'; needed is true or false",
        ),
        ({}, ["--chip", "B200"], "--chip B200: known are H100, H200; of another one give --chip-tflops too"),
        ({}, ["--chip", "B200", "--chip-tflops", "9", "--chip-tbs", "1", "--chips", "2"], "give --link-gbs too"),
        ({}, ["--chip-tflops", "nan"], "--chip-tflops nan: allowed is more than 0"),
        ({}, ["--batch", "0"], "--batch 0: allowed is 1 to 1,000,000,000"),
        ({}, ["--batch", "1000000"], "allowed is up to 100,000"),
        ({}, ["--batch", "1", "--chips", "9"], "8 sequences are too few for 9 chips x 1 updates"),
        ({}, ["--gen-seconds", "-1"], "--gen-seconds -1.0: allowed is 0 to 1,000,000,000"),
        ({}, ["--gen-seconds", "1e20"], "allowed is 0 to 1,000,000,000"),
        ({}, ["--mean-response", "9" * 400], "allowed is 1 to 1,000,000,000"),
        ({}, ["--lengths", "huge", "--micro-tokens", "1000000000"], "each 1 to 1,000,000,000"),
        ({}, ["--micro-tokens", "2000"], "a micro-batch up to 2,000: verl refuses that"),
        ({}, ["--lengths", "nothing"], "--lengths nothing is no file"),
        ({}, ["--lengths", "words"], "needed are whole numbers, one a line or a list"),
        ({}, ["--lengths", "empty"], "has 0 numbers; needed are 1 to 100,000, each 1 to 1,000,000,000"),
    ],
)
def test_nothing_is_said_of_what_is_not_known(config, options, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "words").write_text("ten\n")
    (folder / "empty").write_text("[]\n")
    (folder / "huge").write_text("9" * 400)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    assert cli.main(["estimate", str(folder), *options]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
