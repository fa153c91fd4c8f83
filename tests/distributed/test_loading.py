"""Loading under FSDP: no process takes the memory of a whole model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import build_model, build_processor
from transformers import AutoConfig

from tuning.config.options import ModelArguments
from tuning.model import load


def test_a_process_that_is_sent_a_7b_takes_its_share_and_one_weight_more():
    script = Path(__file__).with_name("load_7b.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] > 14e9  # 7.06 billion parameters in bfloat16
    assert abs(found["local"] / (found["whole"] / 8) - 1) < 1e-3
    assert found["local"] < found["took"] < found["local"] + 2 * found["largest"] + 100e6
    assert found["wrapped"] == ["CLIPEncoderLayer", "LlamaDecoderLayer"]


def test_the_process_that_reads_the_weights_leaves_them_in_their_file(tmp_path):
    model = build_model("llava15")
    model.resize_token_embeddings(400_000)  # 2 × 51 MB
    model.save_pretrained(tmp_path)
    build_processor("llava15").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    del model
    before = own_memory()
    loaded = load.load_model(
        ModelArguments(model_name_or_path=str(tmp_path)), config, dtype=torch.float32, attention="sdpa"
    )
    weights = sum(parameter.numel() * 4 for parameter in loaded.parameters())
    assert weights > 100e6
    assert own_memory() - before < 0.1 * weights


def own_memory() -> int:
    """Bytes of this process that are no part of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
