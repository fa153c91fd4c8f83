"""Quick image processors give what the stock ones give, bit by bit, and are saved as these."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import LAYOUTS, build_processor
from transformers import AutoImageProcessor

from tuning.data.pixels import patch_image_processor

SIZES = [(32, 32), (40, 40), (90, 30), (31, 80), (640, 480)]


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def assert_same(quick, stock) -> None:
    assert quick.keys() == stock.keys()
    for name, value in stock.items():
        for one, other in zip(quick[name], value, strict=True):
            if torch.is_tensor(other):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), name
            else:
                assert one == other


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_pixels(layout, size):
    stock = build_processor(layout).image_processor
    for mode in ("RGB", "L"):
        image = [[photo(size, mode).convert("RGB")]]
        assert_same(patch_image_processor(stock)(image, return_tensors="pt"), stock(image, return_tensors="pt"))


@pytest.mark.parametrize(
    "changes",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_resize": False},
        {"image_mean": [0.5, 0.1, 0.9], "image_std": [0.3, 0.2, 0.1], "rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["llava15", "granite_vision"])
def test_same_pixels_under_other_settings(layout, changes):
    stock = build_processor(layout).image_processor
    for name, value in changes.items():
        setattr(stock, name, value)
    image = [photo((32, 32))]
    assert_same(patch_image_processor(stock)(image, return_tensors="pt"), stock(image, return_tensors="pt"))


def test_the_image_that_is_given_stays_as_it_is():
    stock = build_processor("llava15").image_processor
    given = np.array(photo((32, 32))).transpose(2, 0, 1).copy()
    before = given.copy()
    patch_image_processor(stock)([given], return_tensors="pt")
    assert np.array_equal(given, before)


def test_it_is_saved_as_the_stock_one_and_travels_to_workers(tmp_path):
    stock = build_processor("granite_vision").image_processor
    quick = patch_image_processor(stock)
    assert quick.to_dict() == stock.to_dict()
    quick.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(stock)
    image = [photo((90, 30))]
    expected = stock(image, return_tensors="pt")
    for other in (pickle.loads(pickle.dumps(quick)), copy.deepcopy(quick), patch_image_processor(quick)):
        assert_same(other(image, return_tensors="pt"), expected)
    assert type(pickle.loads(pickle.dumps(quick))) is type(quick)
