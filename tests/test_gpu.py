"""The GPU path gives the numbers of the CPU: losses, gradients, compiled steps, resumed runs, tests.

Without a GPU these tests are skipped; with MBS_REHEARSE=1 they run on a CPU, to try the tests themselves."""

import os

import numpy as np
import pytest
import torch
from test_step import RUN, STEP, TRAINING, make_batch, make_networks, train

from mbs.evaluation import evaluate
from mbs.experiment import Experiment
from mbs.methods import Method
from mbs.parts import METHODS
from mbs.recipe import make_recipe
from mbs.run import load_run, trained_run
from mbs.settings import Settings
from mbs.setup import Setup, make_accelerator, make_test_view
from mbs.training import Training, run_teacher

make_test_view.__test__ = False
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or os.environ.get("MBS_REHEARSE")), reason="no GPU; MBS_REHEARSE=1 uses a CPU"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def measure_step(name, device, dtype, is_full=False):
    "Loss terms and gradients of one incremental step, from full-size logits with `is_full`."
    method = Method(name)
    method.found = dict(thresholds=[0.5, 0.5, 0.5], similar_votes=[[0, 1, 0], [0, 1, 2]])
    teacher, student = (network.to(device, dtype) for network in make_networks(method))
    images, labels = make_batch(device)
    outputs = [student(images.to(dtype)), run_teacher(teacher, images.to(dtype))]
    if is_full:
        outputs = [output._replace(full=output.logits) for output in outputs]
    terms = method.loss(*outputs, labels, STEP)
    terms["loss"].backward()
    gradients = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    return {k: v.detach().double().cpu() for k, v in (terms | gradients).items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_float32_is_that_of_the_cpu_in_float64(name):
    expected, found = (
        measure_step(name, "cpu", torch.float64),
        measure_step(name, make_accelerator(make_recipe()).device, torch.float32),
    )
    assert found.keys() == expected.keys()
    for k, value in expected.items():
        torch.testing.assert_close(found[k], value, rtol=1e-3, atol=1e-4, msg=lambda text, k=k: f"{k}: {text}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision):
    "Losses of three iterations, each of which depends on the gradients before it; fp16 goes through its scaler."
    choices = {} if torch.cuda.is_available() else dict(cpu_precision="bf16")
    exact, _ = train("mbs", precision="fp32")
    found, _ = train("mbs", precision=precision, **choices)
    for a, b in zip(exact, found):
        torch.testing.assert_close(b["loss"], a["loss"], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", ["mbs", "kd", "finetune"])
def test_bands_are_the_plain_losses(name):
    "On the device: those of full-size logits, which bands cannot use."
    device = make_accelerator(make_recipe()).device
    expected, found = (measure_step(name, device, torch.float32, is_full) for is_full in (True, False))
    for k, value in expected.items():
        torch.testing.assert_close(found[k], value, rtol=1e-3, atol=1e-5, msg=lambda text, k=k: f"{k}: {text}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU's compiled steps are in test_step.py")
def test_a_compiled_step_is_the_eager_one():
    plain, _ = train("mbs", precision="fp32", compile=False)
    found, _ = train("mbs", precision="fp32", compile=True)
    for a, b in zip(plain, found):
        torch.testing.assert_close(b["loss"], a["loss"], rtol=1e-3, atol=1e-4)


def test_a_run_that_is_resumed_ends_like_one_that_is_not(home):
    "To the bit, with deterministic algorithms; and two runs are alike."
    settings = Settings(name="run", **RUN, save_minutes=0, training=TRAINING | dict(deterministic=True, compile=False))

    class Stopping(Method):
        n = 0

        def loss(self, *given):
            type(self).n += 1
            if type(self).n == 22:
                raise KeyboardInterrupt
            return super().loss(*given)

    with pytest.raises(KeyboardInterrupt):
        Experiment(settings, home / "stopped", method=Stopping).run()
    assert list((home / "stopped/run/resume").glob("*"))
    ends = [Experiment(settings, home / folder).run().model().state_dict() for folder in ("stopped", "a", "b")]
    for state in ends[1:]:
        assert all(torch.equal(value, state[name]) for name, value in ends[0].items())
    assert load_run(home / "stopped/run").finished


def test_memory_stays_flat():
    "What is allocated after thirty iterations is what was allocated after ten."
    method = Method("mbs")
    teacher, student = make_networks(method)
    training = Training(student, teacher, method, STEP, make_recipe(lr=1e-3), total=1000)
    batch, found = make_batch(training.device), []
    for _ in range(3):
        training.run([batch] * 10)
        found.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    assert found[2] == found[1]


def test_a_test_counts_the_pixels_of_the_cpu():
    "Up to one pixel in a thousand, where two classes are equally likely."
    run = trained_run()
    setup, model = Setup(run.settings), run.model()
    view = make_test_view(setup.test, run.protocol[0], run.card.normalisation, setup.recipe, positions=np.arange(8))
    device = make_accelerator(setup.recipe).device
    expected = evaluate(model, view, device="cpu").counts
    found = evaluate(model.to(device), view, device=device).counts
    assert np.abs(found - expected).sum() <= 2e-3 * expected.sum()
