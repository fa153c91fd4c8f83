"""The batches of a run: which rows they have, whether they are padded, and the loaders that read them."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.data.balance import Balance, RowCost
from tuning.data.batch_sampler import (
    RowBatches,
    RowOrder,
    SharedBatches,
    TokenBatches,
    begin_epoch,
    make_row_batches,
    make_token_batches,
)
from tuning.data.collator import Collator
from tuning.data.dataset import EncodedRows, EncodingCollator, StreamedRows
from tuning.data.dummy_samples import dummy_image_sample, measure_picture, trial_samples
from tuning.data.encode import Encoder, Sample
from tuning.data.from_config import TrainingData, dummy_batch
from tuning.data.row_lengths import RowLengths
from tuning.distributed.interruption import Workers
from tuning.distributed.processes import Processes
from tuning.errors import UserError, describe_failure, try_optional
from tuning.model.build import TrainableModel
from tuning.model.loss import check_logits
from tuning.model.padding_free import Packing, TrialBatches, find_packing
from tuning.model.picture_dtype import picture_dtype, reader_of
from tuning.model.row_positions import RowPositions, find_row_positions
from tuning.model.tower_attention import (
    TOWER,
    find_tower_configs,
    find_tower_difference,
    set_attention,
)
from tuning.training.batch_check import find_batch_fault, options_of_several_rows, rows_differ
from tuning.training.optimizer import HALF
from tuning.training.resume import Progress
from tuning.training.row_cost import find_row_cost


@dataclass(frozen=True)
class Batching:
    """How the rows of a batch are joined.

    `padded`: rows are padded to the longest one of their batch; otherwise they are joined end to end. `order_padded`:
    rows are ordered as for padded batches. A resumed run keeps the order that it began with. `packing`: how the model
    takes rows end to end, or why it does not. `fault`: why they have one row each, as a row would get other results in
    a batch.
    """

    padded: bool
    order_padded: bool
    packing: Packing
    fault: str = ""

    def __str__(self) -> str:
        if self.padded:
            return f"padded to their longest row: {self.packing.reason}"
        count = len(self.packing.by_row)
        by_row = "1 layer runs" if count == 1 else f"{count} layers run"
        return f"padding-free, and {by_row} row by row" if count else "padding-free"


class DataLoading(TrainerCallback):
    """Makes the loaders of a run, and decides its `batching`, which is None until then."""

    def __init__(
        self, config: RunConfig, data: TrainingData, model: TrainableModel, progress: Progress, processes: Processes
    ):
        self.config, self.data, self.model, self.processes = config, data, model, processes
        self.padded_before = progress.padded
        self.row_cost = self._find_row_cost(progress)
        self.workers = Workers(config.training.dataloader_multiprocessing_context)
        self.batching: Batching | None = None
        self.positions: RowPositions | None = None
        self.picture_dtype = picture_dtype(reader_of(model.model))  # before FSDP makes float32 copies
        self._train_batches: SharedBatches | None = None
        self._train_loader: DataLoader | None = None
        self._validation_loader: DataLoader | None = None

    def train_loader(self) -> DataLoader:
        """This process's share of every batch, in an order that does not depend on the number of processes."""
        training, rows = self.config.training, self.data.train
        if isinstance(rows, StreamedRows):  # they are this process's share already
            self._train_loader = self._make_loader(rows, batch_size=training.train_batch_size)
        else:
            self._train_batches = self._make_batches(rows)
            endless = isinstance(self._train_batches, TokenBatches) and self._train_batches.endless
            if not endless and not len(self._train_batches):  # transformers would ask for max_steps, or take no step
                raise UserError(
                    where="training_data_path",
                    problem="no batch is left to train on, so that no step would be taken.",
                    fix="vlm-tuning check lists rows that are left out; dataloader_drop_last drops the last batch.",
                )
            self._train_loader = self._make_loader(rows, batch_sampler=self._train_batches)
        return self._train_loader

    def validation_loader(self) -> DataLoader:
        """The validation rows in their order, in batches of which every process has its share."""
        if self._validation_loader is None:
            training, rows = self.config.training, self.data.validation
            assert rows is not None
            rank, world = training.process_index, training.world_size
            batches = RowBatches(RowOrder(len(rows)), training.eval_batch_size, rank=rank, world=world)
            self._validation_loader = self._make_loader(rows, batch_sampler=batches)
        return self._validation_loader

    def _make_batches(self, rows: EncodedRows) -> SharedBatches:
        training, budget = self.config.training, self.config.data.max_tokens_per_batch
        self._take_cost_of_first_process()
        if not budget:
            lengths = RowLengths(rows.source, rows.encoder)
            balance = Balance(self.row_cost, lengths.sizes) if self.row_cost else None
            return make_row_batches(training, len(rows), lengths, self.config.group_by_length, balance)
        workers = {"workers": training.dataloader_num_workers, "start_worker": self.workers.start}
        lengths = RowLengths(rows.source, rows.encoder, exact=True, **workers)
        if training.max_steps < 1:  # the trainer asks for the number of steps of an epoch
            rank, world, show = training.process_index, training.world_size, not training.disable_tqdm
            lengths.measure_all(self._sum_over_processes, rank=rank, world=world, show=show)
        balance = Balance(self.row_cost, lengths.sizes) if self.row_cost else None
        return make_token_batches(training, len(rows), lengths, budget, padded=self._expects_padding(), balance=balance)

    def _find_row_cost(self, progress: Progress) -> RowCost | None:
        """What balances the batches of several processes. A resumed run keeps what it began with."""
        if progress.resume_from is not None:
            return RowCost(*progress.row_cost) if progress.row_cost else None
        training, flops = self.config.training, self.model.flops
        batches = training.world_size * training.gradient_accumulation_steps
        measures = self.config.data.max_tokens_per_batch or not self.config.data.allow_remote_images
        if batches == 1 or flops is None or not measures or isinstance(self.data.train, StreamedRows):
            return None
        return find_row_cost(flops, measure_picture(self.data.encoder))

    def _take_cost_of_first_process(self) -> None:
        """Machines with other versions of a library could count otherwise, and rows would be left out."""
        cost = astuple(self.row_cost) if self.row_cost else (0, 0, 0)
        first = self.processes.all_gather_ints(cost)[0].tolist()
        self.row_cost = RowCost(*first) if any(first) else None

    def _expects_padding(self) -> bool:
        """Whether batches will be padded, as far as the model's structure tells: it has not run yet."""
        if self.padded_before is not None:
            return self.padded_before
        return must_pad(self.config.data.padding_free, self.data.encoder, self.data.collator)

    def _sum_over_processes(self, numbers: np.ndarray) -> np.ndarray:
        accelerator = self.processes.accelerator
        return accelerator.reduce(torch.from_numpy(numbers).to(accelerator.device), "sum").cpu().numpy()

    def _make_loader(self, rows: EncodedRows | StreamedRows, **batches: Any) -> DataLoader:
        """A loader of this process's batches. accelerate would share out rows differently; see `SharedBatches`.

        Its generator is its own. Otherwise the seed of its workers would be drawn from the generator that dropout draws
        from: once where workers persist, and again in the epoch after a resume, so that dropout would differ.
        """
        training = self.config.training
        return DataLoader(
            rows,
            **batches,
            collate_fn=self._make_collator(rows),
            num_workers=training.dataloader_num_workers,
            pin_memory=training.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=training.dataloader_persistent_workers,
            prefetch_factor=training.dataloader_prefetch_factor,
            multiprocessing_context=training.dataloader_multiprocessing_context,
            in_order=training.dataloader_in_order,
            worker_init_fn=self.workers.start,
            generator=torch.Generator().manual_seed(training.seed),
        )

    def _make_collator(self, rows: EncodedRows | StreamedRows) -> Callable[[Sequence], dict[str, Any]]:
        collator = replace(self.data.collator, picture_dtype=self.picture_dtype)
        if self.batching is not None and not self.batching.padded:
            adapt = self.batching.packing.adapt
            collator = replace(collator, padding_free=True, positions=self.positions, adapt=adapt)
        if isinstance(rows, StreamedRows):
            return EncodingCollator(self.data.encoder, collator, self.config.data.on_bad_row == "skip")
        return collator

    def check_logits(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        """Compare our logits with the stock forward's on a made-up row, the same on all processes.

        `model` and `forward` as in `decide_batching`. Raises `UserError` where they differ.
        """
        half = self._computes_in_half
        checked = try_optional(
            lambda: check_logits(model, forward, dummy_batch(self.data.encoder, 1), half=half), catch_user_errors=True
        )
        self.processes.raise_on_all_ranks(checked.error if isinstance(checked.error, UserError) else None)
        if checked.error:
            print0(f"Logits are not compared with the stock forward's: {describe_failure(checked.error)}.")

    def choose_tower_attention(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        """Give the vision tower our attention, the same on all processes, if its output stays what it is.

        `model` and `forward` as in `decide_batching`. Only towers that take the lengths of pictures are tried.
        """
        settings, configs = self.config.model, find_tower_configs(model)
        if settings.attn_implementation or not settings.use_flash_attn or not configs:
            return

        def try_out() -> str:
            samples = [sample for sample in trial_samples(self.data.encoder) if sample.images]
            batch = replace(self.data.collator, padding_free=False).join(samples[-1:])  # the one with most pictures
            return find_tower_difference(model, forward, batch, half=self._computes_in_half)

        trial = try_optional(try_out, catch_user_errors=True)
        reason = f"it fails ({describe_failure(trial.error)})" if trial.error else trial.value
        fails = bool(self.processes.all_gather_ints([reason != ""]).any())
        if not fails:
            set_attention(configs, TOWER)
            print0("The vision tower keeps pictures apart by their lengths, in as few calls as it can.")
        else:
            print0(f"The vision tower keeps transformers' attention: {reason or 'ours fails on another process'}.")

    def decide_batching(self, model: nn.Module, forward: Callable[..., Any]) -> Batching:
        """Decide before the first batch, the same on all processes, whether batches are padded.

        `model`: without wrappers. `forward`: the model as it trains, with its wrappers and autocast. Raises `UserError`
        where `padding_free` is true and the model needs padding.
        """
        wanted, packing = self.config.data.padding_free, Packing(reason="padding_free is false")
        if wanted is not False:
            packing = self._find_packing(model, forward)
        padded = packing.reason != ""
        if padded and wanted is True:
            raise UserError(
                where="padding_free", problem=f"cannot be true for this model: {packing.reason}.", fix="Leave it out."
            )
        if not padded:
            packing.apply(model)
        order_padded = padded if self.padded_before is None else self.padded_before
        fault = self._find_batch_fault(model, forward) if padded else ""
        self.batching = Batching(padded, order_padded, packing, fault)
        for loader in (self._train_loader, self._validation_loader):
            if loader is not None:
                loader.collate_fn = self._make_collator(loader.dataset)
        print0(f"Batches are {self.batching}.")
        return self.batching

    def _find_packing(self, model: nn.Module, forward: Callable[..., Any]) -> Packing:
        """How the model takes packed rows, the same on all processes."""

        def make_batches() -> TrialBatches:
            samples = trial_samples(self.data.encoder)
            self.positions = find_positions(model, samples)
            return make_trial_batches(samples, replace(self.data.collator, positions=self.positions))

        def agree(fault: str) -> str:
            failed = bool(self.processes.all_gather_ints([fault != ""]).any())
            return fault or ("it fails without padding on another process" if failed else "")

        attention, half = self.model.attention, self._computes_in_half
        by_row = not is_deepspeed_zero3_enabled()
        return find_packing(model, forward, make_batches, attention, half=half, by_row=by_row, agree=agree)

    @property
    def _computes_in_half(self) -> bool:
        mixed_precision = self.processes.accelerator.mixed_precision != "no"
        return mixed_precision or not HALF.isdisjoint(self.model.dtypes.values())

    def _find_batch_fault(self, model: nn.Module, forward: Callable[..., Any]) -> str:
        """Why batches must have one row; "" where they need not. Raises `UserError` where they have several."""
        encoder, collator = self.data.encoder, self.data.collator
        fault = find_batch_fault(model, forward, encoder, collator, half=self._computes_in_half)
        options = options_of_several_rows(self.config, evaluates=self.data.validation is not None)
        self.processes.raise_on_all_ranks(rows_differ(model, options, fault) if fault and options else None)
        return fault

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._train_batches is not None:
            assert self.batching is not None
            padded, order_padded = self.batching.padded, self.batching.order_padded
            begin_epoch(self._train_batches, args, state, padded=padded, order_padded=order_padded)


def must_pad(padding_free: bool | str, encoder: Encoder, collator: Collator) -> bool:
    """Whether batches must be padded, as far as the option `padding_free` and the processor tell."""
    return padding_free is False or bool(collator.find_masks_of_images([dummy_image_sample(encoder)]))


def choose_collator(config: RunConfig, encoder: Encoder, collator: Collator, padded: bool | None = None) -> Collator:
    """A collator that joins rows as those of training probably will be, whose model has not run yet.

    `padded`: whether a run that is resumed had padded batches.
    """
    padded = must_pad(config.data.padding_free, encoder, collator) if padded is None else padded
    return replace(collator, padding_free=not padded)


def find_positions(model: nn.Module, samples: Sequence[Sample]) -> RowPositions | None:
    """How `model` computes positions in several dimensions; None where it does not. See `find_row_positions`."""
    with_images = next((sample for sample in samples if sample.images), None)
    return find_row_positions(model, with_images.sequence, with_images.images) if with_images else None


def make_trial_batches(samples: Sequence[Sample], collator: Collator) -> TrialBatches:
    """The batches for trying out whether a model may get padding-free ones, from `trial_samples`.

    Raises `ValueError` where there are not two, or none has an image.
    """
    with_image = next((sample for sample in samples if sample.images), None)
    if with_image is None or len(samples) < 2:
        raise ValueError("the processor takes no two rows, of which one has an image")
    others = [sample for sample in samples if sample is not with_image]
    samples = [others[0], with_image, *others[1:]]  # so that it has rows before and after it
    alone = replace(collator, padding_free=False, dummy_image_sample=None)
    packed = replace(alone, padding_free=True)
    changed = [others[0], _change(with_image), *others[1:]]
    separate = [alone.join([sample]) for sample in samples]
    return TrialBatches(separate, packed.join(samples), packed.join(changed), place=1)


def _change(sample: Sample) -> Sample:
    """A row of the same length with another image and another last token: the one before it, which is text, too."""
    ids = sample.sequence["input_ids"].clone()
    ids[-1] = ids[ids != ids[-1]][-1]
    images = {name: -value if value.is_floating_point() else value for name, value in sample.images.items()}
    return replace(sample, sequence={**sample.sequence, "input_ids": ids}, images=images)
