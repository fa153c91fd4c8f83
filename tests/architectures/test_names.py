"""Every image-text-to-text architecture of the installed transformers is tested here, or listed with the reason."""

from architectures.checkpoints import ARCHS
from architectures.names import QUICK, TITLES
from architectures.registry import NOT_CHAT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def test_somebody_has_looked_at_every_architecture():
    """A new transformers may bring new ones: add a builder to `families/`, or the reason to `registry.NOT_CHAT`."""
    built = {name.partition("+")[0] for name in ARCHS}
    assert [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in built | NOT_CHAT.keys()] == []


def test_every_architecture_has_a_title():
    assert sorted(TITLES) == sorted(ARCHS)
    assert set(QUICK) <= ARCHS.keys()
