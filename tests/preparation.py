"""The steps of a run, up to its training."""

import os
from functools import partial
from importlib.util import find_spec

from tuning.data import from_config
from tuning.model import build, load

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None or "CI" in os.environ  # there it must not be missing


def make_model(config):
    """The model of a run, as it is before training."""
    model_config = load.load_config(config.model)
    encoder = from_config.make_encoder(
        config.data, load.load_processor(config.model, model_config), model_config, "today"
    )
    plan = build.plan_model(config, model_config, partial(from_config.dummy_batch, encoder))
    return build.build_model(config, model_config, plan).model
