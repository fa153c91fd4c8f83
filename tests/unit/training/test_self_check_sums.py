"""A fingerprint of weights, by which the self-check knows that they changed."""

import pytest
import torch

from tuning.training.self_check import fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [1, 3, 4071, 32_744, 70_001])
def test_any_single_bit_changes_it(dtype, numbers):
    weights = torch.randn(numbers, dtype=torch.float64).mul(50).to(dtype)
    before, data = int(fingerprint(weights)), weights.view(torch.uint8)
    places = range(len(data)) if len(data) < 100 else [0, 7, 8, 32_743, 32_744, len(data) // 2, len(data) - 1]
    for place in (place for place in places if place < len(data)):
        for bit in (0, 7):
            data[place] ^= 1 << bit
            assert int(fingerprint(weights)) != before
            data[place] ^= 1 << bit
    assert int(fingerprint(weights)) == before


@pytest.mark.parametrize("width", [512, 4096, 8186, 16_384])
def test_rows_that_change_places_change_it(width):
    weights = torch.randn(64, width)
    assert int(fingerprint(weights)) != int(fingerprint(weights.roll(1, 0)))
    assert int(fingerprint(weights)) != int(fingerprint(-weights))


def test_it_follows_the_numbers_not_how_they_lie_in_memory():
    weights = torch.randn(100, 33)
    kept = torch.cat([torch.zeros(1), weights.flatten()])[1:].view(100, 33)  # not where 8 bytes begin
    assert int(fingerprint(weights)) == int(fingerprint(kept)) == int(fingerprint(weights.t().contiguous().t()))
    assert int(fingerprint(torch.empty(0))) == 0
    assert int(fingerprint(torch.tensor(1.0))) != int(fingerprint(torch.tensor(2.0)))
