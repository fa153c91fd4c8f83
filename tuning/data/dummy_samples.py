"""Made-up samples without a trained token: to try a model on, and for processes that lack an image."""

from PIL import Image

from tuning.data.encode import Encoder, Sample


def dummy_image_sample(encoder: Encoder) -> Sample:
    """A blank image, for a process that has no image, or no row, where other processes have some.

    Its vision tower then computes as theirs do. Without it the processes would wait for each other for ever (FSDP), or
    fail because a gradient is missing (DDP).
    """
    return encoder.untrained_sample(encoder.process_question([Image.new("RGB", (32, 32))]))


def dummy_image_samples(encoder: Encoder) -> list[Sample]:
    """Two rows of different length with pictures of different size."""
    wide, tall = Image.new("RGB", (64, 40), "red"), Image.new("RGB", (33, 48), "blue")
    rows = [([wide], "What?"), ([tall], "Is it as it was before, or another one?")]
    return [encoder.untrained_sample(encoder.process_question([*images], text)) for images, text in rows]


def dummy_samples(encoder: Encoder) -> list[Sample]:
    """Three short rows that differ: with an image, without, and with another image."""
    red, blue = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (32, 48), "blue")
    questions = [([red], "What is this?"), ([], "Is it as it was before?"), ([blue], "And now?")]
    return [encoder.untrained_sample(encoder.process_question(images, text)) for images, text in questions]
