"""A thin `transformers.Trainer`: counts supervised tokens, stops on bad rows and bad numbers, and resumes for real."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, has_length

from tuning.console import say
from tuning.data.batching import LengthGroupedRows
from tuning.data.collator import BatchFacts
from tuning.data.encode import Skipped
from tuning.errors import UserError
from tuning.model.parts import Parts, parameter_groups
from tuning.training.callbacks import JsonLinesLog, SkippedRowsFile
from tuning.training.checkpoint import IDENTITY_FILE, STATE_FILE, write_json
from tuning.training.meter import Meter

FEW_STREAMED_ROWS = 1000  # a share of fewer streamed rows says little


class SupervisedTrainer(Trainer):
    """Trains a model whose forward was given by `install_supervised_loss` on batches of `PaddingCollator`."""

    def __init__(
        self,
        *args,
        parts: Parts,
        identity: dict[str, Any],
        learning_rates: dict[str, float | None],
        image_limit: int | None = None,
        max_bad_fraction: float = 0.0,
        eval_collator: Callable | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self.parts, self.identity, self.learning_rates = parts, identity, learning_rates
        self.image_rule = (
            "only the first image is used" if image_limit == 1 else f"only the first {image_limit} images are used"
        )
        self.model_accepts_loss_kwargs = True  # our forward divides by num_items_in_batch
        self._loss_shifts_labels = True
        self.meter = Meter()
        self.dropped_images = 0
        self.skipped: dict[str, Skipped] = {}
        self.bad_rows, self.bad_validation_rows = list[Skipped](), list[Skipped]()
        self.saw_supervised_tokens = False
        self.skipped_file = SkippedRowsFile(self.args.output_dir)
        self.cut_rows: set[str] = set()
        self.max_bad_fraction, self.rows_seen = max_bad_fraction, 0
        self._rows_of_batches: list[list[str]] = []
        self._rows_of_step: list[str] = []
        self.add_callback(_EndOfStep(self.meter))
        self.add_callback(JsonLinesLog(self.args.output_dir))

    def get_train_dataloader(self) -> DataLoader:
        return self._with_own_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = self.eval_collator or collator  # streamed rows are encoded by theirs
        loader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = collator
        return self._with_own_generator(loader)

    def _with_own_generator(self, loader: DataLoader) -> DataLoader:
        """Keep a loader from drawing its workers' seed from the generator that dropout draws from.

        It would draw once when workers persist and again in the epoch after a resume: dropout would differ.
        """
        generator = torch.Generator().manual_seed(self.args.seed)
        for inner in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's loader holds the real one
            inner.generator = generator
        return loader

    def _get_train_sampler(self, train_dataset=None):
        """Group by lengths read from the text column; the stock sampler would encode every row to measure it."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedRows(rows.source.text_lengths(), group, seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Fetch an optimizer step's batches, and take off them what is not for the model."""
        self.meter.begin_step()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        facts = [self._take_facts(batch) for batch in batches]
        self.meter.data_arrived(sum(fact.tokens for fact in facts), sum(fact.supervised_tokens for fact in facts))
        self._rows_of_batches = [fact.rows for fact in facts]
        return batches, self._get_num_items_in_batch(batches, device)

    def _take_facts(self, batch: dict[str, Any], evaluated: Any = None) -> BatchFacts:
        facts = batch.pop("facts")
        if facts.error is not None:
            raise facts.error
        if facts.dropped_images and not self.dropped_images:
            say(f"A row has more images than this model takes: {self.image_rule}. The count follows at the end.")
        self.dropped_images += facts.dropped_images
        self.cut_rows.update(facts.cut)
        self.rows_seen += len(facts.rows)
        self.saw_supervised_tokens |= facts.supervised_tokens > 0 and evaluated is None
        new = {where: skipped for where, skipped in facts.skipped.items() if where not in self.skipped}
        if new:
            self.skipped_file.append(new.values())
            self.skipped.update(new)
            bad = self.bad_validation_rows if evaluated is not None else self.bad_rows
            bad += [skipped for skipped in new.values() if skipped.bad]
            self._stop_at_too_many_bad_rows(bad, self.train_dataset if evaluated is None else evaluated)
        return facts

    def _stop_at_too_many_bad_rows(self, bad: list[Skipped], dataset: Any) -> None:
        """Each process counts the bad rows that it has met against all rows."""
        known = has_length(dataset)
        rows = len(dataset) if known else max(self.rows_seen, FEW_STREAMED_ROWS)
        if len(bad) > self.max_bad_fraction * rows:
            raise UserError(
                f"{len(bad)} of {rows} rows{'' if known else ' so far'} are bad, more than max_bad_fraction"
                f" {self.max_bad_fraction:g}; the last one: {bad[-1].reason}",
                str(self.skipped_file.path),
                "Mend them (vlm-tuning check lists all), or raise max_bad_fraction.",
            )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward; a loss that is no number ends the run before it can reach the weights."""
        self._rows_of_step = self._rows_of_batches.pop(0) if self._rows_of_batches else []
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}, before the optimizer's step.",
                "; ".join(self._rows_of_step),
                "Look at these rows; lower learning_rate or max_grad_norm; use bf16 instead of fp16.",
            )
        return result

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Hugging Face's optimizer, with the learning rates of vision tower and projector set apart."""
        optimizer = super().create_optimizer(model)
        if any(rate is not None for rate in self.learning_rates.values()):
            groups = parameter_groups(model or self.model, self.parts, optimizer.param_groups, self.learning_rates)
            optimizer.param_groups[:] = groups
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._figures_of_all_processes()
        super().log(logs, start_time)

    def _figures_of_all_processes(self) -> dict[str, float]:
        figures = self.meter.report()
        if self.args.world_size > 1:
            summed = torch.tensor([figures["tokens_per_second"], figures["supervised_tokens"]], device=self.args.device)
            summed = self.accelerator.reduce(summed, "sum")
            figures["tokens_per_second"], figures["supervised_tokens"] = summed[0].item(), int(summed[1].item())
        return figures

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss over all supervised tokens. The stock loop averages batch means, which weighs short rows more."""
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        total, tokens, rows = torch.zeros(2, dtype=torch.float64), 0, 0
        for batch in dataloader:
            facts = self._take_facts(batch, evaluated=dataloader.dataset)
            self._rows_of_step = facts.rows
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**inputs, num_items_in_batch=1).loss
            total += torch.tensor([loss.item(), facts.supervised_tokens], dtype=torch.float64)
            rows += len(facts.rows)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        summed = self.accelerator.reduce(total.to(self.args.device, torch.float32), "sum").cpu()
        tokens = int(summed[1].item())
        if not tokens:
            raise UserError("no token of the validation rows is supervised.", "validation_data_path")
        metrics = {f"{metric_key_prefix}_loss": summed[0].item() / tokens, f"{metric_key_prefix}_tokens": tokens}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def report_rows(self) -> None:
        """Say what was left out of the data. Raises `UserError` if that was all of it."""
        if self.dropped_images:
            say(f"{self.image_rule}: {self.dropped_images} further images were left out.")
        if self.skipped:
            say(f"{len(self.skipped)} rows were left out; {self.skipped_file.path} names them.")
        if self.cut_rows:
            say(f"The answers of {len(self.cut_rows)} rows were cut to max_seq_length.")
        if self.rows_seen and not self.saw_supervised_tokens and self.args.world_size == 1:
            raise UserError(
                "every row was left out, so nothing was trained and nothing is saved.",
                str(self.skipped_file.path),
                "It names the rows and the reasons.",
            )

    def restore(self, checkpoint: Path) -> None:
        """Take state and final weights, the best ones where those were asked for, without training."""
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Add to Hugging Face's files what a checkpoint needs to be complete."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)
            write_json(folder / IDENTITY_FILE, self.identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load a full model's weights through `from_pretrained`.

        Checkpoints are saved under the published names of the weights, which `load_state_dict` of the running model
        does not know: the stock method warns about missing keys and goes on with the base model's weights.
        """
        target = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or isinstance(target, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = AutoModelForImageTextToText.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict(), strict=True)
        return None

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _EndOfStep(TrainerCallback):
    def __init__(self, meter: Meter):
        self.meter = meter

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.end_step()
