"""One full-size training iteration: ViT-B/16, 512 × 512 pixels, random weights; the base step of VOC 15-1, and step 1 with MBS and its teacher.

    python benchmarks/full_size.py [--batch 1] [--repeats 3]
"""
import argparse
import platform
import resource
import statistics
import time

import torch

from mbs.methods import Method
from mbs.segmenter import Segmenter, make_encoder
from mbs.training import make_accelerator, make_recipe


def iteration(student, teacher, images, labels, n_new, accelerator):
    "Seconds of the forward passes with the loss, and of the backward pass; the loss."
    def now():
        if accelerator.device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter()
    start = now()
    with accelerator.autocast():
        with torch.no_grad(): old = teacher(images) if teacher is not None else None
        loss = Method("mbs").loss(student(images), old, labels, n_new)["loss"]
    middle = now()
    accelerator.backward(loss)
    end = now()
    student.zero_grad(set_to_none=True)
    return middle - start, end - middle, loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    accelerator = make_accelerator(make_recipe())
    student = Segmenter(make_encoder("vit_base_patch16_384"), [1, 15])
    print(f"{platform.processor() or platform.machine()}, {accelerator.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, precision {accelerator.mixed_precision}, "
          f"batch {options.batch}, {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters; medians of {options.repeats}")
    images = torch.randn(options.batch, 3, 512, 512, device=accelerator.device)
    for step, n_new in ((0, 15), (1, 1)):
        teacher = student.frozen().to(accelerator.device) if step else None
        if step: student.grow(n_new)
        student = student.to(accelerator.device).train()
        labels = torch.randint(0, 1 + n_new, (options.batch, 512, 512), device=accelerator.device)
        labels = torch.where(labels > 0, labels + student.n_channels - 1 - n_new, 0)
        runs = [iteration(student, teacher, images, labels, n_new, accelerator) for _ in range(1 + options.repeats)][1:]
        forward, backward = (statistics.median(run[k] for run in runs) for k in (0, 1))
        memory = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"step {step}: forward and loss {forward:.2f} s, backward {backward:.2f} s, peak memory so far {memory:.1f} GiB, loss {runs[-1][2]:.3f}")


if __name__ == "__main__": main()
