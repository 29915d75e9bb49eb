"""Measure implementations in interleaved rounds in one process; the result is the ratio of each round."""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(way):
    """Measure the seconds of one call of `way`.

    On a CPU this is the processor time of this process, which other programs on the machine hardly change; on a GPU it
    is the time until the call is complete.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    way()
    return time.process_time() - began


def rounds(ways, repeats):
    "Measure the seconds of each of `ways` in `repeats` rounds; call each once before, so that it has compiled."
    measured = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            measured[name].append(seconds(way))
    return measured


def row(what, spent, ours, baseline="plain", unit="s", **more):
    "Make a row of results: medians of both, and the median, lowest and highest ratio of a round."
    ratios = sorted(b / o for b, o in zip(spent[baseline], spent[ours]))
    return dict(
        what=what,
        baseline=statistics.median(spent[baseline]),
        ours=statistics.median(spent[ours]),
        ratio=statistics.median(ratios),
        low=ratios[0],
        high=ratios[-1],
        unit=unit,
        **more,
    )


def peak(way):
    "Measure the peak memory of the tensors that one call of `way` allocates, MiB."
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_on_cpu(way) / 2**20


def peak_on_cpu(way):
    "Measure the peak memory of the CPU tensors that one call of `way` allocates, bytes."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        way()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def same(found, rtol=1e-4, atol=1e-6):
    "Raise AssertionError unless all implementations give the numbers of the first."
    (first, expected), *others = found.items()
    for name, got in others:

        def explain(message, name=name):
            return f"{name} is not what {first} gives: {message}"

        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=explain)
