"""What a row costs, from a model's shapes and what its processor makes of a picture."""

from dataclasses import astuple
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures.case import Case
from PIL import Image

from tuning.data.balance import UNIT, RowCost
from tuning.data.dummy_samples import PictureSize, measure_picture
from tuning.data.processing import IMAGE_TOKENS
from tuning.model.flops import Flops, count_flops
from tuning.model.load import build_skeleton
from tuning.model.parts import find_parts
from tuning.training.data_loading import DataLoading
from tuning.training.row_cost import find_row_cost

FLOPS = Flops(100.0, {inf: 0.5, 8: 2.0}, 7.0, 30.0, {inf: 0.1}, 4.0, patch_values=12, class_tokens=1)


def test_a_cost_has_tokens_squared_tokens_and_image_tokens():
    cost = find_row_cost(FLOPS, PictureSize(5, (1, 2, 3, 4, 10)))  # two tiles of 10 patches
    token = 100 + 2 * 8 * 2  # in a window of 8, attention grows with the tokens
    image_token = (2 * (11 * 30 + 0.1 * 11**2) + 20 * 4) / 5
    assert cost.per_token == UNIT
    assert cost.per_token_squared == round(UNIT * 0.5 / token)
    assert cost.per_image_token == round(UNIT * image_token / token)


def test_image_tokens_cost_no_more_where_the_tower_is_unknown():
    assert find_row_cost(FLOPS, None).per_image_token == round(UNIT * 4 / 132)
    assert find_row_cost(Flops(0, {}, 0, 1, {}, 0, None), None) is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "smolvlm", "gemma3", "llava+pixtral"])
def test_it_agrees_with_the_operations_of_a_row(name, tmp_path):
    """For the picture that is measured, and a long text beside it."""
    case = Case.make(name, tmp_path, weights=False)
    skeleton = build_skeleton(case.model_config)
    flops, picture = count_flops(skeleton, find_parts(skeleton)), measure_picture(case.encoder)
    assert picture.tokens == case.encoder.count_image_tokens(Image.new("RGB", (640, 480)))
    tokens = np.array([9000, 9000 + picture.tokens, 50_000])
    images = np.array([0, picture.tokens, 0])
    tiles = flops.find_tiles(picture.shape)
    counted = [
        flops.count([length], tiles if shown else [], 0)["total"] for length, shown in zip(tokens, images, strict=True)
    ]
    cost = find_row_cost(flops, picture).of_rows(tokens, images)
    assert cost / cost[0] == pytest.approx(np.array(counted) / counted[0], rel=1e-3)


@pytest.mark.parametrize("tokens", [None, torch.zeros(1, 3)], ids=["refused", "no tokens"])
def test_a_picture_that_the_processor_makes_nothing_of_has_no_size(tokens, tmp_path, monkeypatch):
    encoder = Case.make("qwen2_vl", tmp_path, weights=False).encoder

    def process(*_, **__):
        if tokens is None:
            raise ValueError("no such picture")
        return {IMAGE_TOKENS: tokens, "pixel_values": torch.zeros(4, 12)}

    monkeypatch.setattr(encoder.row_processor, "process", process)
    assert measure_picture(encoder) is None


@pytest.mark.parametrize("mine", [RowCost(UNIT, 2, 3), None])
@pytest.mark.parametrize("first", [RowCost(UNIT, 5, 0), None])
def test_every_process_takes_the_cost_of_the_first(mine, first):
    gathered = torch.tensor([[*astuple(first)] if first else [0, 0, 0], [1, 2, 3]])
    processes = SimpleNamespace(all_gather_ints=lambda numbers: gathered)
    loading = SimpleNamespace(row_cost=mine, processes=processes)
    DataLoading._take_cost_of_first_process(loading)
    assert loading.row_cost == first
