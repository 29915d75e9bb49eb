"Diagnosis: each finding on a constructed run that suffers from it, and none on a healthy run."

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mbs import Experiment, Settings, diagnose, trained_run
from mbs.diagnosis import bound_probability, diagnose_step
from mbs.label_quality import describe_labels
from mbs.run import Run
from mbs.segmenter import MaskNorm
from mbs.setup import Setup


@pytest.fixture
def healthy(tmp_path):
    "A copy of the trained run of `mbs`."
    shutil.copytree(trained_run("mbs").folder, tmp_path / "run")
    return tmp_path / "run"


def change_metrics(folder, step, **facts):
    "Replace fields of the metrics of a step."
    path = folder / f"step-{step:02d}/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def change_log(folder, step, values, **more):
    "Replace the records of a step by records with these values of the cross-entropy."
    path = folder / "log.jsonl"
    records = [r for r in map(json.loads, path.read_text().splitlines()) if r["step"] != step]
    total = 10 * len(values)
    records += [
        dict(step=step, iteration=10 * k + 10, iterations=total, loss=v, cross_entropy=v) | more
        for k, v in enumerate(values)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda r: r["step"])))


def change_counts(folder, step, change):
    "Apply `change` to the confusion matrix of a step."
    path = folder / f"step-{step:02d}/confusion.npz"
    with np.load(path) as arrays:
        counts = arrays["counts"].copy()
    change(counts)
    np.savez(path, counts=counts)


def call_background(channel):
    "Return a change that predicts all pixels of a channel as background."

    def change(counts):
        counts[channel, 0] += counts[channel, 1:].sum()
        counts[channel, 1:] = 0

    return change


def find(folder, step):
    "Return the kinds of the findings of a step, and their text."
    found = diagnose_step(Run(folder), step)
    return Counter(f.kind for f in found), " ".join(map(str, found))


def test_a_healthy_run_has_no_finding(healthy):
    assert diagnose(Run(healthy)) == []


def test_a_loss_that_rises_again_is_found_in_every_step(healthy):
    for step in (0, 2):
        change_log(healthy, step, [1, 0.5, 0.3, 0.4, 0.9])
        kinds, text = find(healthy, step)
        assert kinds == {"cross-entropy rose": 1} and ("training.lr_factor" if step else "training.lr") in text


@pytest.mark.parametrize("values, kind", [([1] * 10, "did not fall"), ([1, 0.8, 0.6, 0.5, 0.3], "too soon")])
def test_a_flat_or_falling_loss_counts_where_something_was_not_learnt(healthy, values, kind):
    change_log(healthy, 0, values)
    change_log(healthy, 2, values)
    assert kind in find(healthy, 0)[1] + next(iter(find(healthy, 0)[0]))
    assert find(healthy, 2)[0] == {}
    change_counts(healthy, 2, call_background(7))
    kinds, text = find(healthy, 2)
    assert len(kinds) == 2 and any(kind in name for name in kinds) and "training.new_iterations" in text


def test_a_few_records_say_nothing_about_the_course(healthy):
    change_log(healthy, 0, [1, 2, 3, 4])
    assert find(healthy, 0)[0] == {}


def test_a_class_that_was_not_learnt_is_named_with_what_it_became(healthy):
    change_counts(healthy, 2, call_background(7))
    kinds, text = find(healthy, 2)
    run = Run(healthy)
    assert kinds == {"class not learnt": 1}
    assert f"{run.names[7]} was not learnt: IoU 0 %" in text
    assert "100 % of its pixels are predicted as background" in text
    assert "training.lr_factor (now 0.3)" in text


def test_classes_that_a_step_forgets_are_named_once(healthy):
    for step in (2, 3):
        change_counts(healthy, step, call_background(1))
        change_counts(healthy, step, call_background(2))
    kinds, text = find(healthy, 2)
    run = Run(healthy)
    assert kinds == {"classes forgotten": 1} and f"{run.names[1]}, {run.names[2]} forgotten" in text
    assert "parts.output_weight" in text
    assert find(healthy, 3)[0] == {}


def test_skipped_iterations_are_counted(healthy):
    change_log(healthy, 0, [1, 0.9, 0.8, 0.75, 0.7], left_out=1)
    path = healthy / "run.json"
    card = json.loads(path.read_text())
    card["iterations"][0] = 50
    path.write_text(json.dumps(card))
    kinds, text = find(healthy, 0)
    assert kinds == {"skipped iterations": 1} and "10 % of the iterations" in text


def test_a_teacher_below_its_threshold_is_found_with_its_highest_probability(healthy):
    quality = Run(healthy).metrics(2)["pseudo_labels"]
    change_metrics(healthy, 2, pseudo_labels=quality | dict(recall=0.0))
    kinds, text = find(healthy, 2)
    assert kinds == {"unsure teacher": 1} and "parts.threshold (now 0.7)" in text
    path = healthy / "step-01/model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "mask_norm" in name:
            tensor.fill_(float("weight" in name))
    save_file(tensors, path)
    assert "about 0.701 at most" in find(healthy, 2)[1]  # 7 channels


@pytest.mark.parametrize("n", [2, 3, 7, 21])
def test_no_picture_gives_a_higher_probability_than_the_bound(n):
    generator = torch.Generator().manual_seed(n)
    norm = MaskNorm([1, n - 1])
    cosines = torch.rand(20_000, n, generator=generator) * 2 - 1
    highest = norm(cosines).softmax(1).amax(0)
    bound = bound_probability(torch.ones(n), torch.zeros(n))
    alone = norm(torch.eye(n)).softmax(1).diag()
    assert (highest <= bound + 1e-4).all()
    torch.testing.assert_close(alone, bound, atol=1e-4, rtol=0)


def test_labels_that_are_mostly_left_out_are_found(healthy):
    quality = Run(healthy).metrics(2)["pseudo_labels"]
    change_metrics(healthy, 2, pseudo_labels=quality | dict(ignored=0.6), labels=dict(void=0.7, pictures=[20]))
    kinds, text = find(healthy, 2)
    assert kinds == {"most pixels ignored": 2} and "parts.ignore_uncertain" in text and "70 %" in text


def test_missing_background_rare_classes_and_untested_classes_are_found(healthy):
    change_metrics(healthy, 2, labels=dict(void=0.0, background=0.0, pictures=[3]))
    change_counts(healthy, 2, lambda counts: counts[7].fill(0))
    kinds, text = find(healthy, 2)
    assert kinds == {"no background": 1, "few pictures": 2}
    assert "is in 3 training pictures" in text and "no pixel in the test part" in text


def test_facts_about_labels_are_those_of_the_masks():
    setup = Setup(Settings(protocol="5-1", setting="disjoint", scenes=dict(n_train=40, n_test=4, size=32, seed=3)))
    for step in setup.protocol:
        masks = np.stack([setup.train[i][1] for i in setup.positions[step.number]])
        facts = describe_labels(setup, step)
        assert facts["pictures"] == [int((masks == c).any((1, 2)).sum()) for c in step.classes]
        assert facts["void"] == pytest.approx((masks == 255).mean())
        assert facts["background"] == pytest.approx((masks[masks != 255] == 0).mean())


def test_findings_are_logged_after_their_step(tmp_path, caplog):
    settings = Settings(name="short", samples=0, scenes=dict(n_train=20, n_test=5, size=32))
    with caplog.at_level(logging.WARNING, "mbs.experiment"):
        steps = Experiment(settings, tmp_path).steps()
        next(steps)
        assert not any("step 1" in record.message for record in caplog.records)
        next(steps)
        steps.close()
    run = Run(tmp_path / "short")
    found = [str(f) for f in diagnose(run)]
    assert found and [record.message for record in caplog.records] == [f"short, {text}" for text in found]
    assert run.metrics(1)["labels"].keys() == {"pictures", "void", "background"}


def test_every_threshold_is_in_the_table_of_the_module():
    import mbs.diagnosis as module

    names = [name for name in vars(module) if name.isupper() and name[0] != "_"]
    assert len(names) == 10 and all(f"`{name}`" in module.__doc__ for name in names)
    source = Path(module.__file__).read_text()
    kinds = {line.split('"')[1] for line in source.splitlines() if "Finding(step, " in line and '"' in line}
    assert all(f"| {kind} " in module.__doc__ for kind in kinds)
