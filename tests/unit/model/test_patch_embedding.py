"""A convolution over one patch per item is a matrix product, with the same gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tuning.model.patch_embedding import patch_patch_embeddings

PLAIN = {
    "Conv3d": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (6, 3, 2, 4, 4)),
    "Conv2d with a bias": (nn.Conv2d(3, 8, 4, 4), (6, 3, 4, 4)),
    "Conv2d, padding valid": (nn.Conv2d(3, 8, 4, 4, padding="valid"), (6, 3, 4, 4)),
}
OTHERS = {
    "a whole picture": (nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 12)),
    "padding": (nn.Conv2d(3, 8, 4, 4, padding=1), (6, 3, 4, 4)),
    "groups": (nn.Conv2d(4, 8, 4, 4, groups=2), (6, 4, 4, 4)),
    "no batch": (nn.Conv2d(3, 8, 4, 4), (3, 4, 4)),
}


@pytest.mark.parametrize("case", PLAIN | OTHERS)
def test_outputs_and_gradients_stay(case, monkeypatch):
    torch.manual_seed(0)
    layer, shape = (PLAIN | OTHERS)[case]
    stock = nn.Sequential(copy.deepcopy(layer)).double()
    ours = copy.deepcopy(stock)
    patch_patch_embeddings(ours)
    patches = torch.randn(shape, dtype=torch.float64)
    expected = stock(patches)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    if case in PLAIN:
        monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", None)
        monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", None)
    found = ours(patches)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_adapters_on_it_stay_as_they_are():
    torch.manual_seed(0)
    layer, shape = PLAIN["Conv3d"]
    stock = nn.Sequential(copy.deepcopy(layer)).double()
    stock = get_peft_model(stock, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ours = copy.deepcopy(stock)
    patch_patch_embeddings(ours)
    patches = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(patches), stock(patches))
