"""Batch normalisation that is frozen keeps its running statistics while the model trains."""

import torch
from torch import nn

from tuning.model.vision_tower import patch_frozen_statistics


def make_model(**options) -> nn.Sequential:
    """A tower with batch normalisation, and a head."""
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options)), nn.Linear(4, 2))


def statistics_after_training(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model.train()
    model(torch.randn(8, 4)).sum().backward()
    model.eval()
    model.train()  # as Trainer does in each step
    model(torch.randn(8, 4)).sum().backward()
    return [buffer.clone() for buffer in model.buffers()]


def test_a_frozen_tower_keeps_its_statistics_in_training_mode():
    for options in ({}, {"affine": False}):
        model = make_model(**options)
        before = [buffer.clone() for buffer in model.buffers()]
        model[0].requires_grad_(False)
        patch_frozen_statistics(model)
        assert all(map(torch.equal, statistics_after_training(model), before))
        assert model.training
        assert model[0].training


def test_a_frozen_tower_gives_a_row_what_it_gives_alone():
    model = make_model().requires_grad_(False)
    patch_frozen_statistics(model)
    model.train()
    rows = torch.randn(3, 4)
    assert torch.allclose(model(rows)[:1], model(rows[:1]))


def test_statistics_of_a_tower_that_trains_move():
    for options in ({}, {"affine": False}):
        model = make_model(**options)
        before = [buffer.clone() for buffer in model.buffers()]
        patch_frozen_statistics(model)
        assert not any(map(torch.equal, statistics_after_training(model), before))
