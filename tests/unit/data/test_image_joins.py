"""Every way in which a processor may join the pictures of several rows is found by looking at what it does."""

import pytest
import torch
from PIL import Image

from tuning.data.image_joins import ImageJoin, learn_image_layout
from tuning.errors import UserError


def numbers(image: Image.Image) -> torch.Tensor:
    """The picture in quarter size, `[pixels, 3]`: as many rows as the picture is large."""
    small = image.resize((image.width // 4, image.height // 4))
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(-1, 3) / 255


def patches(rows, return_tensors="pt"):
    """As Qwen's: the patches of all pictures one after the other, and a grid for each picture."""
    images = [image for row in rows for image in row]
    grids = torch.tensor([[1, image.height, image.width] for image in images])
    return {"pixel_values": torch.cat([numbers(image) for image in images]), "image_grid_thw": grids}


def last_dimension(rows, return_tensors="pt"):
    """As MiniCPM's: the patches lie along the last dimension of one row."""
    made = patches(rows)
    return made | {"pixel_values": made["pixel_values"].T[None]}


def pooled(rows, return_tensors="pt"):
    """As Molmo2's: pairs of places among the patches of all pictures, and -1 where a picture has no more."""
    made, pairs, start = patches(rows), [], 0
    for row in rows:
        for image in row:
            places = torch.arange(start, start := start + len(numbers(image)), dtype=torch.int32)
            pairs.append(torch.cat([places, torch.tensor([-1, -1], dtype=torch.int32)]).view(-1, 2))
    return made | {"pooling": torch.cat(pairs)}


def places(rows, return_tensors="pt"):
    """Places among the pictures of all rows."""
    made = patches(rows)
    return made | {"place": torch.arange(len(made["image_grid_thw"]))}


def nested(rows, return_tensors="pt"):
    """As Idefics': rows, pictures, and a mask of what is no padding."""
    most = max(len(row) for row in rows)
    longest = max(len(numbers(image)) for row in rows for image in row)
    pixels, mask = torch.zeros(len(rows), most, longest, 3), torch.zeros(len(rows), most, longest, dtype=torch.bool)
    for n, row in enumerate(rows):
        for m, image in enumerate(row):
            values = numbers(image)
            pixels[n, m, : len(values)], mask[n, m, : len(values)] = values, True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def tiles(rows, return_tensors="pt"):
    """As Perception LM's: `[pictures, tiles, …]`, and pictures with another number of tiles are refused."""
    made = [numbers(image).view(1, -1, 8, 3) for row in rows for image in row]
    return {"pixel_values": torch.cat(made)}


def local(rows, return_tensors="pt"):
    """As Step's: more tensors where a picture is large."""
    made = patches(rows)
    large = [numbers(image) for row in rows for image in row if image.width > 64]
    return made | ({"pixel_values_local": torch.cat(large)} if large else {})


def strange(rows, return_tensors="pt"):
    """The number of pictures in the whole batch: nothing that rows tell."""
    made = patches(rows)
    return made | {"count": torch.full((1, 1), float(len(made["image_grid_thw"]) ** 2))}


PICTURES = [
    Image.linear_gradient("L").resize(size).convert("RGB").rotate(turn)
    for size, turn in (((32, 64), 0), ((96, 32), 180), ((64, 64), 180), ((128, 32), 0))
]
ROWS = [PICTURES[:1], PICTURES[1:3], PICTURES[3:], PICTURES[:1]]


@pytest.mark.parametrize(
    ("processor", "joins"),
    [
        (patches, {}),
        (nested, {}),
        (local, {}),
        (last_dimension, {"pixel_values": ImageJoin(2)}),
        (places, {"place": ImageJoin(0, "image_grid_thw", 1)}),
        (pooled, {"pooling": ImageJoin(0, "pixel_values", 1)}),
    ],
)
def test_rows_are_joined_as_the_processor_joins_them(processor, joins):
    layout = learn_image_layout(processor)
    assert layout.joins == joins
    assert layout.unknown == ()
    joined = layout.join([processor([row]) for row in ROWS])
    expected = processor(ROWS)
    assert joined.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(joined[name], value), name


def test_what_the_processor_refuses_to_join_is_joined_where_it_differs():
    layout = learn_image_layout(tiles)
    assert layout.joins == {"pixel_values": ImageJoin(1, as_one=True)}
    alone = [tiles([[picture] * number]) for number, picture in enumerate(PICTURES, 1)]
    joined = layout.join(alone)["pixel_values"]
    assert torch.equal(joined[0], torch.cat([row["pixel_values"].flatten(0, 1) for row in alone]))


def test_a_row_without_pictures_is_masked_among_nested_ones():
    layout = learn_image_layout(nested)
    rows = [ROWS[1], [], ROWS[0]]
    joined = layout.join([nested([row]) if row else {} for row in rows])
    expected = nested(rows)
    assert not expected["pixel_attention_mask"][1].any()
    for name, value in expected.items():
        assert torch.equal(joined[name], value), name


def test_a_tensor_that_nobody_can_join_is_refused_by_its_name():
    layout = learn_image_layout(strange)
    assert layout.unknown == ("count",)
    row = strange(ROWS[:1])
    assert torch.equal(layout.join([row])["count"], row["count"])
    with pytest.raises(UserError, match="joins count of several rows in a way that is not known"):
        layout.join([row, strange(ROWS[1:2])])
