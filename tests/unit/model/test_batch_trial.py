"""The trial of a padded batch finds a model that gives a row in it something else than alone."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tiny_models import LAYOUTS, build_model, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.encode import Encoder
from tuning.model.loss import patch_supervised_loss
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.training.batch_check import find_batch_fault


@cache
def encoder_of(layout: str) -> Encoder:
    processor = build_processor(layout)
    return Encoder(processor, ChatFormat(processor), 4096)


def prepared(layout: str):
    model = build_model(layout)
    patch_mllama_cross_attention(model)
    patch_supervised_loss(model)
    patch_picture_dtype(model)
    return model


def fault_of(model, layout: str, forward: Callable | None = None, *, half: bool = False) -> str:
    encoder = encoder_of(layout)
    return find_batch_fault(model, forward or model, encoder, probe_collator(encoder.processor), half=half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_documented_layouts_pass(layout, dtype):
    model = prepared(layout).to(dtype).train()
    state = torch.get_rng_state()
    assert fault_of(model, layout, half=dtype == torch.bfloat16) == ""
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def with_pictures_of_others(model) -> Callable:
    """Rows look at the pictures of the row before, as with places that count from the wrong row."""
    return lambda **batch: model(
        **batch | {"pixel_values": batch["pixel_values"].roll(1, 0)} if "pixel_values" in batch else batch
    )


def with_positions_of_the_batch(model) -> Callable:
    """Positions that go on in the next row: too small a change to see in the results of 16 bits."""

    def forward(**batch):
        ids = batch["input_ids"]
        start = torch.arange(len(ids))[:, None]
        return model(**batch, position_ids=torch.arange(ids.shape[1])[None] + start)

    return forward


def with_one_row_only(model) -> Callable:
    def forward(**batch):
        if len(batch["input_ids"]) > 1:
            raise ValueError("one row, please")
        return model(**batch)

    return forward


FAULTS = {
    with_pictures_of_others: "the results of row 1 of the trial differ by",
    with_positions_of_the_batch: "row 2 of the trial gets other position ids in a batch than alone",
    with_one_row_only: "it fails on rows together that it takes one by one (ValueError: one row, please)",
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("break_model", FAULTS)
def test_a_fault_is_named_with_the_tensors_of_images(break_model, half):
    model = prepared("llava15").to(torch.bfloat16 if half else torch.float32)
    found = fault_of(model, "llava15", break_model(model), half=half)
    assert FAULTS[break_model] in found
    assert found.endswith("its tensors for images are pixel_values")


def test_a_model_that_runs_no_row_is_not_judged():
    def forward(**batch):
        raise ValueError("never")

    assert fault_of(prepared("llava15"), "llava15", forward) == ""
