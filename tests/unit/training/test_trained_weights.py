"""The trained weights by the names that they have on disk."""

import pytest
import torch
from child_runs import small_disk
from peft import LoraConfig, get_peft_model
from torch import nn

from tuning.training.trained_weights import gather_trained, keep_on_disk, plain_name, repeated_names


class Tied(nn.Module):
    """An embedding, a layer, and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(4, 2), nn.Linear(2, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)))


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("_orig_mod.layers.0._orig_mod.bias", "layers.0.bias"),
        ("layers.0.bias", "layers.0.bias"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(wrapped, plain):
    assert plain_name(wrapped) == plain


def test_tied_weights_are_one_tensor_under_every_name():
    model = Tied()
    weights = gather_trained(model, {}, is_main_process=True)
    assert weights.keys() == {"embedding.weight", "layer.weight", "layer.bias", "head.weight"}
    assert weights["embedding.weight"] is weights["head.weight"]
    assert not any(weight.requires_grad for weight in weights.values())
    assert repeated_names(model) == {"head.weight"}
    assert gather_trained(model, {}, is_main_process=False) == {}


def test_of_an_adapter_only_what_it_changes_is_gathered():
    model = get_peft_model(Tied(), LoraConfig(target_modules=["layer"], r=1))
    weights = gather_trained(model, {}, is_main_process=True)
    assert [name.partition("lora_")[2] for name in weights] == ["A.default.weight", "B.default.weight"]
    assert all(torch.equal(weights[name], dict(model.named_parameters())[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_numbers_kept_on_disk_are_the_same_and_leave_no_file(shape, dtype, tmp_path):
    tensor = torch.randn(shape).to(dtype)
    kept = keep_on_disk(tensor, tmp_path)
    assert torch.equal(kept, tensor)
    assert kept.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert list(tmp_path.iterdir()) == []


def test_without_room_on_the_disk_they_stay_in_memory(tmp_path):
    tensor = torch.ones(3)
    assert keep_on_disk(tensor, tmp_path / "missing") is tensor
    with small_disk(tmp_path / "disk", 0.1) as disk:
        large = torch.ones(10**6)
        assert keep_on_disk(large, disk) is large
        assert list(disk.iterdir()) == []
