"""A thin `transformers.Trainer`: it counts supervised tokens, shares out rows, and hands its steps to callbacks."""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from tuning.checking.estimates import rows_of_a_step
from tuning.config.options import BATCH_SIZE, RunConfig
from tuning.console import print0
from tuning.data.collator import BatchInfo, take_info
from tuning.data.from_config import TrainingData
from tuning.distributed.failures import name_killed_worker
from tuning.distributed.fsdp import (
    cast_trainable_to_fp32,
    is_fsdp_asked_for,
    materialize_meta_params,
    set_fsdp_param_dtype,
    shard_large_checkpoints,
)
from tuning.distributed.interruption import Interruption
from tuning.distributed.processes import Processes
from tuning.errors import UserError
from tuning.hub import RunRepo
from tuning.model.build import TrainableModel, compile_layers
from tuning.model.known_inputs import send
from tuning.model.recompute import Recomputed, recompute_only
from tuning.training.callbacks import EarlyStopping, JsonLinesLog, RunReport, StepMeter
from tuning.training.checkpointing import ResumableTrainer
from tuning.training.data_loading import DataLoading
from tuning.training.evaluation import SampleLog, make_evaluator, read_first_rows
from tuning.training.model_writer import ModelWriter
from tuning.training.optimizer import (
    explain_updates,
    part_learning_rates,
    patch_master_weights,
    set_learning_rates,
    steps_in_backward,
)
from tuning.training.resume import COST, PADDED, ROWS_OF_A_STEP, Progress
from tuning.training.row_log import SkippedRows
from tuning.training.self_check import SelfCheck
from tuning.training.step_guard import StepGuard, StepState
from tuning.training.utilisation import count_operations, find_peak

SUPERVISED = "supervised_tokens"  # the name of a number that a checkpoint keeps


class SupervisedTrainer(ResumableTrainer):
    """Trains a model whose forward was replaced by `patch_supervised_loss` on the batches of `DataLoading`.

    No collaborator holds the trainer. In a reference cycle, data loaders would be collected after their queues, and
    wait for their worker processes.
    """

    def __init__(
        self,
        config: RunConfig,
        model: TrainableModel,
        data: TrainingData,
        progress: Progress,
        callbacks: Sequence[TrainerCallback] = (),
        hub: RunRepo | None = None,
    ):
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # the name transformers uses
        super().__init__(
            model=model.model,
            args=make_arguments(config, idle_is_known=model.idle_is_known),
            data_collator=data.collator,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.encoder.processor,
            callbacks=list(callbacks),
        )
        self.hub = hub
        self.model_accepts_loss_kwargs = True  # our forward divides by num_items_in_batch
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # `compile_layers` compiles layer by layer
        self.config, self.trainable, self.data, self.progress = config, model, data, progress
        self.dtypes, self.reads_back = model.dtypes, config.run.verify_save is not False
        self.writer = ModelWriter(config.model, model.model.config, data.encoder.processor, model.stored_names)
        if self.args.should_save:
            self.writer.find_base()
        self.learning_rates = part_learning_rates(config.run)
        self.processes, self.interruption = Processes(self.accelerator), Interruption(config.run.save_before_walltime)
        self.step, self.meter = StepState(progress.global_step + 1), StepMeter(find_peak(self.args.device))
        self.loading = DataLoading(config, data, model, progress, self.processes)
        self.guard = StepGuard(config, self.step, self.processes, self.interruption)
        self.rows = SkippedRows(
            self.processes,
            self.args.output_dir,
            image_limit=data.encoder.max_images,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        is_sharded = self.processes.number > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self.evaluator = make_evaluator(config, data, self.processes, synced_gpus=is_sharded)
        first_rows = read_first_rows(data, config.answers.report_samples)
        self.samples = SampleLog(self.evaluator, first_rows, Path(self.args.output_dir), self.step)
        self.report = RunReport(self.args.output_dir, self.loading, is_main_process=self.args.process_index == 0)
        for callback in (
            *(self.loading, self.guard, self.meter, self.samples),
            SelfCheck(self.step, model.parts, self.learning_rates, self.processes),
            *(JsonLinesLog(self.args.output_dir), self.report),
        ):
            self.add_callback(callback)
        if config.answers.early_stopping_patience:
            self.add_callback(EarlyStopping(config.answers.early_stopping_patience))
        self._keeps_master_weights = (
            config.model.keep_master_weights
            and not steps_in_backward(self.args.optim)
            and not self.is_deepspeed_enabled  # it has master weights of its own
        )
        if not self.is_deepspeed_enabled:
            self._set_precision()

    @property
    def fingerprint(self) -> dict[str, Any]:  # type: ignore[override]
        """What a later run must have in common with this one to resume it."""
        batching = self.loading.batching
        cost = self.loading.row_cost
        known: dict[str, Any] = {PADDED: batching.order_padded, COST: cost and list(astuple(cost))} if batching else {}
        if BATCH_SIZE in self.config.auto:
            known[ROWS_OF_A_STEP] = rows_of_a_step(self.config)
        return self.progress.fingerprint | known

    def _set_precision(self) -> None:
        """Print how 16-bit weights are updated, and set the precision that FSDP shards and computes in."""
        mixed = self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"  # trained weights are float32 then
        kept = self._keeps_master_weights or mixed
        explanation = explain_updates(self.model, kept=kept, sharded=self.is_fsdp_enabled)
        if explanation and "stochastic_round" not in (self.args.optim_args or ""):
            print0(explanation)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = self.trainable.wrap_classes or None
            shard_large_checkpoints(self.model, plugin)
            if mixed or (self._keeps_master_weights and set_fsdp_param_dtype(self.model, plugin)):
                cast_trainable_to_fp32(self.model)
            if mixed:  # FSDP would round the loss to 16 bits, and the sums of gradients
                exact = {"output_dtype": None, "reduce_dtype": torch.float32}
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
            materialize_meta_params(self.model)

    def _prepare_for_training(self, *args, **kwargs):
        """Once the model is wrapped, and before the first batch, decide whether batches are padded, and compile."""
        prepared = super()._prepare_for_training(*args, **kwargs)

        def forward(**batch: Any) -> Any:
            with self.accelerator.autocast():
                return self.model_wrapped(**self._prepare_inputs(batch))

        model = self.accelerator.unwrap_model(self.model)
        if self.config.recomputed_layers:
            recompute_only(model, Recomputed(self.trainable.parts, self.config.recomputed_layers))
        self.loading.check_logits(model, forward)
        self.loading.choose_tower_attention(model, forward)
        if self.loading.decide_batching(model, forward).fault:  # then answers are written one by one, too
            self.evaluator = self.samples.evaluator = replace(self.evaluator, batch_size=1)
        if self.args.torch_compile:
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            layers = compile_layers(model, self.trainable.wrap_classes, backend=backend, mode=mode)
            done = f"{layers} layers are compiled ({backend}): the first steps take longer."
            print0(done if layers else "Nothing is compiled: no class of layers was found in this model.")
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        return self.loading.train_loader()

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self.loading.validation_loader()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Hugging Face's optimizer, with learning rates of their own for parts, and with master weights."""
        optimizer = super().create_optimizer(model)
        set_learning_rates(optimizer, model or self.model, self.trainable.parts, self.learning_rates)
        if self._keeps_master_weights and not self.is_fsdp_enabled:  # FSDP shards them in float32
            patch_master_weights(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Read the batches of an optimizer step, and take off them what is not for the model.

        Returns them and the number of supervised tokens on all processes. If one process meets an error, all end.
        """
        self.meter.begin_step()
        batches, infos, error = [], list[BatchInfo](), None
        try:
            with name_killed_worker():
                batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            infos = [self._take_info(batch) for batch in batches]
        except UserError as found:
            error = found
        supervised = sum(info.supervised_tokens for info in infos)
        images = sum(info.rows_with_images for info in infos)
        operations = count_operations(self.trainable.flops, infos)
        mine = supervised, self.rows.unsynced, self.rows.rows_seen, images, operations
        shared = self.processes.raise_on_all_ranks(error, *mine)
        by_process = shared.tolist()
        all_supervised, left_out, seen, all_images, _ = map(sum, zip(*by_process, strict=True))
        self.rows.sync(left_out, self.train_dataset, seen)
        tokens = sum(info.tokens for info in infos)
        self.meter.data_arrived(tokens, supervised, [numbers[-1] for numbers in by_process])
        self.supervised_tokens = (self.supervised_tokens or 0) + all_supervised
        number = self.state.global_step + 1
        self.step.begin(number, infos, is_supervised=all_supervised > 0, has_images=all_images > 0)
        return batches, all_supervised

    @property
    def supervised_tokens(self) -> int | None:
        """The supervised tokens of the whole run, also before it was resumed: kept with the state of a checkpoint.

        None where an earlier version began the run.
        """
        return self.state.stateful_callbacks.get(SUPERVISED, {}).get("tokens")

    @supervised_tokens.setter
    def supervised_tokens(self, tokens: int) -> None:
        self.state.stateful_callbacks[SUPERVISED] = {"tokens": tokens}

    def report_rows(self) -> None:
        """Print which rows were left out. Raises `UserError` where nothing was trained: the model is still the base."""
        if self.state.global_step == 0:
            raise UserError(
                where="training_data_path",
                problem="no batch could be filled, so no step was taken and nothing is saved.",
                fix="Set dataloader_drop_last false, or add rows.",
            )
        self.rows.report(self.supervised_tokens)

    def _take_info(self, batch: dict[str, Any], evaluating: bool = False) -> BatchInfo:
        info = take_info(batch)
        if info.error is not None:
            raise info.error
        self.rows.take(info, evaluating=evaluating)
        return info

    def _prepare_input(self, data: Any) -> Any:
        """A tensor on the device. The host keeps small ones, so that the model's code need not wait to read them."""
        if not isinstance(data, torch.Tensor) or self.args.device.type != "cuda" or self.is_deepspeed_enabled:
            return super()._prepare_input(data)
        return send(data, self.args.device, known=not self.args.torch_compile)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward. `StepGuard` looks at the losses of a step once, before the optimizer's step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step.losses.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self.step.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.step.grad_norm

    def _save_checkpoint(self, model, trial=None) -> None:
        super()._save_checkpoint(model, trial)
        self.interruption.longest_save = self.seconds_to_save

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the throughput of all processes to the lines of training steps."""
        if "loss" in logs:
            figures = self.meter.report()
            if self.args.world_size > 1:
                speed, tokens = self.processes.sum_floats(figures["tokens_per_second"], figures["supervised_tokens"])
                figures["tokens_per_second"], figures["supervised_tokens"] = speed, int(tokens)
            logs |= figures
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss over all supervised tokens. The stock loop averages batch means, which favors short rows."""
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        loss_sum, supervised, rows, bad_loss = 0.0, 0, 0, None
        for batch in dataloader:
            info, error = BatchInfo(), None
            try:
                info = self._take_info(batch, evaluating=True)
            except UserError as found:
                error = found
            left_out = self.processes.raise_on_all_ranks(error, self.rows.unsynced).sum()
            self.rows.sync(int(left_out), dataloader.dataset, rows, evaluating=True)
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                loss = model(**inputs, num_items_in_batch=1).loss.item()
            if not math.isfinite(loss):
                problem = f"the validation loss became {loss}."
                bad_loss = bad_loss or UserError(where="; ".join(info.rows), problem=problem)
            loss_sum, supervised, rows = loss_sum + loss, supervised + info.supervised_tokens, rows + len(info.rows)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.processes.raise_on_all_ranks(bad_loss)
        scores = self._score_answers()
        loss_sum, tokens = self.processes.sum_floats(loss_sum, supervised)
        if not tokens:
            raise UserError(where="validation rows", problem="no token of them is supervised.")
        metrics = {"loss": loss_sum / tokens, "tokens": int(tokens)} | scores
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _score_answers(self) -> dict[str, float]:
        if not self.evaluator.rows:
            return {}
        lines = self.evaluator.answer_rows(self.evaluator.rows, self.model)
        self.samples.add(lines, self.state.global_step)
        return self.evaluator.score(lines)


def make_arguments(config: RunConfig, *, idle_is_known: bool) -> TrainingArguments:
    """The arguments of Hugging Face's trainer.

    They lack what this package does itself: uploads (the token would be in every checkpoint) and trackers.
    `idle_is_known`: every parameter without a gradient is frozen, so that DDP need not look for them.
    """
    args = copy.copy(config.training)
    args.push_to_hub, args.hub_token, args.report_to = False, None, []
    if is_fsdp_asked_for() or args.fsdp:  # otherwise every process adds up the gradient of the whole model
        args.accelerator_config = copy.copy(args.accelerator_config)
        given = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True} | given
    if not idle_is_known and args.ddp_find_unused_parameters is False:
        print0("ddp_find_unused_parameters is true: we could not tell which parameters of this model get no gradient.")
        args.ddp_find_unused_parameters = True
    return args
