"""vLLM serves what training and export write: full and merged models, adapters, through its class and over HTTP."""

import json
from pathlib import Path

import pytest
import torch
from serving.conftest import Saved, make_environment, run_in

from tuning.export.vllm import VLLM_RUN

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
TOLERANCE = {"gemma3": 2e-2}
"""Of log-probabilities, where it is not 1e-3: vLLM's Gemma 3 lets the tokens of a picture see only those before."""
TOKENS = 8

pytestmark = pytest.mark.serving


@pytest.fixture(scope="session")
def vllm() -> Path:
    return make_environment("vllm")


@pytest.fixture(scope="session")
def saved(save) -> dict[str, dict[str, Saved]]:
    return {name: save(name) for name in NAMES}


@pytest.fixture(scope="session")
def answers(saved, vllm, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """(base, what was saved) → what vLLM answers. All in one process: it takes long to start."""
    jobs, asked = [], []
    for name, kinds in saved.items():
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
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    made = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    tokens = made.sequences[0][-TOKENS:].tolist()
    scale = getattr(model.config.get_text_config(), "logits_scaling", 1.0)  # Granite's, which transformers leaves out
    steps = zip(made.logits, tokens, strict=True)
    return tokens, [(logits[0] / scale).log_softmax(-1)[token].item() for logits, token in steps]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_transformers_does(name, saved, answers):
    kinds = {what: line for (base, what), line in answers.items() if base == name}
    assert len(kinds) == 4 - (name in NO_TOWER)
    for what, line in kinds.items():
        one = saved[name][what]
        tokens, scores = answer(one)
        assert line["prompt"] == one.inputs["input_ids"][0].tolist(), what
        assert line["answer"] == tokens, what
        distance = max(abs(found - expected) for found, expected in zip(line["scores"], scores, strict=True))
        assert distance < TOLERANCE.get(name, 1e-3), what
    assert len({tuple(line["scores"]) for line in kinds.values()}) >= 3  # each adapter has an effect


def test_export_says_what_was_run():
    assert set(NAMES.values()) == VLLM_RUN
