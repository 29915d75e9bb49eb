"""Iterations in absolute numbers: ViT-B/16 at 512 × 512 pixels, random weights, of VOC 15-5 and ADE20K 100-50.

The base step and the incremental step; on a GPU also the shares of its peaks.

python benchmarks/full_size.py [--batch 1] [--repeats 3] [--compile]
"""

import argparse
import statistics

import torch
from interleaved import peak, seconds
from step import VITB, Ours, make_step, networks, pictures
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mbs.recipe import make_recipe
from mbs.setup import make_accelerator

TASKS = {"VOC 15-5": (16, 5), "ADE20K 100-50": (101, 50)}  # channels of the base step, new classes
GPUS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12),
}  # bf16 FLOP/s without sparsity, bytes/s of the SXM boards


class Traffic(TorchDispatchMode):
    "Counts the bytes that operations read and write when each goes to memory; views move nothing."

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.moved += sum(
                x.numel() * x.element_size()
                for x in torch.utils._pytree.tree_leaves((args, kwargs, out))
                if isinstance(x, torch.Tensor)
            )
        return out


def iteration(n_base, n_new, incremental, batch, encoder=VITB, side=512, compile=False, **options):
    "One iteration a call: of the base step, or of the step after it."
    device = make_accelerator(make_recipe()).device
    teacher, student = networks(encoder, n_base + n_new, n_new, side, device, **options)
    step = make_step(n_base + n_new, n_new)
    if not incremental:
        student, teacher = teacher.requires_grad_().train(), None
        step = step.protocol[0]
    given = pictures(student.n_channels, step.n_new, side, batch, device)
    return Ours(student, teacher, given, step, compile=compile)


def fits(batch, *given):
    "Whether an iteration of `batch` pictures fits into the GPU's memory."
    try:
        iteration(*given, batch)()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def largest_batch(*given):
    "Pictures that fit, to the nearest eighth."
    low = 1
    while fits(2 * low, *given):
        low *= 2
    for part in (low // 2, low // 4, low // 8):
        if part and fits(low + part, *given):
            low += part
    return low


def shares(flops, moved, spent):
    "Of the GPU's bf16 peak and memory bandwidth; None for others than those in `GPUS`."
    peaks = next(
        (v for name, v in GPUS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()), None
    )
    return (flops / spent / peaks[0], moved / spent / peaks[1]) if peaks else None


def absolute(task, incremental, batch, repeats, compile=False, **network):
    "Measure an iteration: seconds, pictures a second, peak memory (MiB), FLOPs, bytes, and their shares of the peaks."
    n_base, n_new = TASKS[task]
    step = iteration(n_base, n_new, incremental, batch, **network)
    with FlopCounterMode(display=False) as counter:
        step()
    with Traffic() as traffic:
        step()
    memory = peak(step)
    if compile:
        step = iteration(n_base, n_new, incremental, batch, compile=True, **network)
        step(), step()
    spent = statistics.median(seconds(step) for _ in range(repeats))
    flops = counter.get_total_flops()
    return dict(
        task=task,
        step="incremental" if incremental else "base",
        batch=batch,
        compile=compile,
        seconds=spent,
        pictures=batch / spent,
        memory=memory,
        flops=flops,
        moved=traffic.moved,
        shares=shares(flops, traffic.moved, spent),
    )


def profile_table(task, batch, **network):
    "Where an incremental iteration's time goes: the ten kernels of the GPU, or operations of a CPU, that take most."
    step = iteration(*TASKS[task], True, batch, **network)
    step(), step()
    has_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * has_gpu]) as record:
        step()
        if has_gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if has_gpu else "self_cpu_time_total"
    return record.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60)


COLUMNS = ("task", "step", "batch", "compiled", "ms", "pictures/s", "of the bf16 peak", "of the memory bandwidth")
HEAD = f"| {' | '.join(COLUMNS)} | memory, GiB |\n|---|---|---:|---|---:|---:|---:|---:|---:|\n"


def line(r):
    compute, memory = (f"{x:.0%}" for x in r["shares"]) if r["shares"] else ("", "")
    if r["compile"]:
        memory = ""  # fused operations do not go to memory one by one
    speed = f"{1000 * r['seconds']:.1f} | {r['pictures']:.2f}"
    compiled = "yes" if r["compile"] else "no"
    gib = f"{r['memory'] / 1024:.1f}"
    return f"| {r['task']} | {r['step']} | {r['batch']} | {compiled} | {speed} | {compute} | {memory} | {gib} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = make_accelerator(make_recipe()).device
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.repeats}")
    print("bytes as if all operations went to memory")
    print("\n" + HEAD, end="")
    for task in TASKS:
        for incremental in (False, True):
            print(line(absolute(task, incremental, options.batch, options.repeats, options.compile)), flush=True)


if __name__ == "__main__":
    main()
