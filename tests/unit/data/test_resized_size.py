"""What a processor makes of a picture counts against max_image_pixels, not only the picture's own pixels."""

import io
import resource

import pytest
import transformers
from PIL import Image
from tiny_models import IMAGE_SIZE, LAYOUTS, build_processor

from tuning.config.options import RowArguments
from tuning.data.from_config import make_encoder
from tuning.data.images import ImageRules, load_image, measure_image
from tuning.data.resized_size import find_short_edge
from tuning.data.row_lengths import RowMeter
from tuning.data.sources import Row
from tuning.errors import UserError


def clip(**size):
    return transformers.CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_layout_that_crops_has_a_short_edge(layout):
    expected = IMAGE_SIZE if layout == "llava15" else None
    assert find_short_edge(build_processor(layout).image_processor) == expected


@pytest.mark.parametrize(
    ("processor", "edge"),
    [
        (clip(shortest_edge=336), 336),
        (clip(shortest_edge=32), 32),
        (clip(shortest_edge=32, longest_edge=96), None),
        (clip(height=32, width=48), None),
        (transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, do_resize=False, do_center_crop=False), None),
        (transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}), None),
    ],
)
def test_the_short_edge_is_found_by_trying(processor, edge):
    assert find_short_edge(processor) == edge


def test_a_processor_that_cannot_be_tried_has_no_short_edge():
    assert find_short_edge(object()) is None


def picture(size: tuple[int, int], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("read", [load_image, measure_image])
@pytest.mark.parametrize("size", [(1, 50), (50, 1), (3, 200)])
@pytest.mark.parametrize("decoded", [True, False])
def test_a_thin_picture_is_refused_before_it_is_decoded(read, size, decoded):
    stored = Image.new("RGB", size) if decoded else picture(size)
    rules = ImageRules(max_pixels=100_000, short_edge=64)
    with pytest.raises(UserError) as caught:
        read(stored, None, "rows.jsonl, row 3, field 'images', image 0", rules)
    message = str(caught.value)
    assert message.startswith(
        f"rows.jsonl, row 3, field 'images', image 0: the image has {size[0]}×{size[1]} pixels, and"
    )
    assert "resize its short side to 64" in message
    assert "max_image_pixels 100000" in message
    assert caught.value.kind == "image too large"
    read(stored, None, "", ImageRules(max_pixels=300_000, short_edge=64))
    read(stored, None, "", ImageRules(max_pixels=100_000))


def test_measuring_a_thin_picture_makes_no_large_one():
    """The limit holds before the processor's own formula, and before a blank picture of that size is made."""
    processor = build_processor("llava15")
    processor.image_processor.size = {"shortest_edge": 336}
    config = transformers.LlavaConfig()
    encoder = make_encoder(RowArguments(), processor, config, "01 Jan 2026")
    assert encoder.image_rules.short_edge == 336
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A line."}]},
    ]
    rows = [
        Row({"messages": messages, "images": [picture(size)]}, "rows.jsonl", n)
        for n, size in enumerate([(1, 4000), (9, 9)])
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for exact, decode in ((True, False), (True, True), (False, False)):
        thin, square = RowMeter(encoder, exact=exact, decode_images=decode).measure(rows)
        assert "336×1344000 pixels" in str(thin.error)
        assert square.error is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
