"""The count from shapes against PyTorch's own count of what a model computes."""

import pytest
import torch
from flops import RowShape, count_step
from torch.utils.flop_counter import FlopCounterMode
from workloads import make_config_and_processor

from tuning.model.flops import layers_in_use, utilisation

ADAPTED = ["q_proj", "v_proj", "up_proj"]


def make_batch(processor, sides):
    from PIL import Image

    image = Image.new("RGB", sides, "teal")
    batch = processor(text="USER:\n<image>\nWhat is it?", images=image, return_tensors="pt")
    return batch, RowShape(batch["input_ids"].numel(), batch["pixel_values"].flatten(0, -4).shape[0])


def count_by_torch(model, batch):
    """Forward and backward of the sum of all logits: a head at every position."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def make_model(layout, vision_layers):
    from transformers import AutoModelForImageTextToText

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
