"""The rows that a run left out or cut, and why, over all processes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer_utils import has_length

from tuning.console import print0
from tuning.data.collator import BatchInfo
from tuning.data.encode import Skipped
from tuning.distributed.processes import Processes
from tuning.errors import UserError
from tuning.files import SKIPPED_FILE

FEW_STREAMED_ROWS = 1000  # the share of bad rows is taken of at least so many streamed rows


class SkippedRows:
    """Counts rows as batches pass. `skipped`: the rows that any process left out, by their place in the data.

    `image_limit`: how many images of a row the model takes. `max_bad_fraction`: see `DataArguments`.
    """

    def __init__(
        self, processes: Processes, output_dir: str | os.PathLike, *, image_limit: int | None, max_bad_fraction: float
    ):
        self.processes, self.max_bad_fraction = processes, max_bad_fraction
        self.image_rule = (
            "only the first image is used" if image_limit == 1 else f"only the first {image_limit} images are used"
        )
        self.file = SkippedRowsFile(output_dir)
        self.skipped, self._unsynced = dict[str, Skipped](), dict[str, Skipped]()
        self.bad: dict[bool, list[Skipped]] = {False: [], True: []}  # by whether they are validation rows
        self.cut_rows: set[str] = set()
        self.rows_seen = self.dropped_images = 0
        self.saw_supervised_tokens = False

    @property
    def unsynced(self) -> int:
        """How many rows this process has left out since the last `sync`."""
        return len(self._unsynced)

    def take(self, info: BatchInfo, *, evaluating: bool = False) -> None:
        """Count the rows of a batch."""
        if info.dropped_images and not self.dropped_images:
            print0(
                f"A row has more images than this model takes: {self.image_rule}. The run prints a count at its end."
            )
        self.dropped_images += info.dropped_images
        self.cut_rows.update(info.cut)
        self.rows_seen += len(info.rows)
        self.saw_supervised_tokens |= info.supervised_tokens > 0 and not evaluating
        self._unsynced |= {where: row for where, row in info.skipped.items() if where not in self.skipped}

    def sync(self, number: int, dataset: Any, rows_seen: int, *, evaluating: bool = False) -> None:
        """Exchange the rows that the processes left out since the last time, `number` in all.

        Raises `UserError`, on every process, if more than `max_bad_fraction` of the rows of `dataset` are bad.
        `rows_seen`: how many have been read, if its length is unknown.
        """
        if not number:
            return
        new = {where: row for where, row in gather_object(list(self._unsynced.items())) if where not in self.skipped}
        self._unsynced.clear()
        self.skipped.update(new)
        bad = self.bad[evaluating]
        bad += [row for row in new.values() if row.bad]
        if self.processes.rank == 0:
            self.file.append(new.values())
        known = has_length(dataset)
        rows = len(dataset) if known else max(rows_seen, FEW_STREAMED_ROWS)
        if len(bad) > self.max_bad_fraction * rows:
            raise UserError(
                where=str(self.file.path),
                problem=(
                    f"{len(bad)} of {rows} rows{'' if known else ' so far'} are bad, more than max_bad_fraction"
                    f" {self.max_bad_fraction:g}; the last one: {bad[-1].reason}"
                ),
                fix="Correct them (vlm-tuning check lists them all), or raise max_bad_fraction.",
            )

    def report(self, supervised_tokens: int | None) -> None:
        """Print what all processes left out. Raises `UserError` if no row was trained.

        `supervised_tokens`: how many the run has trained, also before it was resumed; None if that is unknown.
        """
        counts = [self.dropped_images, self.rows_seen, self.saw_supervised_tokens]
        images, seen, supervised = self.processes.all_gather_ints(counts).sum(dim=0).tolist()
        cut = len(set(gather_object(list(self.cut_rows))))
        if images:
            print0(f"Images left out because {self.image_rule}: {images}.")
        if self.skipped:
            print0(f"{len(self.skipped)} rows were left out; {self.file.path} names them.")
        if cut:
            print0(f"The answers of {cut} rows were cut to max_seq_length.")
        if supervised_tokens == 0 or (supervised_tokens is None and seen and not supervised):
            raise UserError(
                where=str(self.file.path),
                problem="every row was left out, so nothing was trained and nothing is saved.",
                fix="Look there for the rows and the reasons.",
            )


class SkippedRowsFile:
    """Writes lines of `{"row", "field", "reason"}` to `skipped_rows.jsonl`. `row` counts from 0 in its data file.

    A resumed run does not write a line twice.
    """

    def __init__(self, output_dir: str | os.PathLike):
        self.path = Path(output_dir, SKIPPED_FILE)
        self._written: set[str] | None = None

    def append(self, rows: Iterable[Skipped]) -> None:
        if self._written is None:
            self._written = set(self.path.read_text(encoding="utf-8").split("\n")) if self.path.exists() else set()
        with open(self.path, "a", encoding="utf-8") as file:
            for skipped in rows:
                entry = {"row": skipped.row, "field": skipped.field, "reason": skipped.reason}
                line = json.dumps(entry, ensure_ascii=False)
                if line not in self._written:
                    self._written.add(line)
                    file.write(line + "\n")
