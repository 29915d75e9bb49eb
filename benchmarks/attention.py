"""Attention of a ViT-B/16 block at 512 × 512 pixels, value and gradient.

The fused kernel that every block calls, compared with softmax(QKᵀ/√d)V.
"""

from functools import partial

import plain
import torch
from interleaved import peak, rounds, row, same
from torch.nn import functional as F


def add_gradient(attention, q, k, v):
    "Output of `attention`, and the gradient of its sum with respect to `q`."
    q.grad = None
    out = attention(q, k, v)
    out.sum().backward()
    return out.detach(), q.grad.clone()


def measure(repeats=5, tokens=1025, heads=12, width=64):
    "A row of time and memory."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    case = [torch.randn(1, heads, tokens, width, device=device, requires_grad=True) for _ in range(3)]
    attentions = dict(plain=plain.attention, fused=F.scaled_dot_product_attention)
    ways = {name: partial(add_gradient, attention, *case) for name, attention in attentions.items()}
    memory = [peak(way) for way in ways.values()]
    same({name: way() for name, way in ways.items()}, atol=1e-5)
    return [row(f"attention, {tokens} tokens", rounds(ways, repeats), "fused", memory=memory)]
