"""The steps of a run, up to its training."""

import os
from importlib.util import find_spec

from tuning import data_paths, model_plan
from tuning.model import load
from tuning.training.checkpoint import Progress

HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None or "CI" in os.environ  # there it must not be missing


def make_model(config):
    """The model of a run, as it is before training."""
    model_config = load.load_config(config.model)
    encoder = data_paths.make_encoder(
        config.data, load.load_processor(config.model, model_config), model_config, "today"
    )
    plan = model_plan.plan_model(config, model_config, encoder)
    return model_plan.make_model(config, model_config, plan, Progress())
