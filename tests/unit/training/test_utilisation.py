"""MFU and imbalance of the log are those of real tokens and pictures."""

import pytest
import torch
from tiny_models import build_model, build_processor

from tuning.data.chat_template import ChatFormat
from tuning.data.collator import describe_batch, probe_collator
from tuning.data.dummy_samples import trial_samples
from tuning.data.encode import Encoder
from tuning.model.flops import count_flops, peak_of
from tuning.model.parts import find_parts
from tuning.training.callbacks import StepMeter
from tuning.training.utilisation import count_operations, find_peak


def test_a_step_costs_its_rows_and_tiles_without_padding():
    model, processor = build_model("llava15"), build_processor("llava15")
    samples = trial_samples(Encoder(processor, ChatFormat(processor), 4096, max_images=1))
    flops, info = count_flops(model, find_parts(model)), describe_batch(samples)
    lengths = [len(sample.sequence["input_ids"]) for sample in samples]
    with_images = [sample for sample in samples if sample.images]
    tiles = [16] * len(with_images)  # 32 × 32 pixels in patches of 8 × 8
    assert info.row_tokens == lengths
    assert count_operations(flops, [info]) == int(flops.count(lengths, tiles, 0)["total"])
    apart = [describe_batch([sample]) for sample in samples]
    assert count_operations(flops, apart) == pytest.approx(count_operations(flops, [info]))
    assert probe_collator(processor).join(samples)["input_ids"].numel() > sum(lengths)
    assert count_operations(None, [info]) == 0


def test_the_log_says_them_where_they_are_known():
    meter = StepMeter(peak=100.0)
    meter.data_arrived(10, 5, [30.0, 50.0, 40.0])
    meter.data_arrived(10, 5, [60.0, 60.0, 60.0])
    meter.seconds, meter.steps = 2.0, 2
    figures = meter.report()
    assert figures["mfu"] == (40 + 60) / (2 * 100)
    assert figures["rank_imbalance"] == (50 / 40 + 1) / 2
    meter.data_arrived(10, 5, [30.0])
    meter.seconds = 1.0
    assert {"mfu": 0.3}.items() <= meter.report().items()
    assert not {"mfu", "rank_imbalance"} & StepMeter().report().keys()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(name, peak):
    assert peak_of(name) == peak


def test_a_cpu_has_no_peak():
    assert find_peak(torch.device("cpu")) is None
