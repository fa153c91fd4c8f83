"""The final model of a run: where it comes from, saving it, reading it back, and marking the run as finished."""

from functools import partial
from pathlib import Path

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.dummy_samples import dummy_samples
from tuning.distributed.zero3 import is_zero3_model
from tuning.files import COMPLETE_FILE, write_json
from tuning.pages.model_card import put_card, write_card
from tuning.pages.run_summary import RunSummary
from tuning.training.checkpoint_files import step_of
from tuning.training.resume import Progress
from tuning.training.run_summary import add_result
from tuning.training.trainer import SupervisedTrainer
from tuning.training.verify_save import TrainedModel, verify_saved_model


def save_final_model(trainer: SupervisedTrainer, config: RunConfig, progress: Progress, summary: RunSummary) -> None:
    """Save the model of the best checkpoint, of the last one, or the one in memory; then mark the run as finished.

    A run that only had to save its model takes it from the checkpoint. Raises `RunEnded` on all processes where the
    saved model is not the trained one: the run is not finished then.
    """
    target, output_dir = Path(config.save_model_dir), Path(config.training.output_dir)
    warn_of_unsaved_best(trainer)
    source = trainer.best_checkpoint or (progress.resume_from if progress.trained_to_end else None)
    left_out, best = len(trainer.rows.skipped), trainer.best_checkpoint
    card = write_card(add_result(summary, trainer.state, rows_left_out=left_out, best_checkpoint=best))
    trained = trained_model(trainer)
    files = trainer.save_final(target, source, lambda folder: put_card(card, folder, target))
    if config.run.verify_save is not False:
        verify_saved_model(trained, target, source, config.model, force=bool(config.run.verify_save))
    if trainer.args.should_save:
        if not trained.is_adapter and (notes := trainer.writer.describe()):
            print0(notes)
        end = {"global_step": trainer.state.global_step, "files": files}
        write_json(output_dir / COMPLETE_FILE, {**trainer.fingerprint, **end})
    trainer.accelerator.wait_for_everyone()
    if trainer.hub and trainer.args.should_save:
        trainer.hub.upload_final(target, files, output_dir)


def warn_of_unsaved_best(trainer: SupervisedTrainer) -> None:
    """Print a warning where the model of the best evaluation was to be the final one, but was not saved."""
    best, saved = trainer.state.best_global_step, trainer.best_checkpoint
    if trainer.args.load_best_model_at_end and best and (saved is None or step_of(saved) != best):
        print0(f"Warning: the model of the best step, {best}, was not saved. Set save_steps to eval_steps to keep it.")


def trained_model(trainer: SupervisedTrainer) -> TrainedModel:
    """What `verify_saved_model` compares the saved model with."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return TrainedModel(
        model=model,
        dtypes=trainer.dtypes,
        attention=trainer.trainable.attention.loaded,
        collator=trainer.data.collator,
        dummy_samples=partial(dummy_samples, trainer.data.encoder),
        processes=trainer.processes,
        is_main_process=trainer.args.should_save,
        is_fsdp=trainer.is_fsdp_enabled,
        is_zero3=is_zero3_model(model),
        writer=trainer.writer,
    )
