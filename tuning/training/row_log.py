"""What becomes of the rows of a run: which are left out or cut, and why, on all processes together."""

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

FEW_STREAMED_ROWS = 1000  # a share of fewer streamed rows says little


class SkippedRows:
    """Counts rows as they pass in batches. `skipped`: those left out, of all processes, by where they stand.

    `image_limit`: images of a row that the model takes; `max_bad_fraction`: see `DataArguments`.
    """

    def __init__(
        self, processes: Processes, output_dir: str | os.PathLike, *, image_limit: int | None, max_bad_fraction: float
    ):
        self.processes, self.max_bad_fraction = processes, max_bad_fraction
        self.image_rule = (
            "only the first image is used" if image_limit == 1 else f"only the first {image_limit} images are used"
        )
        self.file = SkippedRowsFile(output_dir)
        self.skipped, self._untold = dict[str, Skipped](), dict[str, Skipped]()
        self.bad: dict[bool, list[Skipped]] = {False: [], True: []}  # of training, of validation
        self.cut_rows: set[str] = set()
        self.rows_seen = self.dropped_images = 0
        self.saw_supervised_tokens = False

    @property
    def unsynced(self) -> int:
        """How many rows this process has left out since it last told the others."""
        return len(self._untold)

    def take(self, facts: BatchInfo, *, evaluating: bool = False) -> None:
        """Note what a batch tells of its rows."""
        if facts.dropped_images and not self.dropped_images:
            print0(f"A row has more images than this model takes: {self.image_rule}. The count follows at the end.")
        self.dropped_images += facts.dropped_images
        self.cut_rows.update(facts.cut)
        self.rows_seen += len(facts.rows)
        self.saw_supervised_tokens |= facts.supervised_tokens > 0 and not evaluating
        self._untold |= {where: row for where, row in facts.skipped.items() if where not in self.skipped}

    def tell(self, number: int, dataset: Any, rows_seen: int, *, evaluating: bool = False) -> None:
        """Tell all processes of the `number` rows that they have just left out. Too many bad ones end the run."""
        if not number:
            return
        new = {where: row for where, row in gather_object(list(self._untold.items())) if where not in self.skipped}
        self._untold.clear()
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
                fix="Mend them (vlm-tuning check lists all), or raise max_bad_fraction.",
            )

    def report(self) -> None:
        """Say what all processes left out of the data. Raises `UserError` if that was all of it."""
        counts = [self.dropped_images, self.rows_seen, self.saw_supervised_tokens]
        images, seen, supervised = self.processes.share(counts).sum(dim=0).tolist()
        cut = len(set(gather_object(list(self.cut_rows))))
        if images:
            print0(f"{self.image_rule}: {images} further images were left out.")
        if self.skipped:
            print0(f"{len(self.skipped)} rows were left out; {self.file.path} names them.")
        if cut:
            print0(f"The answers of {cut} rows were cut to max_seq_length.")
        if seen and not supervised:
            raise UserError(
                where=str(self.file.path),
                problem="every row was left out, so nothing was trained and nothing is saved.",
                fix="It names the rows and the reasons.",
            )


class SkippedRowsFile:
    """Writes `{"row", "field", "reason"}` lines to `skipped_rows.jsonl`; `row` counts from 0 in its file.

    A line that an interrupted run wrote is not written again.
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
