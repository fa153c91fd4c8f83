"""How models write boxes in texts: `bbox_format`. tuning/config/families.py names the format of a family."""

from dataclasses import dataclass

PIXELS, RESIZED = "pixels", "resized pixels"


@dataclass(frozen=True)
class BoxFormat:
    """A way to write boxes, points and references.

    `scale`: the coordinate of the right and of the lower edge of a picture: a number, `PIXELS` for the width and height
    of the picture, or `RESIZED` for those that it has after the image processor. `box` and `point` are patterns of the
    coordinates. `reference`: what stands before and after the words that name an object. `decimals` of a coordinate.
    """

    scale: int | str
    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    point: str = "[{x1}, {y1}]"
    reference: tuple[str, str] = ("", "")
    decimals: int = 0


BOX_FORMATS = {
    "norm1": BoxFormat(1, decimals=3),
    # Qwen3-VL: https://github.com/QwenLM/Qwen3-VL/blob/main/cookbooks/2d_grounding.ipynb, quoted in its issue 1741
    "norm1000": BoxFormat(1000),
    "pixels": BoxFormat(PIXELS),
    # Qwen2.5-VL: https://arxiv.org/abs/2502.13923; example: qwen-vl-finetune/README.md of QwenLM/Qwen3-VL
    "resized_pixels": BoxFormat(RESIZED),
    # Qwen2-VL: https://arxiv.org/abs/2409.12191, section 2.2.1. Rounded as ms-swift does, so that the edge is 1000:
    # https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html#grounding
    "qwen2_vl": BoxFormat(
        1000,
        box="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        point="<|box_start|>({x1},{y1})<|box_end|>",
        reference=("<|object_ref_start|>", "<|object_ref_end|>"),
    ),
    # InternVL 2 and 2.5: https://github.com/modelscope/ms-swift/blob/main/swift/template/templates/internvl.py
    "internvl": BoxFormat(
        1000,
        box="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>",
        point="<box>[[{x1}, {y1}]]</box>",
        reference=("<ref>", "</ref>"),
    ),
    # PaliGemma: https://github.com/google-research/big_vision/blob/main/big_vision/pp/proj/paligemma/segmentation.py
    "paligemma": BoxFormat(
        1023,
        box="<loc{y1:04}><loc{x1:04}><loc{y2:04}><loc{x2:04}>",
        point="<loc{y1:04}><loc{x1:04}>",
    ),
}
