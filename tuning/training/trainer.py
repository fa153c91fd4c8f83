"""A thin `transformers.Trainer`: counts supervised tokens, deals out rows, and stops on bad rows and bad numbers."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.batch_sampler import RowBatches, RowOrder, SharedBatches, make_row_batches, make_token_batches
from tuning.data.collator import BatchInfo, Collator, take_info
from tuning.data.encode import Sample
from tuning.data.row_lengths import RowLengths
from tuning.distributed.failures import name_killed_worker, out_of_memory
from tuning.distributed.fsdp import (
    cast_trainable_to_fp32,
    is_fsdp_asked_for,
    materialize_meta_params,
    set_fsdp_param_dtype,
)
from tuning.distributed.interruption import Interruption, Workers
from tuning.distributed.processes import Processes
from tuning.errors import RunEnded, UserError, is_out_of_memory
from tuning.exit_codes import EXIT_STOPPED
from tuning.model.attention import Attention, set_decoder_attention
from tuning.model.build import compile_layers
from tuning.model.padding_free import why_padding_is_needed, why_padding_is_needed_by_structure
from tuning.model.parts import PROJECTOR, VISION_TOWER, Parts
from tuning.training.callbacks import EarlyStopping, JsonLinesLog, LoopCallback, Meter, RunReport
from tuning.training.checkpointing import ResumableTrainer
from tuning.training.data_loading import make_trial_batches
from tuning.training.evaluation import GenerationEvaluator
from tuning.training.optimizer import HALF, explain_updates, parameter_groups, patch_master_weights
from tuning.training.resume import PADDED
from tuning.training.row_log import SkippedRows
from tuning.training.self_check import SelfCheck


class SupervisedTrainer(ResumableTrainer):
    """Trains a model whose forward was given by `patch_supervised_loss` on batches of `Collator`."""

    def __init__(
        self,
        *args,
        parts: Parts,
        fingerprint: dict[str, Any],
        learning_rates: dict[str, float | None],
        interruption: Interruption,
        collator: Collator,
        attention: Attention,
        padding_free: bool | str,
        dummy_samples: Callable[[], Sequence[Sample]],
        wrap_classes: list[str] | None = None,
        image_limit: int | None = None,
        max_bad_fraction: float = 0.0,
        group_by_length: bool | None = None,
        padded_before: bool | None = None,
        max_tokens_per_batch: int | None = None,
        keep_master_weights: bool = True,
        examiner: GenerationEvaluator | None = None,
        early_stopping_patience: int | None = None,
        **kwargs,
    ):
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # transformers' name for it
        super().__init__(*args, **kwargs)
        self.parts, self.fingerprint, self.learning_rates = parts, fingerprint, learning_rates
        self.collator, self.attention, self.padding_free, self.dummy_samples = (
            collator,
            attention,
            padding_free,
            dummy_samples,
        )
        self.group_by_length, self.max_tokens_per_batch = group_by_length, max_tokens_per_batch
        self.padded_before, self.examiner = padded_before, examiner
        self.model_accepts_loss_kwargs = True  # our forward divides by num_items_in_batch
        self.processes, self.interruption = Processes(self.accelerator), interruption
        self.workers = Workers(self.args.dataloader_multiprocessing_context)
        self.meter = Meter()
        self.rows = SkippedRows(
            self.processes, self.args.output_dir, image_limit=image_limit, max_bad_fraction=max_bad_fraction
        )
        self.batches_of_step, self.step_has_images, self.step_is_supervised = list[BatchInfo](), False, False
        self._losses_of_step = list[torch.Tensor]()
        self.stop_reason = ""
        self.wrap_classes = wrap_classes or []
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # `compile_layers` does it, layer by layer
        self.add_callback(LoopCallback(self))
        self.add_callback(SelfCheck(self))
        self.add_callback(JsonLinesLog(self.args.output_dir))
        self.report = RunReport(self.args.output_dir, writes=self.args.process_index == 0)
        self.add_callback(self.report)
        if early_stopping_patience:
            self.add_callback(EarlyStopping(early_stopping_patience))
        self.dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        optim = str(self.args.optim).lower()
        self.steps_in_backward = "lomo" in optim or "layerwise" in optim  # weights, as their gradients arrive
        self.keep_master_weights = keep_master_weights and not self.steps_in_backward and not self.is_deepspeed_enabled
        if not self.is_deepspeed_enabled:  # which has master weights of its own
            self._settle_precision()

    def _settle_precision(self) -> None:
        """How trained 16-bit weights take up small updates: said, and under FSDP seen to."""
        mixed = self.is_fsdp_enabled and self.accelerator.mixed_precision != "no"  # its trained weights are float32
        how = explain_updates(self.model, kept=self.keep_master_weights or mixed, sharded=self.is_fsdp_enabled)
        if how and "stochastic_round" not in (self.args.optim_args or ""):
            print0(how)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = self.wrap_classes or None
            if mixed or (self.keep_master_weights and set_fsdp_param_dtype(self.model, plugin)):
                cast_trainable_to_fp32(self.model)
            if mixed:  # the loss is no activation: it would be rounded to 16 bits, or overflow
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
            materialize_meta_params(self.model)

    def decide_padding(self) -> None:
        """Before the first batch: are batches padding-free? All processes decide the same."""

        def forward(**batch: Any) -> Any:
            with self.accelerator.autocast():
                return self.model_wrapped(**self._prepare_inputs(batch))

        obstacle, model = "padding_free is false", self.accelerator.unwrap_model(self.model)
        if self.padding_free is not False:
            half = self.accelerator.mixed_precision != "no" or not HALF.isdisjoint(self.dtypes.values())
            obstacle = why_padding_is_needed(
                model,
                forward,
                lambda: make_trial_batches(self.dummy_samples(), self.collator),
                self.attention,
                nested_images=self.collator.nested_images,
                half=half,
            )
        if self.processes.share([obstacle != ""]).any():
            obstacle = obstacle or "it fails without padding on another process"
        if obstacle and self.padding_free is True:
            raise UserError(
                where="padding_free", problem=f"cannot be true for this model: {obstacle}.", fix="Leave it out."
            )
        self.collator.padding_free = not obstacle
        self.fingerprint[PADDED] = self.length_grouped_order
        if not obstacle:
            set_decoder_attention(model, self.attention.packed)
        self.report.progress["batches"] = f"padded to their longest row: {obstacle}" if obstacle else "padding-free"
        print0(f"Batches are {self.report.progress['batches']}.")
        if self.args.torch_compile:
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            layers = compile_layers(model, self.wrap_classes, backend=backend, mode=mode)
            what = f"{layers} layers are compiled ({backend}): the first steps take longer."
            print0(what if layers else "Nothing is compiled: no class of layers was found in this model.")

    @property
    def length_grouped_order(self) -> bool:
        """Whether rows are ordered as for padded batches: as before the checkpoint, whatever they are from now on."""
        return not self.collator.padding_free if self.padded_before is None else self.padded_before

    def get_train_dataloader(self) -> DataLoader:
        """Rows in an order that the number of processes does not change, and this process's share of each batch."""
        args, rows = self.args, self.train_dataset
        if isinstance(rows, IterableDataset):  # rows that are streamed arrive as this process's share
            return self._make_loader(rows, self.data_collator, batch_size=args.train_batch_size)
        if self.max_tokens_per_batch:
            obstacle = why_padding_is_needed_by_structure(
                self.attention, self.model.config, nested_images=self.collator.nested_images
            )
            padded = self.padding_free is False or obstacle != ""
            padded = padded if self.padded_before is None else self.padded_before
            workers = {"workers": args.dataloader_num_workers, "start_worker": self.workers.start}
            lengths = RowLengths(rows.source, rows.encoder, exact=True, **workers)
            if args.max_steps < 1:  # the steps of an epoch must be known
                show = not args.disable_tqdm
                lengths.measure_all(self._add_up, rank=args.process_index, world=args.world_size, show=show)
            self.train_batches = make_token_batches(args, len(rows), lengths, self.max_tokens_per_batch, padded=padded)
        else:
            lengths = RowLengths(rows.source, rows.encoder)
            self.train_batches = make_row_batches(args, len(rows), lengths, self.group_by_length)
        return self._make_loader(rows, self.data_collator, batch_sampler=self.train_batches)

    train_batches: SharedBatches | None = None

    def _add_up(self, numbers: np.ndarray) -> np.ndarray:
        return self.accelerator.reduce(torch.from_numpy(numbers).to(self.args.device), "sum").cpu().numpy()

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        if self._eval_loader is None:
            rows = self.eval_dataset
            order, rank, world = RowOrder(len(rows)), self.args.process_index, self.args.world_size
            batches = RowBatches(order, self.args.eval_batch_size, rank=rank, world=world)
            self._eval_loader = self._make_loader(rows, self.collator, batch_sampler=batches)
        return self._eval_loader

    _eval_loader: DataLoader | None = None

    def _make_loader(self, rows: Any, collator: Callable, **batches: Any) -> DataLoader:
        """A loader of this process's batches. accelerate would deal out rows in another way; see `SharedBatches`.

        It has a generator of its own: its workers' seed is not drawn from the one that dropout draws from, once when
        workers persist and again in the epoch after a resume, so that dropout would differ.
        """
        args = self.args
        return DataLoader(
            rows,
            **batches,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=self.workers.start,
            generator=torch.Generator().manual_seed(args.seed),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Fetch an optimizer step's batches, and take off them what is not for the model.

        Returns them and the supervised tokens of all processes' batches. Where one process has met an error, all end.
        """
        self.meter.begin_step()
        batches, facts, error = [], [], None
        try:
            with name_killed_worker():
                batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
            facts = [self._take_facts(batch) for batch in batches]
        except UserError as found:
            error = found
        tokens, supervised = sum(fact.tokens for fact in facts), sum(fact.supervised_tokens for fact in facts)
        images = sum(fact.rows_with_images for fact in facts)
        numbers = supervised, self.rows.unsynced, self.rows.rows_seen, images
        counts = self.processes.raise_on_all_ranks(error, *numbers).sum(dim=0)
        self.rows.tell(int(counts[1]), self.train_dataset, int(counts[2]))
        self.meter.data_arrived(tokens, supervised)
        self.batches_of_step = facts
        self.step_is_supervised, self.step_has_images = bool(counts[0]), bool(counts[3])
        return batches, counts[0]

    def _take_facts(self, batch: dict[str, Any], evaluating: bool = False) -> BatchInfo:
        facts = take_info(batch)
        if facts.error is not None:
            raise facts.error
        self.rows.take(facts, evaluating=evaluating)
        return facts

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward. The loss is looked at once a step: `end_of_backward`."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses_of_step.append(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def end_of_backward(self) -> None:
        """Before the optimizer's step, on all processes together: is every number one, and is it time to stop?

        Trained parameters that no batch of this step has reached (the vision tower's, where all rows are text) get a
        gradient of zero, as they do where other processes have images: the optimizer would skip them on one process.
        """
        broken = ~torch.isfinite(torch.stack(self._losses_of_step))
        reason = self.interruption.check()
        verdict = self.processes.share([int(broken.any()), reason != ""])
        if verdict[:, 0].any():
            self._stop_at_bad_loss(broken.tolist())
        if verdict[:, 1].any():
            self.stop_reason = reason or "a signal to another process"
        checked = not self.args.fp16 and not self.is_deepspeed_enabled  # which skip such a step, or have taken it
        if checked and not math.isfinite(self._grad_norm):
            raise self._bad_number(f"the gradients became {float(self._grad_norm)}", self.batches_of_step)
        self._losses_of_step.clear()
        for parameter in () if self.is_deepspeed_enabled else self.model.parameters():  # DeepSpeed keeps its own
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _stop_at_bad_loss(self, broken: list[bool]) -> None:
        error = None
        if any(broken):
            number = broken.index(True)
            loss = self._losses_of_step[number].item()
            error = self._bad_number(f"the loss became {loss}", self.batches_of_step[number : number + 1])
        self.processes.raise_on_all_ranks(error)

    def _bad_number(self, what: str, batches: list[BatchInfo]) -> UserError:
        return UserError(
            where="; ".join(row for batch in batches for row in batch.rows),
            problem=f"{what} at step {self.state.global_step + 1}, before the optimizer's step.",
            fix="Look at these rows; lower learning_rate or max_grad_norm; use bf16 instead of fp16.",
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Hugging Face's optimizer, with the learning rates of vision tower and projector set apart."""
        optimizer = super().create_optimizer(model)
        if any(rate is not None for rate in self.learning_rates.values()):
            groups = parameter_groups(model or self.model, self.parts, optimizer.param_groups, self.learning_rates)
            optimizer.param_groups[:] = groups
        if self.keep_master_weights and not self.is_fsdp_enabled:  # it shards them in float32
            patch_master_weights(optimizer)
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
        total, tokens, rows, broken = torch.zeros(2, dtype=torch.float64), 0, 0, None
        for batch in dataloader:
            facts, error = BatchInfo(), None
            try:
                facts = self._take_facts(batch, evaluating=True)
            except UserError as found:
                error = found
            left_out = self.processes.raise_on_all_ranks(error, self.rows.unsynced).sum()
            self.rows.tell(int(left_out), dataloader.dataset, rows, evaluating=True)
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.accelerator.autocast():
                loss = model(**inputs, num_items_in_batch=1).loss
            if not torch.isfinite(loss):
                broken = broken or UserError(
                    where="; ".join(facts.rows), problem=f"the validation loss became {loss.item()}."
                )
            total += torch.tensor([loss.item(), facts.supervised_tokens], dtype=torch.float64)
            rows += len(facts.rows)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.processes.raise_on_all_ranks(broken)
        scores = self._examine(metric_key_prefix)
        summed = self.accelerator.reduce(total.to(self.args.device, torch.float32), "sum").cpu()
        tokens = int(summed[1].item())
        if not tokens:
            raise UserError(where="validation_data_path", problem="no token of the validation rows is supervised.")
        metrics = {f"{metric_key_prefix}_loss": summed[0].item() / tokens, f"{metric_key_prefix}_tokens": tokens}
        metrics |= scores
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _examine(self, prefix: str) -> dict[str, float]:
        """The scores of the validation rows that the model answers now."""
        if self.examiner is None or not self.examiner.rows:
            return {}
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step
        with self.accelerator.autocast():
            scores = self.examiner.examine(model, self.processes, step, together=self._holds_shards)
        return {f"{prefix}_{name}": score for name, score in scores.items()}

    def answer_samples(self) -> None:
        """Let the model answer the rows that the report shows."""
        if self.examiner is not None and not self.stop_reason:
            model, step = self.accelerator.unwrap_model(self.model), self.state.global_step
            with self.accelerator.autocast():
                self.examiner.answer_samples(model, self.processes, step, together=self._holds_shards)

    @property
    def _holds_shards(self) -> bool:
        return self.processes.number > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @contextmanager
    def raise_friendly_oom(self) -> Iterator[None]:
        """Turn running out of memory into a message; the optimizer's first step takes some, too."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            lora = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
            step = self.state.global_step + 1
            raise out_of_memory(self.args, self.batches_of_step, step, lora, self.max_tokens_per_batch) from error

    def end_if_stopped(self) -> None:
        """Raises `RunEnded` where training was interrupted, with what to do next."""
        if self.stop_reason and self.state.global_step < self.state.max_steps:
            named = isinstance(self.args.resume_from_checkpoint, str)
            raise RunEnded(
                f"Stopped by {self.stop_reason} after step {self.state.global_step} of {self.state.max_steps}:"
                f" {self.args.output_dir}/checkpoint-{self.state.global_step} is complete. Run the same command again"
                f"{', without resume_from_checkpoint,' if named else ''} to continue.",
                EXIT_STOPPED,
            )


def options_of_trainer(config: RunConfig) -> dict[str, Any]:
    """What the trainer is told of the config.

    Its arguments are without what is done here instead: the Hub, whose token would be in every checkpoint, and the
    trackers.
    """
    training, data, run = config.training, config.data, config.run
    args = copy.copy(training)
    args.push_to_hub, args.hub_token, args.report_to = False, None, []
    if is_fsdp_asked_for() or args.fsdp:  # else every process adds up the gradient of the whole model
        args.accelerator_config = copy.copy(args.accelerator_config)
        wanted = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True} | wanted
    return {
        "args": args,
        "learning_rates": {
            VISION_TOWER: run.vision_tower_learning_rate,
            PROJECTOR: run.projector_learning_rate,
        },
        "padding_free": data.padding_free,
        "interruption": Interruption(run.save_before_walltime),
        "max_bad_fraction": data.max_bad_fraction,
        "group_by_length": config.group_by_length,
        "max_tokens_per_batch": data.max_tokens_per_batch,
        "keep_master_weights": config.model.keep_master_weights,
        "early_stopping_patience": config.answers.early_stopping_patience,
    }
