"""The streaming writer: a file that safetensors reads, with every format copied bit by bit."""

import torch
from safetensors.torch import load_file, save_file

from tuning.export.merge import Entry
from tuning.model.saved_weights import SavedWeights, write_tensors

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "transposed": torch.randn(4, 2).T.contiguous(),
    "eight bits": torch.randn(7).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(9),
    "one number": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}


def test_every_format_is_copied_bit_by_bit_in_the_same_order(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights = SavedWeights(tmp_path)
    entries = [Entry(key, key, stored, None, stored.format) for key, stored in weights.stored.items()]
    write_tensors(tmp_path / "copy", entries, (entry.source.read() for entry in entries))
    copied = load_file(tmp_path / "copy")
    assert list(copied) == list(load_file(tmp_path / "model.safetensors"))
    for key, tensor in TENSORS.items():
        assert (copied[key].dtype, copied[key].shape) == (tensor.dtype, tensor.shape)
        assert copied[key].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
