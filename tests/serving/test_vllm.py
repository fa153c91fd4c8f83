"""vLLM serves what training and export write: full and merged models, adapters, through its class and over HTTP."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launches import ROOT
from serving.conftest import ADAPTED, Saved, make_environment, run_in

import tuning
from tuning import cli
from tuning.demo.serving import serve
from tuning.export.vllm import VLLM_RUN
from tuning.files import read_lines

NAMES = {
    "granite_vision": "LlavaNextForConditionalGeneration",
    "llava15": "LlavaForConditionalGeneration",
    "llava_next_vicuna": "LlavaNextForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
"""Base → its class."""
NO_TOWER = ("llava15",)
"""vLLM fails at every picture where adapters may reach this tower, which has a token besides its patches."""
CAUSAL = ("gemma3",)
"""On a CPU, vLLM lets the tokens of a picture see only those before them, as text. transformers lets them see all."""
TOKENS = 8
SENT = '{"add_special_tokens": true}'

pytestmark = pytest.mark.serving


@pytest.fixture(scope="session")
def vllm() -> Path:
    return make_environment("vllm")


@pytest.fixture(scope="session")
def answers(save, vllm, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """(base, what was saved) → what vLLM answers. All in one process: it takes long to start."""
    jobs, asked = [], []
    for name in NAMES:
        kinds = save(name)
        models = {what: one for what, one in kinds.items() if one.base is None and "checkpoint" not in what}
        adapters = {what: one for what, one in kinds.items() if one.base and "checkpoint" not in what}
        if name in NO_TOWER:
            del adapters["all parts"]
        one = kinds["full"]
        common = {"text": one.text, "picture": str(one.picture), "tower": name not in NO_TOWER, "tokens": TOKENS}
        for what, one in models.items():
            jobs.append({**common, "model": str(one.folder), "adapters": [None]})
            asked.append((name, what))
        base = next(iter(adapters.values())).base
        jobs.append({**common, "model": str(base), "adapters": [str(one.folder) for one in adapters.values()]})
        asked += [(name, what) for what in adapters]
    file = tmp_path_factory.mktemp("vllm") / "jobs.json"
    file.write_text(json.dumps(jobs))
    return dict(zip(asked, run_in(vllm, "ask_vllm.py", file), strict=True))


@torch.no_grad()
def answer(one: Saved) -> tuple[list[int], list[float]]:
    """The greedy answer by transformers, and the log-probabilities of its tokens as training computes them."""
    model, inputs = one.load(), one.inputs
    if one.name in CAUSAL:
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    made = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    tokens = made.sequences[0][-TOKENS:].tolist()
    scale = getattr(model.config.get_text_config(), "logits_scaling", 1.0)  # Granite's, which transformers leaves out
    steps = zip(made.logits, tokens, strict=True)
    return tokens, [(logits[0] / scale).log_softmax(-1)[token].item() for logits, token in steps]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_transformers_does(name, save, answers):
    kinds = {what: line for (base, what), line in answers.items() if base == name}
    assert len(kinds) == 4 - (name in NO_TOWER)
    for what, line in kinds.items():
        one = save(name)[what]
        tokens, scores = answer(one)
        assert line["prompt"] == one.inputs["input_ids"][0].tolist(), what
        assert line["answer"] == tokens, what
        distance = max(abs(found - expected) for found, expected in zip(line["scores"], scores, strict=True))
        assert distance < 1e-3, what
    assert len({tuple(line["scores"]) for line in kinds.values()}) >= 3  # each adapter has an effect


def test_export_says_what_was_run():
    assert set(NAMES.values()) == VLLM_RUN


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_served_over_http_as_training_runs_it(name, save, vllm, tmp_path, capsys):
    kinds, log = save(name), tmp_path / "log"
    adapters = ["language model"] + ["all parts"] * (name not in NO_TOWER)
    for what in ("full", "merged"):
        with serve(vllm, kinds[what].folder, "tuned", log, options=("--max-model-len", "512")) as url:
            assert_served(name, url, "tuned", kinds[what].folder, capsys)
    first, *others = (kinds[what].folder for what in reversed(adapters))
    options = [*printed_options(first), *map(str, (f"{folder.name}={folder}" for folder in others))]
    with serve(vllm, kinds["language model"].base, "base", log, options=["--max-model-len", "512", *options]) as url:
        for model, folder in [("tuned", first), *((folder.name, folder) for folder in others)]:
            assert_served(name, url, model, folder, capsys)


def printed_options(adapter: Path) -> list[str]:
    """Those of the command that `export --target vllm` prints for an adapter."""
    done = run_command("export", "--adapter", adapter, "--target", "vllm")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.partition("vllm serve ")[2])
    assert command[-2:] == ["--lora-modules", f"tuned={adapter}"]
    return command[1:]


def assert_served(name: str, url: str, model: str, folder: Path, capsys) -> None:
    """`verify-serving` finds no difference between a server and a folder, when we send what the card says."""
    words = ["--server_url", url, "--model", model, "--model_name_or_path", str(folder)]
    sent = ["--request_options", SENT] if "add_special_tokens" in (folder / "README.md").read_text() else []
    done, told = cli.main(["verify-serving", *words, *sent]), capsys.readouterr()
    if name in CAUSAL:
        assert "rows without pictures agree, but those with pictures do not" in told.err
        assert "On a CPU, vLLM lets the tokens of a picture see only those before them." in told.err
    else:
        assert done == 0, told.err


@pytest.fixture(scope="module")
def adapter(published, rows, tmp_path_factory) -> Path:
    """An adapter of LLaVA-1.5 that has learned to answer. The tokenizer adds a `<s>`, the chat template none."""
    options = {"model_name_or_path": str(published / "llava15"), "training_data_path": str(rows), "max_steps": 60}
    options |= ADAPTED | {"learning_rate": 1e-2, "dataloader_num_workers": 0, "report_samples": 0}
    return tuning.train(options | {"output_dir": str(tmp_path_factory.mktemp("adapter"))}).model_dir


@pytest.fixture(scope="module")
def server(adapter, published, vllm, tmp_path_factory):
    """The address of a server of LLaVA-1.5, `base`, and its adapter, `tuned`."""
    options = ["--max-model-len", "512", *printed_options(adapter)]
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(vllm, published / "llava15", "base", log, options=options) as url:
        yield url


def run_command(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tuning.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_served_chat_gives_what_predict_gives(server, adapter, rows, tmp_path):
    common = ("--data_path", rows, "--metrics", "exact_match", "--max_new_tokens", "16")
    served = ("--server_url", server, "--model", "tuned", "--request_options", SENT)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    for output, words in ((here, ("--model_name_or_path", adapter)), (there, served)):
        done = run_command("predict", *words, *common, "--output", output)
        assert done.returncode == 0, done.stderr
    expected, found = ([line["prediction"] for line in read_lines(file)] for file in (here, there))
    assert found == expected
    assert len(found) == 16
    assert all(text.startswith("It is") for text in found)


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("tuned", ("--request_options", SENT), None),
        ("tuned", (), "lack the first token <s>"),
        ("base", ("--request_options", SENT), "adapter"),
    ],
)
def test_verify_serving_tells_how_a_server_differs(model, options, told, server, adapter, rows):
    where = ("--server_url", server, "--model", model, "--model_name_or_path", adapter, "--data_path", rows)
    done = run_command("verify-serving", *where, *options)
    assert (done.returncode == 0) == (told is None), done.stdout + done.stderr
    assert told is None or told in done.stderr
