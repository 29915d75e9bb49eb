"""Attention of a ViT-B/16 block at 512 × 512 pixels, value and gradient: the fused kernel that every block calls, against softmax(QKᵀ/√d)V."""

import plain
import torch
from interleaved import peak, rounds, row, same
from torch.nn import functional as F


def measure(repeats=5, tokens=1025, heads=12, width=64):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, requires_grad=True) for _ in range(3))
    values = {}

    def taken(name, way):
        q.grad = None
        out = way(q, k, v)
        out.sum().backward()
        values[name] = out.detach(), q.grad.clone()

    ways = dict(
        plain=lambda: taken("plain", plain.attention), fused=lambda: taken("fused", F.scaled_dot_product_attention)
    )
    memory = [peak(way) for way in ways.values()]
    same(values, atol=1e-5)
    return [row(f"attention, {tokens} tokens", rounds(ways, repeats), "fused", memory=memory)]
