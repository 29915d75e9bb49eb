"""The floor of an iteration: its matrix products, convolutions and attention alone, one after the other.

Nothing that trains the same network on the same pictures in the same format can be faster, unless it computes less.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")  # and all attentions


class Products(TorchDispatchMode):
    "Records the matrix products, convolutions and attentions in `dtype` of what runs under it, forward and backward."

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.calls = []  # operation, its arguments with tensors described, its keywords

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if (name in NAMES or "attention" in name) and tensors and tensors[0].dtype == self.dtype:
            self.calls.append((func, tree_map(_describe, args), kwargs or {}))
        return func(*args, **kwargs or {})


class _Description(tuple):
    "Shape, strides, number format and device of a tensor."


def _describe(x):
    return _Description((x.shape, x.stride(), x.dtype, x.device)) if isinstance(x, torch.Tensor) else x


def make_floor(iteration: Callable[[], object], dtype: torch.dtype) -> Callable[[], None]:
    "Run `iteration` once and return a function that repeats its products in `dtype` alone, on random numbers."
    with Products(dtype) as record:
        iteration()
    made = {}

    def make(x):
        if not isinstance(x, _Description):
            return x
        if x not in made:
            shape, stride, dtype, device = x
            n_stored = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
            memory = torch.zeros(n_stored, dtype=dtype, device=device)
            if dtype.is_floating_point:
                memory.normal_()
            made[x] = memory.as_strided(shape, stride)
        return made[x]

    calls = [
        (func, tree_map(make, args, is_leaf=lambda x: isinstance(x, _Description)), kwargs)
        for func, args, kwargs in record.calls
    ]

    def repeat():
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return repeat
