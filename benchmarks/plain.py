"""The baseline of all comparisons: the method's formulas one by one in eager PyTorch, without regard to time or memory.

It shares no code with the losses of `mbs`, and so checks them, too. The numbers are those of docs/equations.md.
"""

import numpy as np
import torch
from torch.nn import functional as F

from mbs.orthogonality import orthogonality


def attention(q, k, v):
    "Compute softmax(QKᵀ / √d) V."
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Attention(torch.nn.Module):
    "`attention` with the projections of a timm block, whose parameters it shares."

    def __init__(self, own):
        super().__init__()
        self.qkv, self.proj, self.heads = own.qkv, own.proj, own.num_heads

    def forward(self, x, **_):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


def use_plain_attention(segmenter):
    "Replace the attention in every block of `segmenter` by the plain one, and return it."
    for block in [*segmenter.encoder.vit.blocks, *segmenter.decoder.blocks]:
        block.attn = Attention(block.attn)
    return segmenter


def upsample(z, size):
    return F.interpolate(z, size=size, mode="bilinear", align_corners=False)


def pixel_losses(z, old, target, weight=25.0, threshold=0.7):
    """Compute (4), (5), (6), (10) and (11) of patch logits: everything at full size, one class after the other.

    Return cross-entropy plus weighted distillation, and the training labels.
    """
    n_old, n = old.shape[1], z.shape[1]
    logits, teacher = upsample(z, target.shape[1:]), upsample(old, target.shape[1:])
    q = teacher.softmax(1)
    sure, best = q.max(1)
    labels = torch.where((target == 0) & (best > 0) & (sure >= threshold), best, target)
    labels = torch.where((labels == 0) & (q[:, 0] < q[:, 1:].sum(1)), 255, labels)
    entropy = F.cross_entropy(logits, labels, ignore_index=255)
    guided = []
    for c in range(n):
        if c == 0:
            guided.append(torch.where((target >= n_old) & (target != 255), 0, q[:, 0]))
        elif c < n_old:
            guided.append(q[:, c])
        else:
            guided.append(torch.where(target == c, q[:, 0], 0))
    return entropy - weight * (torch.stack(guided, 1) * logits.log_softmax(1)).mean(), labels


def compute_loss(student, teacher, target, n_new):
    "Compute the whole objective (13), λ = 25, from the outputs of both networks."
    total, labels = pixel_losses(student.patch_logits, teacher.patch_logits, target)
    n_old, p = teacher.n_channels, teacher.patch_logits.softmax(1)[:, 0]
    small = F.interpolate(labels[:, None].float(), size=p.shape[1:], mode="nearest")[:, 0]
    weight = torch.where(small == 0, p, ((small > 0) & (small < n_old)).float()).flatten(1)[..., None]
    squared = weight * (student.patches - teacher.patches).square()
    patches = squared.sum() / ((weight > 0).sum() * squared.shape[2]).clamp(min=1)
    classes = F.mse_loss(student.class_features[:, :n_old], teacher.class_features)
    return total + patches + classes + orthogonality(student.class_tokens, n_new)


def train_iteration(student, teacher, images, target, n_new, optimiser):
    "Train one iteration, and read its loss at once."
    with torch.no_grad():
        old = teacher(images)
    value = compute_loss(student(images), old, target, n_new)
    value.backward()
    optimiser.step()
    optimiser.zero_grad()
    return value.item()


def make_optimiser(student):
    return torch.optim.SGD(student.parameters(), 1e-4, momentum=0.9, weight_decay=1e-5, nesterov=True, foreach=False)


def confusion(z, truth):
    """Count a confusion matrix from patch logits (B, C, h, w) as the released program does, picture by picture.

    Upsampling, softmax and `max(1)[1]`, which is faster than `argmax(1)` on a CPU, run on the device; NumPy's histogram
    runs on the processor.
    """
    n, counts = z.shape[1], 0
    for logits, labels in zip(z, truth):
        predicted = upsample(logits[None], labels.shape).softmax(1).max(1)[1][0].cpu().numpy()
        labels = labels.cpu().numpy()
        seen = labels < n
        counts = counts + np.bincount(n * labels[seen] + predicted[seen], minlength=n * n).reshape(n, n)
    return counts
