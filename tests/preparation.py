"""The steps of a run, up to its training."""

from tuning import model_plan, sft_trainer
from tuning.model import load
from tuning.training.checkpoint import Progress


def make_model(config):
    """The model of a run, as it is before training."""
    model_config = load.load_config(config.model)
    encoder = sft_trainer.make_encoder(config, load.load_processor(config.model, model_config), model_config, "today")
    plan = model_plan.plan_model(config, model_config, encoder)
    return model_plan.make_model(config, model_config, plan, Progress())
