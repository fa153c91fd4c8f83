"""The estimated peak memory against what torch's tracker counts while the real trainer trains."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import LAYOUTS
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.hooks import RemovableHandle

import tuning
from tuning import sft_trainer
from tuning.config.parse import build_config
from tuning.model import load
from tuning.preview.memory import MemoryEstimate, estimate_memory
from tuning.training.trainer import SupervisedTrainer

TOLERANCE = 0.25
LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}


def write_rows(folder: Path, *, count: int, words: int, equal: bool = False) -> str:
    """`count` rows with a picture and an answer of about `words` words; of several lengths unless `equal`."""
    Image.new("RGB", (90, 40), "red").save(folder / "picture.png")
    lines = []
    for number in range(count):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        answer = {"role": "assistant", "content": "very " * (words if equal else words * (number + 1) // count)}
        lines.append(json.dumps({"messages": [question, answer], "images": ["picture.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


@pytest.fixture
def measure(monkeypatch):
    """Train with options; returns the peak in bytes of all tensors on the CPU, and the first batch."""

    def run(options: dict) -> tuple[int, dict]:
        batches, tracker = [], MemTracker()
        train, step = SupervisedTrainer.train, SupervisedTrainer.training_step

        def tracked_train(trainer, *args, **kwargs):
            tracker.track_external(trainer.model)
            for parameter in trainer.model.parameters():
                if not parameter.requires_grad:  # the tracker would hang a hook on it, which torch refuses
                    tracker._param_to_grad_hook_handles[parameter] = (RemovableHandle(OrderedDict()),) * 2
            with tracker:
                return train(trainer, *args, **kwargs)

        def seen_step(trainer, model, inputs, num_items_in_batch=None):
            batches.append(dict(inputs) if not batches else None)
            tracker.reset_mod_stats()  # it tells modules apart by it, and refuses a second forward; totals stay
            return step(trainer, model, inputs, num_items_in_batch)

        with monkeypatch.context() as patch:
            patch.setattr(SupervisedTrainer, "train", tracked_train)
            patch.setattr(SupervisedTrainer, "training_step", seen_step)
            tuning.train(options)
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], batches[0]

    return run


@pytest.fixture
def estimate(monkeypatch):
    """The estimate for a run with options on batches like `batch`, on the model that training would prepare."""

    def run(options: dict, batch: dict, **kwargs) -> MemoryEstimate:
        config = build_config(options)

        def skeleton(model, model_config, *, dtype, attention):
            return load.build_skeleton(model_config).to(dtype)

        with monkeypatch.context() as patch:
            patch.setattr(load, "load_model", skeleton)
            model = sft_trainer.make_model(config, load.load_config(config.model))
        return estimate_memory(model, batch, config.training, **kwargs)

    return run


@pytest.fixture
def run_options(make_options, tmp_path):
    def make(layout: str, *, count: int = 4, words: int = 60, equal: bool = False, **changes) -> dict:
        rows = write_rows(tmp_path, count=count, words=words, equal=equal)
        steps = {"max_steps": 3, "save_strategy": "no", "report_to": "none"}
        return make_options(layout, training_data_path=rows, **steps, **changes)

    return make


FULL, EIGHT = {}, {"per_device_train_batch_size": 8, "count": 8, "words": 300}
CASES = {
    **{f"full {layout}": (layout, FULL) for layout in LAYOUTS},
    **{f"lora {layout}": (layout, LORA) for layout in LAYOUTS},
    **{f"long {layout}": (layout, EIGHT) for layout in LAYOUTS},
    **{f"checkpointing {layout}": (layout, EIGHT | {"gradient_checkpointing": True}) for layout in LAYOUTS},
    "accumulation": ("granite_vision", {"gradient_accumulation_steps": 2, "count": 8, "equal": True}),
    "bfloat16": ("llava16_mistral", EIGHT | {"dtype": "bfloat16"}),
    "autocast": ("llava15", EIGHT | {"bf16": True}),
    "autocast lora": ("mllama", EIGHT | LORA | {"bf16": True}),
    "autocast, lora on bfloat16": ("llava15", EIGHT | LORA | {"bf16": True, "dtype": "bfloat16"}),
    "lora on bfloat16": ("llava15", EIGHT | LORA | {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_training_takes(case, run_options, measure, estimate):
    layout, changes = CASES[case]
    options = run_options(layout, **changes)
    measured, batch = measure(options)
    estimated = estimate(options, batch)
    print(f"RATIO {case}: {estimated.peak / measured:.3f} of {measured / 1e6:.1f} MB; {estimated}")
    assert estimated.activations is not None
    assert abs(estimated.peak / measured - 1) < TOLERANCE, (estimated, measured)
