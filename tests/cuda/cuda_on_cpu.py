"""A CUDA device without a GPU: PyTorch's own host code for CUDA, on memory of the host, with numbers made by the CPU.

`null_cuda.c` stands in for the runtime: device memory is host memory, kernels do nothing. So PyTorch's checks of
dtype, device, shape and stride, its choice of attention kernel and its waits for the device are the real ones.
`CudaOnCpu` then runs every operation once more on the CPU, on the same memory, for the right numbers.

Import this before torch: the program starts again with the runtime preloaded.
"""

import ctypes
import os
import sys
import threading
from collections import Counter
from itertools import pairwise

LIBRARY = os.path.join(sys.prefix, "null_cuda", "libcuda.so.1")
if LIBRARY not in os.environ.get("LD_PRELOAD", ""):
    if not os.path.exists(LIBRARY):
        sys.exit(f"{LIBRARY} is missing: run tests/cuda/setup.sh, then the Python of the environment it makes.")
    folders = os.pathsep.join(filter(None, [os.path.dirname(LIBRARY), os.environ.get("LD_LIBRARY_PATH")]))  # for Triton
    environment = os.environ | {"LD_PRELOAD": LIBRARY, "LD_LIBRARY_PATH": folders}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

torch.backends.cudnn.enabled = False  # the real library, which would look for a GPU
torch.backends.cuda.enable_cudnn_sdp(False)

_runtime = ctypes.CDLL(None)
_runtime.null_cuda_waits.restype = _runtime.null_cuda_launches.restype = ctypes.c_long
waits, launches = _runtime.null_cuda_waits, _runtime.null_cuda_launches

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
NO_NUMBERS = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_efficientzerotensor"),
    *("_local_scalar_dense", "_unsafe_view", "_reshape_alias", "set_", "resize_", "record_stream"),
    *("is_pinned", "_pin_memory", "is_same_size", "sym_size", "_has_compatible_shallow_copy_type"),
}
SIZED_BY_VALUES = {  # the host waits for the result's size, or for the result
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
    *("bincount", "equal", "masked_scatter_backward"),
}
CPU_ALONE = {"embedding_dense_backward", "prod"}  # the device would be asked for results midway, or to compile a kernel
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
ATTENTION = {
    *("_varlen_attn", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_varlen_attn_backward", "_scaled_dot_product_flash_attention_backward"),
    "_scaled_dot_product_efficient_attention_backward",
}
UNFUSED_ATTENTION = {"_safe_softmax"}  # what scaled_dot_product_attention runs where it takes no kernel


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    storage = tensor.untyped_storage()
    if tensor.numel() == 0 or storage.data_ptr() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype)
    alias.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    alias = alias.conj() if tensor.is_conj() else alias
    return alias._neg_view() if tensor.is_neg() else alias


def _check_devices(name: str, args: tuple, kwargs: dict) -> None:
    """Raise what CUDA does where a tensor lies elsewhere; single numbers of the CPU may."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(not leaf.is_cuda and leaf.dim() for leaf in leaves):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")


def all_on_cpu(tree):
    return tree_map_only(torch.Tensor, lambda tensor: on_cpu(tensor) if tensor.is_cuda else tensor, tree)


def to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device, which costs no wait."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    on_cpu(made).copy_(tensor)
    return made


class CudaOnCpu(TorchDispatchMode):
    """Within it, results on CUDA have their numbers.

    `syncs`: place in the code → how often the host waited there; `attention`: kernel and dtype → calls;
    `collectives`: operation → calls by this process.
    """

    def __init__(self):
        super().__init__()
        self.syncs, self.attention, self.collectives = Counter(), Counter(), Counter()
        self._seen = waits()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any("Fake" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack()):
            return func(*args, **kwargs)
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # DTensor and the like bring their local operations here by themselves
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
        if inputs and func.namespace in ("c10d", "_c10d_functional"):
            return self._communicate(func, name, args, kwargs)
        self._note(waits() - self._seen, name)  # before this operation: torch.tensor(…, device="cuda") and the like
        masks = 0
        if inputs and name in INDEXING:
            args, masks = _masks_to_positions(args)
        if inputs and name in SIZED_BY_VALUES | CPU_ALONE:
            kwargs.pop("device", None)
            _check_devices(name, args, kwargs)
            self._note(name in SIZED_BY_VALUES, name)
            return tree_map_only(torch.Tensor, to_cuda, func(*all_on_cpu(args), **all_on_cpu(kwargs)))
        out = func(*args, **kwargs)
        self._note(max(waits() - self._seen, masks > 0), name)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        on_device = inputs or any(result.is_cuda for result in results)
        if on_device and name in ATTENTION | UNFUSED_ATTENTION:
            self.attention[f"{name} {args[0].dtype}".replace("torch.", "")] += 1
        if on_device and name not in NO_NUMBERS and not func.is_view:
            _give_numbers(func, name, args, kwargs, inputs, results)
        return out

    def _note(self, times, name):
        if times:
            self.syncs[f"{_place()} ({name})"] += int(times)
        self._seen = waits()

    def _communicate(self, func, name, args, kwargs):
        """gloo on the same memory, waited for at once. Returns what NCCL would have."""
        self.collectives[name] += 1
        given = {}

        def lend(tensor):
            if not tensor.is_cuda:
                return tensor
            alias = on_cpu(tensor)
            alias = alias.view(-1) if name in ("_allgather_base_", "_reduce_scatter_base_") else alias
            given[alias.data_ptr()] = tensor
            return alias

        def give_back(tensor):
            if func.namespace == "_c10d_functional" and name != "wait_tensor":
                tensor = torch.ops._c10d_functional.wait_tensor(tensor)
            if tensor.data_ptr() in given:
                return given[tensor.data_ptr()]
            return to_cuda(tensor) if func.namespace == "_c10d_functional" else tensor

        made = func(*tree_map_only(torch.Tensor, lend, args), **tree_map_only(torch.Tensor, lend, kwargs))
        if func.namespace == "_c10d_functional":
            return tree_map_only(torch.Tensor, give_back, made)
        # These return a Work, or tensors and a Work, which has the tensors once more: there, too, the device's.
        tensors, work = made if isinstance(made, (tuple, list)) else (None, made)
        work.wait()
        tensors = tree_map_only(torch.Tensor, give_back, tensors)
        done = torch.futures.Future()
        done.set_result(tensors if isinstance(tensors, list) else [tensors])
        work = dist.Work.boxed(_create_work_from_future(done))
        return work if tensors is None else (tensors, work)


def _masks_to_positions(args):
    """Indexing's arguments with positions in place of boolean masks, which the device cannot count; number of masks."""
    indices, masks = [], 0
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            masks += index.is_cuda
            indices += [to_cuda(positions.contiguous()) for positions in all_on_cpu(index).nonzero().unbind(1)]
        else:
            indices.append(index)
    return (args[0], indices, *args[2:]), masks


def _give_numbers(func, name, args, kwargs, inputs, results):
    """Fill the results, and what is changed in place, with the CPU's numbers."""
    if name in ATTENTION:
        for result, numbers in zip(results, _in_a_thread(_attention, func, name, args, kwargs), strict=False):
            on_cpu(result).copy_(numbers.detach())
        return
    args, kwargs = all_on_cpu((args, kwargs))
    args, kwargs = tree_map_only(torch.Generator, lambda generator: None, (args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    kwargs |= {"device": torch.device("cpu")} if "device" in kwargs else {}
    if name == "copy_":
        args[0].copy_(args[1])
        return
    if name == "_to_copy":
        all_on_cpu(results[0]).copy_(args[0])
        return
    # What CUDA computes in other dtypes than the CPU takes.
    if name in ("_softmax", "_log_softmax") and args[2]:
        args = (args[0].float(), args[1], False)
    elif name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        args = (args[0].float(), args[1].float(), args[2], torch.float32)
    elif name == "native_layer_norm_backward":
        args = tree_map_only(torch.Tensor, lambda tensor: tensor.float(), args)
    numbers = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    changed = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    for result, made in zip(results, numbers, strict=True):
        if result.numel() == made.numel() == 0 or (result.is_cuda and result.untyped_storage().data_ptr() in changed):
            continue
        if result.shape != made.shape:
            raise AssertionError(f"{func}: {tuple(result.shape)} on CUDA, {tuple(made.shape)} on the CPU")
        all_on_cpu(result).copy_(made)


def _in_a_thread(function, *args):
    """Below autograd, where operations are dispatched, only a thread of its own can differentiate."""
    found = []

    def call():
        try:
            found.append(function(*args))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(found[0], RuntimeError):
        raise found[0]
    return found[0]


def _attention(func, name, args, kwargs):
    """Results of a fused kernel, by the formula in float32: output and logsumexp, or gradients of query, key, value."""
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    backward = name.endswith("_backward")
    states = [on_cpu(given[part]).float().requires_grad_(backward) for part in ("query", "key", "value")]
    with torch.enable_grad():
        if name.startswith("_varlen_attn"):
            left, right = given.get("window_size") or (-1, -1)
            causal, bounds = given["is_causal"] or right == 0, on_cpu(given["cu_seq_q"]).tolist()
            rows = ([state[start:end].transpose(0, 1) for state in states] for start, end in pairwise(bounds))
            pieces = [_attend(*row, causal, given.get("scale"), window=left) for row in rows]
            output = torch.cat([piece.transpose(0, 1) for piece, _ in pieces])
            logsumexp = torch.cat([sums for _, sums in pieces], -1)
        else:
            bias = given.get("attn_bias")
            bias = None if bias is None else on_cpu(bias).float()
            output, logsumexp = _attend(*states, given["is_causal"], given.get("scale"), bias)
        if backward:
            gradient = given["grad_out"] if "grad_out" in given else given["grad_out_"]
            return torch.autograd.grad(output, states, on_cpu(gradient).float())
    return (output, logsumexp) if name == "_varlen_attn" else (output,)


def _attend(query, key, value, causal, scale, bias=None, window=-1):
    """query `[…, heads, T, width]`, key and value `[…, key heads, S, width]`; `window`: how far back it sees."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen.triu(-window) if window >= 0 else seen
    scores = scores.masked_fill(~seen, -torch.inf)
    scores = scores if bias is None else scores + bias
    return torch.nan_to_num(scores.softmax(-1)) @ value, scores.logsumexp(-1)


def _place():
    """file:line of the innermost Python code outside PyTorch, and of the project's own that called it."""
    outer = None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith((os.path.dirname(torch.__file__), "<")):
            name = os.path.relpath(code.co_filename) if "site-packages/" not in code.co_filename else code.co_filename
            place = f"{name.split('site-packages/')[-1]}:{frame.f_lineno} {code.co_name}"
            if f"{os.sep}tuning{os.sep}" in code.co_filename:
                return place if outer is None else f"{outer} ← {place}"
            outer = outer or place
        frame = frame.f_back
    return outer or "backward pass"


def gloo_for_nccl() -> None:
    """Several processes talk by gloo, also about CUDA tensors. Call it before `torch.distributed` is set up."""
    init = dist.init_process_group

    def init_process_group(backend=None, *args, **kwargs):
        kwargs.pop("device_id", None)
        return init("cpu:gloo,cuda:gloo", *args, **kwargs)

    dist.init_process_group = init_process_group
