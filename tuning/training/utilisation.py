"""What the batches of a step cost a process, and what its device could do: for MFU and imbalance in the log."""

from collections.abc import Sequence

import torch

from tuning.data.collator import BatchInfo
from tuning.model.flops import Flops, peak_of


def count_operations(flops: Flops | None, infos: Sequence[BatchInfo]) -> int:
    """The operations of a step's batches, of real tokens and pictures only; 0 where the model's shapes are unknown."""
    if flops is None:
        return 0
    tokens = [number for info in infos for number in info.row_tokens]
    tiles = [tile for info in infos for shape, pictures in info.pictures for tile in flops.find_tiles(shape, pictures)]
    return int(flops.count(tokens, tiles, sum(info.supervised_tokens for info in infos))["total"])


def find_peak(device: torch.device) -> float | None:
    """The dense 16-bit operations per second of a device, where they are known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
