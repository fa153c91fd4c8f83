"""What a row costs, from the shapes of the model and from what the processor makes of a picture."""

from math import inf

import numpy as np

from tuning.data.balance import RowCost
from tuning.data.dummy_samples import PictureSize
from tuning.model.flops import Flops


def find_row_cost(flops: Flops, picture: PictureSize | None) -> RowCost | None:
    """The cost of a row. None where the model's shapes do not say what a token costs.

    A row's patches are its image tokens · the patches per token of one picture. Attention in a window grows with tokens
    only, as rows are longer than windows. Supervised tokens are not known before a row is encoded, and do not count.
    """
    if not flops.decoder:
        return None
    in_windows = sum(2 * window * operations for window, operations in flops.attention.items() if window < inf)
    return RowCost.of(flops.decoder + in_windows, flops.attention.get(inf, 0.0), _cost_of_image_token(flops, picture))


def _cost_of_image_token(flops: Flops, picture: PictureSize | None) -> float:
    tiles = flops.find_tiles(picture.shape) if picture else []
    if picture is None or not tiles:
        return flops.projector
    return float(flops.count_tower(np.array(tiles)).sum() + flops.projector * sum(tiles)) / picture.tokens
