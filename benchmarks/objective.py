"""Pixel losses of an incremental step – cross-entropy on selective pseudo-labels and label-guided distillation, value and gradient –
on a 512 × 512 picture: in bands of rows against the full-size formulas of METHOD, class by class.

    OMP_NUM_THREADS=1 python benchmarks/objective.py [REPEATS]
"""
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from mbs.methods import Method
from mbs.objective import full_terms, step_loss
from mbs.segmenter import SegmenterOutput

PARTS = Method("mbs").parts.model_copy(update=dict(feature_distillation="none", orthogonality=False))


def literal(z, old, target, size, weight=25., threshold=.7):
    "As the formulas read: everything at full size, one class after the other."
    n_old, n = old.shape[1], z.shape[1]
    logits, teacher = (F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in (z, old))
    q = teacher.softmax(1)
    sure, best = q.max(1)
    labels = torch.where((target == 0) & (best > 0) & (sure >= threshold), best, target)
    labels = torch.where((labels == 0) & (q[:, 0] < q[:, 1:].sum(1)), 255, labels)
    entropy = F.cross_entropy(logits, labels, ignore_index=255)
    targets = []
    for c in range(n):
        if c == 0: targets.append(torch.where((target >= n_old) & (target != 255), 0, q[:, 0]))
        elif c < n_old: targets.append(q[:, c])
        else: targets.append(torch.where(target == c, q[:, 0], 0))
    return entropy - weight * (torch.stack(targets, 1) * logits.log_softmax(1)).mean()


def composed(z, old, target, size):
    student, teacher = (SegmenterOutput(F.interpolate(x, size=size, mode="bilinear", align_corners=False), x, None, None, None) for x in (z, old))
    terms, _ = full_terms(student, teacher, target, PARTS, 1, None)
    return sum(terms.values())


def banded(z, old, target, size):
    student, teacher = (SegmenterOutput(None, x, None, None, None, size, size) for x in (z, old))
    return step_loss(student, teacher, target, PARTS, 1)["loss"]


def peak_memory(way, *given):
    "Largest sum of tensors made on the way, MiB."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: way(*given).backward()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]": now += event.nbytes(); most = max(most, now)
    return most / 2**20


def main(repeats=5, side=512):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), medians of {repeats} interleaved runs, seconds and MiB; ratios to the literal way")
    for n in (21, 151):
        torch.manual_seed(0)
        z, old = (2 * torch.randn(1, n, side // 16, side // 16)).requires_grad_(), 2 * torch.randn(1, n - 1, side // 16, side // 16)
        target = torch.zeros(1, side, side, dtype=torch.long)
        target[:, 100:300, 100:300] = n - 1
        ways, times, values = dict(literal=literal, composed=composed, bands=banded), {}, {}
        for _ in range(repeats):
            for name, way in ways.items():
                z.grad = None
                began = time.perf_counter()
                loss = way(z, old, target, (side, side))
                loss.backward()
                times.setdefault(name, []).append(time.perf_counter() - began)
                values[name] = loss.item(), z.grad.clone()
        for name in ways: torch.testing.assert_close(values[name], values["literal"], rtol=1e-4, atol=1e-6)
        memory = {name: peak_memory(way, z, old, target, (side, side)) for name, way in ways.items()}
        for name in ways:
            ratios = sorted(a / b for a, b in zip(times["literal"], times[name]))
            print(f"{n:4} classes  {name:9} {statistics.median(times[name]):7.3f} s  × {statistics.median(ratios):5.1f} ({ratios[0]:.1f} … {ratios[-1]:.1f})  "
                  f"{memory[name]:7.0f} MiB  1/{memory['literal'] / memory[name]:.1f}")


if __name__ == "__main__": main(*map(int, sys.argv[1:2]))
