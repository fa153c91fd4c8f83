"""What docs/quantised-exports.md says of llm-compressor and MLX, on tiny merged models."""

import subprocess

import numpy
import pytest
import torch
from docs_text import ROOT, blocks
from PIL import Image
from serving.conftest import environ, make_environment, run_in
from serving.merging import merge
from transformers import AutoModelForImageTextToText, AutoProcessor

from tuning.model.saved_weights import SavedWeights

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "quantised-exports.md"
OTHERS = ("vision", "visual", "projector", "connector", "newline", "embed_tokens", "lm_head", "norm", "bias")


QUANTISED = dict.fromkeys(("granite_vision", "qwen2_5_vl", "gemma3"), "FP8_DYNAMIC") | {"llava15": "W8A8"}
"""A base of published.py → the scheme."""


@pytest.mark.parametrize(("name", "scheme"), QUANTISED.items())
def test_the_script_of_the_docs_quantises_the_language_model_only(name, scheme, published, tmp_path):
    python = make_environment("llm_compressor")
    merged = merge(published / name, tmp_path)
    (script,) = blocks(PAGE, "python")
    (tmp_path / "script.py").write_text(script.replace("FP8_DYNAMIC", scheme))
    words = [str(python), "script.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (seen,) = run_in(python, "open_quantised.py", merged, tmp_path / "merged-fp8")
    print(name, scheme, {key: value for key, value in seen.items() if isinstance(value, float)})
    every = list(SavedWeights(merged).stored)
    assert set(seen["quantised"]) == {key for key in every if not any(part in key for part in OTHERS)}
    assert set(seen["quantised"]) | set(seen["kept"]) == set(every)
    assert seen["weight_error"] <= (1 / 16 if scheme == "FP8_DYNAMIC" else 1 / 127)
    assert 0 < seen["difference"] <= 0.3 * seen["largest"]


def test_mlx_computes_the_same_of_a_picture(published, tmp_path):
    python = make_environment("mlx")
    merged = merge(published / "llava15", tmp_path)
    words = [str(python), "-m", "mlx_vlm", "convert", "--hf-path", "merged", "--mlx-path", "merged-mlx"]
    words += ["--dtype", "float32"]
    subprocess.run(words, cwd=tmp_path, env=environ(), capture_output=True, check=True)
    processor, model = AutoProcessor.from_pretrained(merged), AutoModelForImageTextToText.from_pretrained(merged)
    inputs = processor(text="<image>What is it?", images=Image.new("RGB", (32, 32), "red"), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0].numpy()
    numpy.savez(tmp_path / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    (seen,) = run_in(python, "open_mlx.py", tmp_path / "merged-mlx", tmp_path / "inputs.npz")
    assert numpy.abs(numpy.array(seen["logits"]) - expected).max() <= 1e-4
