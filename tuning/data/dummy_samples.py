"""Made-up samples without a trained token: to try a model on, and for processes that lack an image."""

import math
from dataclasses import dataclass
from functools import partial

from PIL import Image

from tuning.data.encode import Encoder, Sample
from tuning.data.image_joins import small_pictures
from tuning.data.processing import IMAGE_TOKENS
from tuning.errors import try_optional


def dummy_image_sample(encoder: Encoder) -> Sample:
    """A blank image, for a process that has no image, or no row, where other processes have some.

    Its vision tower then computes as theirs do. Without it the processes would wait for each other for ever (FSDP), or
    fail because a gradient is missing (DDP).
    """
    return encoder.untrained_sample(encoder.process_question([Image.new("RGB", (32, 32))]))


def dummy_samples(encoder: Encoder) -> list[Sample]:
    """Three short rows that differ: with an image, without, and with another image."""
    red, blue = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (32, 48), "blue")
    questions = [([red], "What is this?"), ([], "Is it as it was before?"), ([blue], "And now?")]
    return [encoder.untrained_sample(encoder.process_question(images, text)) for images, text in questions]


def trial_samples(encoder: Encoder) -> list[Sample]:
    """Rows that differ in what a batch may get wrong: lengths, sizes of pictures, and how many there are.

    They are the rows that the processor takes: some refuse a row without a picture, or with two of other sizes.
    """
    square, wide, tall, other = small_pictures()
    questions = [
        ([square], "What is this?"),
        ([], "Is it as it was before?"),
        ([wide], "And now, what do you see here?"),
    ]
    if encoder.max_images != 1:
        questions.append(([tall, other], "Which is larger?"))

    def make(images: list[Image.Image], text: str) -> Sample:
        return encoder.untrained_sample(encoder.process_question(images, text))

    made = [try_optional(partial(make, *question), catch_user_errors=True) for question in questions]
    return [attempt.value for attempt in made if attempt.value is not None]


@dataclass(frozen=True)
class PictureSize:
    """What a picture of 640×480 becomes: tokens of its row, and numbers for the vision tower, in this `shape`."""

    tokens: int
    shape: tuple[int, ...]


def measure_picture(encoder: Encoder) -> PictureSize | None:
    """Process a blank picture. None where the processor makes no tokens, or no numbers, of it."""
    blank = Image.new("RGB", (640, 480))
    inputs = try_optional(lambda: encoder.process_question([blank]), catch_user_errors=True).value or {}
    shapes = [value.shape for value in inputs.values() if value.is_floating_point()]
    tokens = int(inputs[IMAGE_TOKENS].sum()) if inputs else 0
    return PictureSize(tokens, tuple(max(shapes, key=math.prod))) if tokens and shapes else None
