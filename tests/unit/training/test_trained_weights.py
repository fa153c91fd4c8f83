"""The trained weights by the names that they have on disk."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tuning.training.trained_weights import gather_trained, plain_name, repeated_names


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
