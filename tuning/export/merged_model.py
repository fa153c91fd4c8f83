"""Write a merged model: its weights tensor by tensor, and the files that lie with them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from tuning.export.merge import Entry, Merge
from tuning.export.proof import WeightProof
from tuning.export.stored_group import added_to
from tuning.model.saved_weights import write_tensors


def write_weights(merge: Merge, folder: Path) -> WeightProof:
    """Write every shard under the base's file and key names. Each tensor is made once, checked, and written."""
    proof = WeightProof()
    total = sum(entry.nbytes for entry in merge.entries)
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True) as progress:

        def checked_tensors(entries: list[Entry]) -> Iterator[torch.Tensor]:
            for entry, value in merge.tensors(entries):
                proof.check(merge, entry, value)
                yield value
                progress.update(value.nbytes)

        for file, entries in merge.shards.items():
            write_tensors(folder / file, entries, checked_tensors(entries))
    added_to.cache_clear()
    files = {entry.key: file for file, entries in merge.shards.items() for entry in entries}
    merge.base.write_index_like(folder, files, total)
    return proof
