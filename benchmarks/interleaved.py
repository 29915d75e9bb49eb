"""How everything here is measured: in one process, the ways one after the other, again and again; what counts is each round's ratio."""

import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(way):
    "What one call costs: on a CPU the processor time of this process, which others on the machine do not change; on a GPU the time until it is done."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        begun = time.perf_counter()
        way()
        torch.cuda.synchronize()
        return time.perf_counter() - begun
    begun = time.process_time()
    way()
    return time.process_time() - begun


def rounds(ways, repeats):
    "Seconds of every way, by name, in `repeats` interleaved rounds. Call each way once before: first calls allocate and compile."
    spent = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: [one[name] for one in spent] for name in ways}


def row(what, spent, ours, baseline="plain", unit="s", **more):
    "Medians of both, and the median, lowest and highest ratio of a round."
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
    "Most memory at once of the tensors that a call makes, MiB."
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        way()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def same(found, rtol=1e-4, atol=1e-6):
    "AssertionError unless all ways give the numbers of the first."
    (first, want), *others = found.items()
    for name, got in others:
        torch.testing.assert_close(
            got, want, rtol=rtol, atol=atol, msg=lambda m: f"{name} is not what {first} gives: {m}"
        )
