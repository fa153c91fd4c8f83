"""Convolutions that get one patch per item, computed as the matrix products that they are."""

import types

import torch
import torch.nn.functional as F
from torch import nn


def patch_patch_embeddings(model: nn.Module) -> None:
    """Replace the `forward` of convolutions: an input as large as their kernel is multiplied by their weights.

    Qwen-VL and its kin cut pictures into patches beforehand, and give each to a `Conv3d` that has one place to be in.
    PyTorch's convolutions are slow at that. Weights and their names stay. This can go once transformers computes it so
    (5.24 does not).
    """
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Conv3d) and _is_plain(module):
            module.forward = types.MethodType(_multiply_patches, module)


def _is_plain(module: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether the kernel takes neighbours of all channels, and nothing from outside the input."""
    unpadded = module.padding == "valid" or not any(module.padding)
    return unpadded and module.groups == 1 and set(module.dilation) == {1}


def _multiply_patches(self: nn.Conv2d | nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    if patches.dim() != self.weight.dim() or tuple(patches.shape[2:]) != self.kernel_size:
        return type(self).forward(self, patches)
    made = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
    return made.reshape(*made.shape, *(1 for _ in self.kernel_size))
