"""Which tensors are experts, by their shapes alone."""

import torch
from torch import nn

from tuning.model.lora_targets import LoraTargets, find_expert_tensors


class Holder(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


def test_experts_are_stacks_of_matrices_that_feed_each_other():
    model = nn.ModuleDict(
        {
            "gated": Holder(gate_up_proj=(4, 64, 16), down_proj=(4, 16, 32), gate_up_proj_bias=(4, 64)),
            "input_first": Holder(w1=(8, 16, 32), w2=(8, 32, 16)),
            "one_shared": Holder(gate_proj=(1, 32, 16), up_proj=(1, 32, 16), down_proj=(1, 16, 32)),
        }
    )
    assert find_expert_tensors(model) == [
        *("gated.gate_up_proj", "gated.down_proj", "input_first.w1", "input_first.w2"),
        *("one_shared.gate_proj", "one_shared.up_proj", "one_shared.down_proj"),
    ]


def test_positions_queries_and_kernels_are_no_experts():
    model = nn.ModuleDict(
        {
            "positions": Holder(cls_token=(1, 1, 64), pos_embed=(1, 17, 64)),
            "table": Holder(position_embedding_table=(2, 256, 64)),
            "queries": Holder(query=(1, 1, 64), image_positions=(1, 4, 64)),
            "scale": Holder(gamma=(8, 1, 1), beta=(8, 1, 1)),
            "convolution": nn.Conv1d(4, 4, 3),
        }
    )
    assert find_expert_tensors(model) == []


def test_targets_without_a_module_of_experts_lose_all_of_its_tensors():
    targets = LoraTargets(
        ["a.q_proj", "a.o_proj"], ["b.gate_proj.weight"], ["c.experts.down_proj", "d.experts.down_proj"]
    )
    left = targets.without(["a.q_proj", "b.gate_proj", "c.experts"])
    assert left == LoraTargets(["a.o_proj"], [], ["d.experts.down_proj"])
    assert str(left) == "1 modules and 1 expert tensors"
