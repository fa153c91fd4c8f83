"""Every benchmark runs, with its smallest settings and without peers."""

import importlib
import json
import sys

import contender
import datasets
import families
import pytest
import record
import tables

SMALLEST = {
    "step": ["--layout", "llava15", "--size", "tests", "--method", "lora", "--steps", "2", "--peers"],
    "encode": ["--layout", "granite_vision", "--rows", "8", "--tiny", "--peers"],
    "memory": ["--vocabulary", "1024", "--tokens", "--trained", "all", "--peers"],
    "gpu": ["--run", "granite_lora", "--steps", "2", "--tiny", "--peers", "--peak-flops", "1e12"],
}


def run_here(script, spec, folder, **kwargs):
    """`record.run_child` in this process, because a new one takes seconds to import PyTorch."""
    spec_file, result_file = folder / "spec.json", folder / "result.json"
    spec_file.write_text(json.dumps(spec))
    contender.main([str(spec_file), str(result_file)])
    return json.loads(result_file.read_text())


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, arguments):
        benchmark = importlib.import_module(name)
        if name != "start":
            monkeypatch.setattr(benchmark, "run_child", run_here)
        benchmark.main(arguments)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"benchmark"')]
        return [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("name", SMALLEST)
def test_one_line_a_run_with_commit_and_versions(run, name):
    (line,) = run(name, SMALLEST[name])
    assert line["benchmark"] == name
    assert line["contender"] == "ours"
    assert {"commit", "cores", "torch", "transformers"} <= line.keys()
    assert all(line[key] is not None for key in tables.KEYS[name])
    figures = {"step": "seconds_per_step", "encode": "rows_per_second", "memory": "beyond_weights_gb", "gpu": "mfu"}
    assert line[figures[name]] > 0


@pytest.mark.parametrize("layout", families.BUILDERS)
def test_every_family_trains_padding_free_with_the_loss_of_the_stock_forward(run, layout):
    arguments = ["--layout", layout, "--size", "tests", "--method", "full", "--steps", "1", "--peers", "stock"]
    ours, stock = run("step", arguments)
    assert (ours["contender"], stock["contender"]) == ("ours", "stock")
    assert ours["supervised_tokens"] == stock["supervised_tokens"] == 36


def test_ratios_are_of_the_contenders_of_one_layout_and_method():
    line = {"size": "20m", "method": "full", "contender": "ours", "seconds_per_step": 2.0, "peak_memory_gb": 1.0}
    trl = {"contender": "trl", "seconds_per_step": 8.0, "peak_memory_gb": 4.0}
    padded = {"contender": "ours, padded", "seconds_per_step": 3.0}
    first = [{**line, **change, "layout": "gemma3"} for change in ({}, trl, padded)]
    second = [{**line, **change, "layout": "llava15"} for change in ({}, {**trl, "seconds_per_step": 4.0})]
    rows = tables.make_ratios([*first, *second]).splitlines()
    assert rows[2] == "| gemma3 | full | 4 | 0.25 |  |  | 1.5 | 1 |"
    assert rows[3] == "| llava15 | full | 2 | 0.25 |  |  |  |  |"
    assert rows[4] == "| **geometric mean of 2** | full | 2.83 | 0.25 |  |  | 1.5 | 1 |"


def test_image_processors_are_timed_on_tensors_and_on_arrays(capsys):
    importlib.import_module("pictures").main(["--rounds", "1", "--family", "llava15"])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["family"] == "llava15"
    assert min(line["tensors_ms"], line["pillow_ms"]) > 0


def test_batches_of_many_processes_are_simulated(capsys):
    importlib.import_module("balance").main(["--rows", "6000", "--ranks", "8", "--mixture", "all"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["batches"] for line in lines] == ["tokens", "grouped", "rows"]
    for line in lines:
        assert 1 <= line["least"] <= line["ours"] < line["random"]
        assert line["batches"] == "rows" or line["ours"] <= 1.05


def test_towers_are_timed_with_equal_outputs(capsys, monkeypatch):
    towers = importlib.import_module("towers")
    monkeypatch.setattr(towers, "SIZES", [(252, 112), (56, 56)])
    towers.main(["--rounds", "1", "--family", "qwen2_5_vl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tower"] for line in lines] == ["frozen", "trains"]
    assert all(line["sdpa_calls"] < line["stock_sdpa_calls"] and line["seconds"] > 0 for line in lines)


def test_a_start_is_timed_in_processes_of_their_own(run, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(datasets.config.HF_DATASETS_CACHE))
    (line,) = run("start", ["--rows", "20", "--repeats", "1"])
    assert 0 < line["seconds_after_imports"] < line["seconds_to_first_step"]


def test_a_failed_child_says_why(tmp_path):
    with pytest.raises(record.ChildFailed, match="KeyError: 'no such contender'"):
        record.run_child("contender.py", {"contender": "no such contender"}, tmp_path)


def test_peers_that_train_something_else_are_refused():
    step = importlib.import_module("step")
    ours = {"tokens": 10, "supervised_tokens": 3, "losses": [2.0]}
    step.check_equal(ours, {**ours, "losses": [2.000001]}, "trl")
    for difference in ({"losses": [2.001]}, {"tokens": 11}, {"supervised_tokens": 4}):
        with pytest.raises(SystemExit):
            step.check_equal(ours, {**ours, **difference}, "trl")


def test_the_documented_tables_are_the_committed_results():
    tables.main(["--check"])


@pytest.fixture(scope="module", autouse=True)
def module_path():
    """Restore the path: the benchmarks put the repository first on it when they are imported."""
    before = list(sys.path)
    yield
    sys.path[:] = before
