"The benchmarks run at tiny sizes, and all implementations that they compare give the same numbers."

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NETWORK = dict(encoder="vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2)


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(FOLDER))]:
        del sys.modules[name]  # their names are as common as `step`


def is_row(r):
    assert (
        {"what", "baseline", "ours", "ratio", "low", "high", "unit"} <= r.keys()
        and r["low"] <= r["ratio"] <= r["high"]
        and min(r["baseline"], r["ours"], *r["memory"]) > 0
    )
    return True


@pytest.mark.parametrize(
    "part,sizes,n",
    [
        ("objective", dict(side=64, classes=(5, 9)), 2),
        ("attention", dict(tokens=33, heads=2, width=8), 1),
        ("evaluation", dict(side=64, classes=(5,), batch=2), 4),
        ("step", dict(side=64, classes=(5,), **NETWORK), 3),
    ],
)
def test_all_ways_agree(part, sizes, n):
    "`measure` compares all implementations before it returns."
    found = __import__(part).measure(2, **sizes)
    assert len(found) == n and all(map(is_row, found))


@pytest.mark.parametrize(
    "part,name,wrong",
    [
        ("objective", "pixel_losses", lambda z, old, target: (1.001 * z.square().mean(), None)),
        ("attention", "attention", lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    ],
)
def test_ways_that_differ_are_refused(part, name, wrong, monkeypatch):
    import plain

    monkeypatch.setattr(plain, name, wrong)
    with pytest.raises(AssertionError, match="is not what plain gives"):
        __import__(part).measure(1, **dict(objective=dict(side=64, classes=(5,)), attention=dict(tokens=33))[part])


def test_plain_evaluation_is_that_of_the_released_program():
    "The channel of the largest value comes from `max`: on a CPU `argmax` would make the baseline slower than it is."
    import plain
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        plain.confusion(torch.randn(1, 5, 4, 4), torch.zeros(1, 64, 64, dtype=torch.long))
    called = {event.key for event in record.key_averages()}
    assert "aten::max" in called and "aten::argmax" not in called


def test_absolute_numbers():
    "Arithmetic and traffic of an iteration grow with the batch; shares of the peaks need a known GPU."
    import full_size

    one, two = (full_size.absolute("VOC 15-5", True, batch, 1, side=64, **NETWORK) for batch in (1, 2))
    assert 1.8 < two["flops"] / one["flops"] < 2.2 and two["moved"] > one["moved"] and one["shares"] is None
    assert full_size.line(one).count("|") == full_size.HEAD.splitlines()[0].count("|")


def test_results_are_written(tmp_path, monkeypatch):
    "The file names measurements and machine; without a GPU its rows stay empty."
    import run
    import torch

    measure = __import__("attention").measure
    monkeypatch.setattr("attention.measure", lambda repeats: measure(repeats, tokens=33))
    run.main(["--repeats", "1", "--only", "attention", "--out", str(tmp_path / "RESULTS.md")])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| attention, 33 tokens |" in text and torch.__version__ in text and str(FOLDER) not in text
    if not torch.cuda.is_available():
        assert "No GPU was available" in text and text.count("| 16 | yes |  |  |  |  |  |") == 4


def test_without_a_part_all_are_measured_on_a_gpu(monkeypatch, tmp_path):
    gpu = __import__("gpu")
    for name in gpu.PARTS:
        monkeypatch.setitem(gpu.PARTS, name, lambda size: "measured")
    for words, names in [([], list(gpu.PARTS)), (["floor"], ["floor"])]:
        assert gpu.main([*words, "--rehearse", f"--out={tmp_path / 'GPU.md'}"]) == 0
        text = (tmp_path / "GPU.md").read_text(encoding="utf-8")
        assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == names
