"""The estimated peak memory equals what torch's tracker counts while the real trainer trains, within a tolerance."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from PIL import Image
from preparation import HAS_BITSANDBYTES, make_model
from tiny_models import LAYOUTS
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import tuning
from tuning.checking.memory import MemoryEstimate, estimate_memory
from tuning.config.parse import build_config
from tuning.model import build, dry_run, load
from tuning.model.quantize import quantise_skeleton
from tuning.model.recompute import Recomputed
from tuning.training.data_loading import DataLoading
from tuning.training.optimizer import patch_master_weights
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
                if not parameter.requires_grad:  # the tracker would add a hook to it, which torch refuses
                    tracker._param_to_grad_hook_handles[parameter] = (RemovableHandle(OrderedDict()),) * 2
            with tracker:
                return train(trainer, *args, **kwargs)

        def seen_step(trainer, model, inputs, num_items_in_batch=None):
            batches.append(dict(inputs) if not batches else None)
            tracker.reset_mod_stats()  # else it refuses a second forward of a module; totals stay
            return step(trainer, model, inputs, num_items_in_batch)

        with monkeypatch.context() as patch:
            for trial in ("check_logits", "_find_batch_fault"):  # it does not track a second forward before a step
                patch.setattr(DataLoading, trial, lambda *args: "")
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

        def skeleton(model, model_config, *, dtype, attention, quantization):
            built = load.build_skeleton(model_config).to(dtype)
            if quantization:
                quantise_skeleton(built, quantization)
            return built

        with monkeypatch.context() as patch:
            patch.setattr(load, "load_model", skeleton)
            model = make_model(config)
        patch_optimizer = patch_master_weights if config.model.keep_master_weights else None
        return estimate_memory(model, batch, config.training, patch_optimizer=patch_optimizer, **kwargs)

    return run


@pytest.fixture
def run_options(make_options, tmp_path):
    def make(layout: str, *, count: int = 8, words: int = 60, equal: bool = False, **changes) -> dict:
        rows = write_rows(tmp_path, count=count, words=words, equal=equal)
        steps = {"max_steps": 2, "save_strategy": "no", "report_to": "none"}
        return make_options(layout, training_data_path=rows, **{"per_device_train_batch_size": 8, **steps, **changes})

    return make


CASES = {
    **{f"full {layout}": (layout, {}) for layout in LAYOUTS},
    "lora granite_vision": ("granite_vision", LORA),
    "lora mllama": ("mllama", LORA),
    "checkpointing granite_vision": ("granite_vision", {"gradient_checkpointing": True}),
    "checkpointing mllama": ("mllama", {"gradient_checkpointing": True}),
    "checkpointing lora autocast": ("llava15", {"gradient_checkpointing": True, **LORA, "bf16": True}),
    "accumulation": (
        "granite_vision",
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "equal": True},
    ),
    "bfloat16": ("llava16_mistral", {"dtype": "bfloat16"}),
    "plain bfloat16": ("llava16_mistral", {"dtype": "bfloat16", "keep_master_weights": False}),
    "autocast": ("llava15", {"bf16": True}),
    "autocast lora on bfloat16": ("mllama", {"bf16": True, "dtype": "bfloat16", **LORA}),
}


if HAS_BITSANDBYTES:
    CASES |= {kind: ("llava15", LORA | {"quantization": kind}) for kind in ("4bit", "8bit")}


def assert_close(estimated: MemoryEstimate, measured: int) -> None:
    assert estimated.activations is not None
    assert abs(estimated.peak / measured - 1) < TOLERANCE, (estimated, measured)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_training_takes(case, run_options, measure, estimate):
    layout, changes = CASES[case]
    options = run_options(layout, **changes)
    measured, batch = measure(options)
    estimated = estimate(options, batch)
    assert_close(estimated, measured)
    # Activations are most of it here: an estimate that got them wrong would not pass.
    assert estimated.activations > 0.75 * measured


@pytest.mark.parametrize("lora", [{}, LORA])
def test_some_layers_are_recomputed_and_the_estimate_knows_it(lora, run_options, measure, estimate, trainers):
    options = run_options("granite_vision", padding_free=False, **lora)
    none, batch = measure(options | {"output_dir": options["output_dir"] + "-none"})
    limit = 0.9 * estimate(options, batch).peak / 1e9
    some, batch = measure(options | {"gradient_checkpointing": "auto", "max_memory_gb": limit})
    recomputed = Recomputed(trainers[-1].trainable.parts, trainers[-1].config.recomputed_layers)
    estimated = estimate(options | {"gradient_checkpointing": True}, batch, recomputed=recomputed)
    assert 0 < recomputed.number < 6
    assert_close(estimated, some)
    assert some < none
    assert estimated.peak < 1e9 * limit


@pytest.mark.parametrize("precision", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "keep_master_weights": False}])
def test_a_wide_model_takes_what_its_weights_take(precision, models, tmp_path, run_options, measure, estimate):
    config = AutoConfig.from_pretrained(models["llava15"])
    config.text_config.intermediate_size = 20_000
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "wide")
    AutoProcessor.from_pretrained(models["llava15"]).save_pretrained(tmp_path / "wide")
    options = run_options("llava15", count=1, words=1, per_device_train_batch_size=1, **precision)
    options["model_name_or_path"] = str(tmp_path / "wide")
    measured, batch = measure(options)
    estimated = estimate(options, batch)
    assert_close(estimated, measured)
    assert estimated.weights + estimated.gradients + estimated.optimizer > 0.75 * measured


def make_batch(tokens: int = 300, supervised: int = 200) -> dict:
    """Two rows for the tiny LLaVA: one picture each, the last `supervised` tokens trained."""
    ids = torch.full((2, tokens), 7)
    ids[:, :16] = 4  # the picture's tokens
    labels = torch.where(torch.arange(tokens) >= tokens - supervised, ids, -100)
    pixels = torch.zeros(2, 3, 32, 32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def test_only_supervised_tokens_have_logits(make_options, estimate):
    few, many = (estimate(make_options("llava15"), make_batch(supervised=count)) for count in (10, 290))
    vocabulary = 400  # at least: logits, their log-probabilities and their gradient
    assert many.peak - few.peak > 2 * 280 * vocabulary * 4


def test_attention_has_no_scores_of_every_token_with_every_other(make_options, estimate):
    short, long = (estimate(make_options("llava15"), make_batch(tokens, 10)) for tokens in (400, 1600))
    assert 3.5 < long.activations / short.activations < 4.2


def test_long_rows_do_not_fill_this_machine(make_options, estimate, monkeypatch):
    batch = make_batch(400)
    batch["attention_mask"][0, -50:] = 0
    expected = estimate(make_options("llava15"), batch)
    monkeypatch.setattr(dry_run, "MAX_MASK_SIZE", 100_000)
    assert estimate(make_options("llava15"), batch) == expected
    assert expected.activations > estimate(make_options("llava15"), make_batch(400)).activations + 2 * 400 * 400


def test_processes_share_all_but_activations_and_gathered_weights(make_options, estimate):
    options = make_options("llava15")
    alone, shared = estimate(options, make_batch()), estimate(options, make_batch(), processes=4)
    model = load.build_skeleton(load.load_config(build_config(options).model))
    sizes = [sum(p.numel() * 4 for p in layer.parameters()) for layer in model.model.language_model.layers]
    assert shared.gradients == alone.gradients // 4
    assert shared.optimizer == alone.optimizer // 4
    assert alone.weights // 4 + 2 * max(sizes) < shared.weights < alone.weights // 4 + alone.weights
    gathered = shared.weights - alone.weights // 4
    assert abs((shared.peak - gathered) - (alone.peak - (alone.weights + alone.optimizer) * 3 // 4)) < alone.gradients


def test_copies_on_several_processes_exchange_a_second_copy_of_the_gradients(make_options, estimate):
    alone, copied = (estimate(make_options("llava15"), make_batch(), replicated=copies) for copies in (False, True))
    assert copied.gradients == 2 * alone.gradients
    assert copied.peak == alone.peak + alone.gradients
    assert (copied.weights, copied.optimizer) == (alone.weights, alone.optimizer)


def test_mixed_precision_keeps_shared_weights_in_float32(make_options, estimate):
    options = make_options("llava15", dtype="bfloat16", keep_master_weights=False)
    plain = estimate(options, make_batch(), processes=64)
    mixed = estimate({**options, "bf16": True}, make_batch(), processes=64)
    kept = estimate({**options, "keep_master_weights": True}, make_batch(), processes=64)
    for found in (mixed, kept):
        assert found.gradients == pytest.approx(2 * plain.gradients, rel=0.01)
        assert found.optimizer == pytest.approx(2 * plain.optimizer, rel=0.01)
    assert kept.weights == pytest.approx(mixed.weights, rel=0.01)


def test_master_weights_are_counted_with_the_optimizer(make_options, estimate):
    plain, kept = (
        estimate(make_options("llava15", dtype="bfloat16", keep_master_weights=keep), make_batch())
        for keep in (False, True)
    )
    assert plain.optimizer == pytest.approx(2 * plain.gradients, rel=0.01)  # bytes a number: 2 of gradient, 2 × 2
    assert kept.optimizer == pytest.approx(6 * plain.gradients, rel=0.01)  # 3 × 4
    assert (kept.weights, kept.gradients) == (plain.weights, plain.gradients)


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("adamw_torch", 2), ("adamw_torch_fused", 2)])
def test_the_real_optimizer_makes_its_state(optimizer, states, make_options, estimate):
    estimated = estimate(make_options("llava15", optim=optimizer), make_batch())
    assert estimated.optimizer == pytest.approx(states * estimated.gradients, rel=0.01)


def test_a_model_that_cannot_be_simulated_has_an_estimate_without_activations(make_options, estimate, monkeypatch):
    def decides_by_a_number(self, *args, **kwargs):
        if self.lm_head.weight.sum() > 0:
            return None

    options = make_options("llava15")
    whole = estimate(options, make_batch())
    monkeypatch.setattr(build, "patch_supervised_loss", lambda model: None)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", decides_by_a_number)
    estimated = estimate(options, make_batch())
    assert estimated.activations is None
    assert "meta" in estimated.unknown
    assert estimated.peak == estimated.weights + estimated.gradients + estimated.optimizer
    assert estimated.weights == whole.weights
    assert estimated.gradients >= whole.gradients
