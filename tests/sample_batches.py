"""What several parity tests share: samples that differ in size and images, gradients, the trial without padding."""

from dataclasses import replace

import torch
from PIL import Image
from tiny_models import build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import probe_collator
from tuning.data.dummy_samples import trial_samples
from tuning.data.encode import Encoder
from tuning.data.sources import Row
from tuning.model.attention import Attention
from tuning.model.padding_free import Packing, TrialBatches, find_packing
from tuning.training.data_loading import find_positions, make_trial_batches

SIZES = [(40, 40), (90, 30), (30, 80), (64, 64)]


def make_batch(layout: str) -> list:
    processor = build_processor(layout)
    encoder = Encoder(processor, ChatFormat(processor), 4096)
    samples = []
    for number, size in enumerate(SIZES):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        answer = {"role": "assistant", "content": "It is a cat. " * (number + 1)}
        row = {"messages": [question, answer], "images": [Image.new("RGB", size, (60 * number, 99, 200))]}
        samples.append(encoder.encode(Row(row, "rows", number)))
    text_only = {
        "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
        "images": None,
    }
    several = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": "image"}, {"type": "image"}]},
            {"role": "assistant", "content": "The blue one."},
        ],
        "images": [Image.new("RGB", (50, 50), "blue"), Image.new("RGB", (20, 70), "red")],
    }
    return [*samples, *(encoder.encode(Row(row, "", 0)) for row in (text_only, several))]


def as_inputs(layout: str, samples: list) -> dict:
    batch = probe_collator(build_processor(layout)).join(samples)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def try_rows(model, forward, encoder: Encoder, attention: Attention, *, half: bool = False) -> Packing:
    """How this model takes packed rows, by the trial that training runs."""

    def make_batches() -> TrialBatches:
        samples = trial_samples(encoder)
        collator = replace(probe_collator(encoder.processor), positions=find_positions(model, samples))
        return make_trial_batches(samples, collator)

    return find_packing(model, forward, make_batches, attention, half=half)
