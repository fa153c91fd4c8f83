"""The count from shapes against PyTorch's own count of what a model computes."""

import math
from math import inf

import numpy as np
import pytest
import torch
from architectures.case import Case
from architectures.checkpoints import build
from architectures.registry import ARCHS
from flops import RowShape, count_step
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from workloads import make_config_and_processor

from tuning.data.processing import IMAGE_TOKENS, PLACES
from tuning.model import load
from tuning.model.flops import Flops, count_flops, layers_in_use, utilisation
from tuning.model.parts import LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, find_parts, freeze_parts

ADAPTED = ["q_proj", "v_proj", "up_proj"]


def make_batch(processor, sides):
    image = Image.new("RGB", sides, "teal")
    batch = processor(text="USER:\n<image>\nWhat is it?", images=image, return_tensors="pt")
    return batch, RowShape(batch["input_ids"].numel(), batch["pixel_values"].flatten(0, -4).shape[0])


def count_by_torch(model, batch):
    """Forward and backward of the sum of all logits: a head at every position."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def make_model(layout, vision_layers):
    config, processor = make_config_and_processor(layout, "tiny")
    config.vision_feature_layer = vision_layers
    config.text_config.num_hidden_layers = 6
    config._attn_implementation = "eager"  # PyTorch counts its two products, in full
    torch.manual_seed(0)
    return config, processor, AutoModelForImageTextToText.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(("layout", "read"), [("granite_vision", [-4, -3, -2, -1]), ("llava15", -1)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_as_many_as_pytorch_counts(layout, read, method):
    config, processor, model = make_model(layout, read)
    batch, row = make_batch(processor, (90, 30))
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = rf".*language_model.*\.({'|'.join(ADAPTED)})"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    more = {"rank": 4, "adapted": ADAPTED} if method == "lora" else {}
    counted = count_step(config, [row], supervised_tokens=row.tokens, **more)
    in_full = counted["total"] + counted["attention"]  # eager attention does not leave the upper triangle out
    assert in_full == pytest.approx(count_by_torch(model, batch), rel=0.02)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm", "mistral3", "paddleocr_vl"]
)
def test_nearly_as_many_as_pytorch_counts_for_other_architectures(name, tmp_path):
    case = Case.make(name, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(case.folder, attn_implementation="eager")
    inputs = case.encoder.process_question([Image.new("RGB", (300, 200))])
    batch = {key: value for key, value in inputs.items() if key not in (IMAGE_TOKENS, PLACES)}
    flops, tokens = count_flops(model, find_parts(model)), batch["input_ids"].numel()
    shape = max((value.shape for value in batch.values() if value.is_floating_point()), key=math.prod)
    counted = flops.count([tokens], flops.find_tiles(shape), supervised_tokens=tokens)
    in_full = counted["total"] + counted["attention"]
    assert in_full == pytest.approx(count_by_torch(model, batch), rel=0.05)


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_the_shapes_of_every_architecture_are_counted(name):
    skeleton = load.build_skeleton(build(name).config).requires_grad_(True)  # Idefics freezes some of its layers
    flops = count_flops(skeleton, find_parts(skeleton))
    assert min(flops.decoder, flops.count([9], [4], 1)["total"]) > 0
    skeleton.requires_grad_(False)
    frozen = count_flops(skeleton, find_parts(skeleton))
    assert 3 * frozen.decoder == pytest.approx(flops.decoder)


def test_only_what_trains_and_what_follows_it_has_a_backward():
    model = load.build_skeleton(build("qwen2_vl").config)
    parts, whole = find_parts(model), count_flops(model, find_parts(model))
    freeze_parts(model, parts, {VISION_TOWER})
    found = count_flops(model, parts)
    assert (3 * found.tower, found.projector, found.decoder) == (whole.tower, whole.projector, whole.decoder)
    freeze_parts(model, parts, {PROJECTOR, LANGUAGE_MODEL})
    found = count_flops(model, parts)
    assert (found.tower, 3 * found.projector, 3 * found.decoder, 3 * found.head) == pytest.approx(
        (whole.tower, 2 * whole.projector, 2 * whole.decoder, 2 * whole.head)
    )


def test_attention_in_a_window_grows_with_the_tokens():
    flops = Flops(0, {4: 1.0, inf: 10.0}, 0, 0, {16: 1.0}, 0, None)
    assert flops.count_attention(np.array([4, 10])).tolist() == [16 + 160, 2 * 40 - 16 + 1000]
    assert flops.count_tower(np.array([9, 100])).tolist() == [81, 1600]


def test_a_patch_of_overlapping_convolutions_is_what_their_strides_span():
    model = load.build_skeleton(build("fast_vlm").config)
    assert count_flops(model, find_parts(model)).patch_values == 3 * 64**2  # tests/architectures: 128 pixels, 4 tokens


def test_a_tower_for_sound_is_not_run_on_pictures():
    model = load.build_skeleton(build("qwen3_omni_moe_thinker").config)
    assert count_flops(model, find_parts(model)).patch_values == 3 * 2 * 4 * 4


def test_tiles_and_pictures_are_told_apart():
    flops = Flops(0, {}, 0, 0, {}, 0, 12)
    assert flops.find_tiles((1, 5, 3, 4, 4)) == [4] * 5
    assert flops.find_tiles((40, 12), pictures=2) == [20, 20]
    assert flops.find_tiles((40, 3, 2, 2)) == [40]
    assert Flops(0, {}, 0, 0, {}, 0, None).find_tiles((40, 12)) == []


def test_layers_after_the_last_one_read_and_untrained_logits_are_not_counted():
    config, processor, _ = make_model("llava15", -1)
    _, row = make_batch(processor, (40, 40))
    everything = count_step(config, [row], supervised_tokens=row.tokens)
    config.vision_feature_layer = -2
    assert layers_in_use(config) == config.vision_config.num_hidden_layers - 1
    less = count_step(config, [row], supervised_tokens=3)
    assert less["tower"] < everything["tower"]
    assert less["head"] / everything["head"] == pytest.approx(3 / row.tokens)
    assert less["decoder"] == everything["decoder"]


def test_utilisation_needs_a_known_card():
    assert utilisation(5e14, 1.0, 1e15) == 0.5
    assert utilisation(5e14, 1.0, None) is None
