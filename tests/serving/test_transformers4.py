"""What training and export write opens in transformers 4, and computes the same there."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from serving.conftest import run_in

from tuning.model.saved_weights import SavedWeights

NAMES = ("granite_vision", "llava15", "llava_next_vicuna", "llava16_mistral", "mllama", "qwen2_5_vl", "gemma3")
NO_END = ("llava15", "llava_next_vicuna")
"""Their chat templates end no answer. Training does, and saves a template that does."""
EDITED = ("model.safetensors.index.json",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NAMES)
def saved(request, save):
    return save(request.param)


def test_the_saved_folder_is_that_of_its_base(saved, published):
    for what, one in saved.items():
        base = published / one.name
        own = {file.name for file in base.iterdir()}
        for name in own:
            if (one.base and name == "config.json") or name.endswith(".safetensors") or (one.base and name in EDITED):
                continue
            found, published_bytes = (one.folder / name).read_bytes(), (base / name).read_bytes()
            if name == "chat_template.jinja" and one.name in NO_END:
                assert found.endswith(published_bytes)
                assert found.startswith(b'{#- Training ends every answer with "</s>"')
            else:
                assert found == published_bytes, f"{what}: {name}"
        if one.base is None:
            found, expected = SavedWeights(one.folder), SavedWeights(base)
            for file, stored in expected.shards.items():
                assert list(found.shards[file]) == list(stored)


def test_transformers_4_opens_it_and_gives_the_same_logits(saved, published, transformers4, tmp_path):
    jobs = list[dict]()
    for number, one in enumerate(saved.values()):
        (tmp_path / str(number)).mkdir()
        jobs.append(one.job(tmp_path / str(number)))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    opened = run_in(transformers4, "open_saved.py", tmp_path / "jobs.json")
    base = json.loads((published / next(iter(saved.values())).name / "config.json").read_text())
    for (what, one), job, seen in zip(saved.items(), jobs, opened, strict=True):
        assert seen["report"] == {}, what
        assert seen["rope_theta"] == base.get("text_config", base).get("rope_theta") == 500_000, what
        assert seen["ids"] == one.inputs["input_ids"][0].tolist(), what
        found, expected = load_file(job["out"])["logits"], one.logits()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), what
    trained = [load_file(job["out"])["logits"] for job in jobs]
    assert all(math.isfinite(logits.sum()) for logits in trained)
    assert not torch.equal(trained[0], trained[-1])
