"""A source seen through an encoder: what the DataLoader's workers index."""

from torch.utils.data import Dataset
from tqdm import tqdm

from tuning.data.encode import Encoder, Sample
from tuning.data.sources import Source
from tuning.errors import UserError


class EncodedRows(Dataset):
    """Rows encoded when asked for.

    A row that cannot be encoded is returned as its `UserError`: raised inside a worker process, its message would
    reach the user buried in the worker's traceback.
    """

    def __init__(self, source: Source, encoder: Encoder):
        self.source, self.encoder = source, encoder

    def __len__(self) -> int:
        return len(self.source)

    def estimate_lengths(self) -> list[int]:
        """The length of every row's text in characters: enough to group rows, and no image is opened."""
        field, lengths = self.encoder.text_field, list[int]()
        with tqdm(total=len(self), desc="measuring rows", unit="row") as progress:
            for part in self.source.parts:
                for messages in part.rows.select_columns([field]):
                    lengths.append(len(str(messages[field])))
                    progress.update()
        return lengths

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return self.encoder.encode(self.source[index])
        except UserError as error:
            return error
