"""Inputs that the host knows: their numbers are never read from the device, and every result is PyTorch's own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import vision_utils
from transformers.masking_utils import find_packed_sequence_indices

from tuning.model.known_inputs import MOST_NUMBERS, KnownTensor, pair, send

CPU = torch.device("cpu")
GRIDS = torch.tensor([[1, 4, 6], [2, 8, 2], [1, 2, 2]])
ROWS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])


def unreadable(numbers):
    """Known, on a device that has no numbers: to read one there is an error."""
    return pair(numbers.to("meta"), numbers.clone())


@pytest.mark.parametrize(
    ("compute", "numbers"),
    [
        (vision_utils.get_vision_cu_seqlens, GRIDS),
        (find_packed_sequence_indices, ROWS),
        (lambda sizes: torch.stack([size[0] * size[1] for size in sizes]), GRIDS),
        (lambda sizes: sizes.prod(-1) // 4, GRIDS),
        (lambda sizes: torch.repeat_interleave(sizes[:, 1], sizes[:, 0]), GRIDS),
        (lambda sizes: sizes.unbind(1)[2].unique_consecutive(), GRIDS),
        (lambda sizes: sizes[sizes[:, 0] == 1].max(dim=0).values, GRIDS),
        (lambda rows: (rows == 1).nonzero(), ROWS),
        (lambda rows: torch.where(rows == 0)[1], ROWS),
        (lambda rows: rows.masked_fill(rows > 1, -100), ROWS),
        (lambda rows: torch.cat([rows, torch.zeros_like(rows, device=rows.device)]), ROWS),
        (lambda rows: rows.new_zeros(3), ROWS),
        (lambda rows: rows.long().to(torch.int32).contiguous(), ROWS),
        (copy.deepcopy, ROWS),
    ],
)
def test_what_is_computed_of_known_numbers_is_known(compute, numbers):
    found, expected = compute(unreadable(numbers)), compute(numbers)
    assert isinstance(found, KnownTensor)
    assert found.device.type == "meta"
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.host, expected)


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.tolist,
        lambda sizes: sizes.sum().item(),
        lambda sizes: [int(size[0]) for size in sizes],
        lambda sizes: bool((sizes > 0).all()),
        lambda sizes: f"{sizes.sum()} tokens",
        lambda sizes: 4 in sizes,
        lambda sizes: sizes.cpu().tolist(),
        lambda sizes: sizes.to("cpu", torch.float32).tolist(),
        lambda sizes: list(range(sizes[0, 1])),
        lambda sizes: [part.tolist() for part in sizes.flatten().split([*sizes[:, 0].tolist(), 5])],
    ],
)
def test_the_host_reads_its_own_numbers(read):
    assert read(unreadable(GRIDS)) == read(GRIDS)


def test_floats_and_large_tensors_are_the_devices_alone():
    assert not isinstance(unreadable(GRIDS) / 2, KnownTensor)
    assert not isinstance(send(torch.ones(3), CPU), KnownTensor)
    assert not isinstance(send(torch.ones(MOST_NUMBERS + 1, dtype=torch.long), CPU), KnownTensor)
    assert not isinstance(unreadable(GRIDS) + torch.ones(3, dtype=torch.long, device="meta"), KnownTensor)
    assert unreadable(GRIDS).device.type == "meta"
    assert not isinstance(send(GRIDS, CPU, known=False), KnownTensor)


def test_pictures_are_put_at_the_places_of_their_tokens_as_by_masked_scatter():
    torch.manual_seed(0)
    ids = torch.tensor([[7, 1, 7, 7, 2], [7, 3, 4, 5, 6]])
    rows, pictures = torch.randn(2, 5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    gradient = torch.randn(2, 5, 3)
    results = []
    for tokens in (ids, send(ids, CPU)):
        mask = (tokens == 7).unsqueeze(-1)
        for shaped in (mask, mask.expand_as(rows)):
            out = rows.masked_scatter(shaped, pictures)
            results.append((out, *torch.autograd.grad(out, [rows, pictures], gradient)))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert torch.equal(found, expected)
            assert type(found) is torch.Tensor
    assert rows[send(ids, CPU) == 7].tolist() == rows[ids == 7].tolist()
    assert rows[send(ids, CPU) == 7, 1:].tolist() == rows[ids == 7, 1:].tolist()


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_mask_function_may_look_at_them(in_blocks):
    """vmap calls it, for flex_attention and for unusual masks of transformers."""
    dense = []
    for rows in (ROWS, send(ROWS, CPU)):

        def sees(batch, head, query, key, rows=rows):
            return (query >= key) & (rows[batch, query] >= rows[batch, key])

        settings = {"B": 1, "H": None, "Q_LEN": 9, "KV_LEN": 9, "device": "cpu"}
        dense.append(create_block_mask(sees, **settings).to_dense() if in_blocks else create_mask(sees, **settings))
    assert torch.equal(*dense)
    assert dense[0].any()


CHANGES = {
    "add": lambda x, n: x.add_(n),
    "augmented": lambda x, n: x.__iadd__(n),
    "set": lambda x, n: x.__setitem__(0, n),
    "set where": lambda x, n: x.__setitem__(x > n, 3),
    "set a column": lambda x, n: x[:, 0].fill_(n),
    "copy": lambda x, n: x.copy_(torch.full_like(x, n)),
    "from another": lambda x, n: x.copy_(torch.arange(x.numel()).reshape(x.shape)),
    "set from another": lambda x, n: x.__setitem__((slice(None), 1), torch.full((len(x),), n)),
    "row of it": lambda x, n: x.view(-1)[1:3].mul_(n),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(-3, 3)), max_size=6))
@settings(deadline=None, derandomize=True)
def test_changes_reach_the_host_and_the_device(changes):
    plain, known = GRIDS.clone(), send(GRIDS.clone(), CPU)
    column = known[:, 2]
    for name, number in changes:
        CHANGES[name](plain, number)
        CHANGES[name](known, number)
    assert torch.equal(known.host, plain)
    assert torch.equal(known.as_subclass(torch.Tensor), plain)
    assert column.tolist() == plain[:, 2].tolist()
