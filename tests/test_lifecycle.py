"The stages of a method: each has an effect, and a run that was stopped continues as if it had not been."

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from steps import make_step
from torch.nn import functional as F

from mbs.diagnosis import _find_unsure_teacher
from mbs.experiment import Experiment
from mbs.lifeline import Interrupted
from mbs.methods import Method, fuse_weights
from mbs.parts import METHODS, Parts
from mbs.recipe import Recipe
from mbs.run import load_run
from mbs.segmenter import Segmenter
from mbs.settings import Settings
from mbs.training import choose_rates, make_optimizer
from mbs.weights import make_encoder

SHORT = dict(
    protocol="6-2",
    scenes=dict(n_train=40, n_test=8, size=32),
    samples=1,
    training=dict(crop=32, batch=8, iterations=20, new_iterations=30, optimizer="adamw"),
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


def make_network(groups):
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    return Segmenter(encoder, groups)


def weights(run, step):
    return load_file(run.step_path(step, "model.safetensors"))


def train(home, name, kind=Method, **settings):
    return Experiment(Settings(name=name, **SHORT | settings), home / "outputs", kind).run()


class Remembering(Method):
    "Keeps a running mean of its loss, weighs the loss by it, and counts pixels of each class when a step ends."

    def loss(self, student, teacher, target, step):
        terms = super().loss(student, teacher, target, step)
        mean = self.state.get("mean", terms["loss"].detach())
        self.state["mean"] = 0.9 * mean + 0.1 * terms["loss"].detach()
        return terms | dict(loss=terms["loss"] / self.state["mean"].clamp(min=1e-3))

    def finish(self, student, previous, batches, step):
        counts = sum(F.one_hot(y.clamp(max=step.n_channels), step.n_channels + 1).sum((0, 1, 2)) for _, y in batches)
        before = self.state.get("counts", torch.zeros(1))
        self.state["counts"] = torch.cat([before, counts[step.n_old : step.n_channels].float()])


def test_state_is_kept_with_each_step_and_resumed_exactly(home):
    whole = train(home, "whole", Remembering, method="finetune", share_base=False)
    assert whole.method_state(0)["counts"].shape == (7,) and whole.method_state(1)["counts"].shape == (9,)
    assert (whole.method_state(1)["counts"][:7] == whole.method_state(0)["counts"]).all()

    class Stopped(Remembering):
        def loss(self, student, teacher, target, step):
            self.calls = getattr(self, "calls", 0) + 1
            if step.number == 1 and self.calls == 20 + 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(student, teacher, target, step)

    with pytest.raises(Interrupted):
        train(home, "stopped", Stopped, method="finetune", share_base=False)
    stopped = load_run(home / "outputs/stopped")
    assert stopped.n_steps == 1 and any((stopped.folder / "resume").glob("*.safetensors"))
    resumed = train(home, "stopped", Remembering, method="finetune", share_base=False)
    for step in (0, 1):
        mine, theirs = resumed.method_state(step), whole.method_state(step)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        mine, theirs = weights(resumed, step), weights(whole, step)
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_state_comes_with_a_shared_base_step(home):
    first = train(home, "first", Remembering, method="finetune")
    second = train(home, "second", Remembering, method="kd")
    assert second.metrics(0)["base_from"] == "first"
    assert all(torch.equal(v, second.method_state(0)[k]) for k, v in first.method_state(0).items())
    assert len(second.method_state(1)["counts"]) == 9


def test_a_damaged_state_is_named(home):
    run = train(home, "run", Remembering, method="finetune")
    run.step_path(1, "method.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"method\.safetensors is of another version or damaged"):
        run.method_state(1)
    assert train(home, "plain", method="finetune").method_state(1) == {}


def test_rates_multiply_those_of_the_recipe():
    student, step = make_network([1, 2, 1]), make_step(3, 1)

    class Slow(Method):
        def rate(self, parameter, step):
            return 0.5 if "mask_norm" in parameter else super().rate(parameter, step)

    recipe = Recipe(encoder_factor=(1, 0.1), token_factor=10)
    rates = choose_rates(student, Slow("finetune"), recipe, step)
    assert set(rates) == {name for name, _ in student.named_parameters()}
    assert rates["decoder.mask_norm.bias.2"] == 5 and rates["decoder.mask_norm.bias.1"] == 0.5
    assert rates["decoder.class_tokens.2"] == 10 and rates["decoder.class_tokens.0"] == 1
    assert {rate for name, rate in rates.items() if name.startswith("encoder.")} == {0.1}
    groups = make_optimizer(student, Slow("finetune"), recipe, step).param_groups
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert sorted(group["factor"] for group in groups) == [0.1, 0.5, 1, 5, 10]


def test_something_must_learn():
    class Resting(Method):
        def rate(self, parameter, step):
            return 0

    with pytest.raises(ValueError, match="no parameter learns in step 1: expected at least one"):
        make_optimizer(make_network([1, 2, 1]), Resting("finetune"), Recipe(), make_step(3, 1))


def test_with_tokens_alone_everything_else_rests_to_the_bit(home):
    run = train(home, "tokens", method="finetune", parts=dict(learns="tokens"))
    before, after = weights(run, 0), weights(run, 1)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    new = {name for name in after if name not in before}
    assert new == {"decoder.class_tokens.2", "decoder.mask_norm.weight.2", "decoder.mask_norm.bias.2"}
    assert (after["decoder.mask_norm.weight.2"] != 1).any() and (after["decoder.mask_norm.bias.2"] != 0).any()


def test_fused_weights_are_the_mean():
    "θ = (1 − α) θ_old + α θ_new with α = √(n / N), entry by entry; what only the student has stays."
    torch.manual_seed(0)
    previous = make_network([1, 2])
    student = previous.frozen().grow(1)
    for p in student.parameters():
        p.data += torch.randn_like(p)
    learnt = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    fuse_weights(student, previous, make_step(3, 1))
    share, old = (1 / 4) ** 0.5, previous.state_dict()
    for name, tensor in student.state_dict().items():
        if name not in old:
            assert torch.equal(tensor, learnt[name])
        else:
            torch.testing.assert_close(tensor, (1 - share) * old[name] + share * learnt[name])


def test_a_run_fuses_what_it_trained(home):
    "The run with fusion ends with the mean of its base step and of the run without; the next step starts there."
    plain = train(home, "plain", method="mib", protocol="4-2")
    fused = train(home, "fused", method="mib", protocol="4-2", parts=dict(weight_fusion=True))
    base, learnt, found = weights(plain, 0), weights(plain, 1), weights(fused, 1)
    share = (2 / 7) ** 0.5
    for name, tensor in found.items():
        expected = (1 - share) * base[name] + share * learnt[name] if name in base else learnt[name]
        torch.testing.assert_close(tensor, expected)
    assert not torch.equal(weights(fused, 2)["decoder.class_tokens.2"], weights(plain, 2)["decoder.class_tokens.2"])


class Stubborn(Method):
    "Predicts channel 1 everywhere."

    def decide(self, output, tokens):
        logits = output.patch_logits.clone()
        logits[:, 1] += 1e3
        return output._replace(patch_logits=logits)


@pytest.mark.parametrize("method", ["finetune", "mbs-analytic"])
def test_a_method_decides_what_is_predicted(home, method):
    run, plain = train(home, "stubborn", Stubborn, method=method), train(home, "plain", method=method)
    for step in (0, 1):
        counts = run.confusion(step).counts
        assert counts[:, 1].sum() == counts.sum() > 0 and (run.samples()[0].predictions[step] == 1).all()
    assert all(torch.equal(tensor, weights(run, 1)[name]) for name, tensor in weights(plain, 1).items())
    assert plain.confusion(1).counts[:, 0].sum() > 0


def test_a_sigmoid_head_trains_and_refuses_what_needs_a_softmax(home, monkeypatch):
    monkeypatch.setitem(METHODS, "binary", Parts(head="sigmoid", pseudo_labels=True, weight_transfer=True))
    run = train(home, "binary", method="binary")
    model = run.model()
    assert model.head == "sigmoid" and run.finished
    output = model(torch.randn(1, 3, 32, 32))
    assert torch.equal(output.probabilities, output.logits.sigmoid())
    soft = train(home, "soft", method="finetune")
    assert "base_from" not in soft.metrics(0), "the base step of another head was taken over"
    for part in (dict(identity="analytic"), dict(output_distillation="plain"), dict(pseudo_labels="entropy")):
        with pytest.raises(ValueError, match=r"parts\.head=sigmoid does not go with parts"):
            Method("binary", "voc", **part)


@pytest.mark.parametrize("parts", [dict(head="sigmoid", pseudo_labels=True), dict(pseudo_labels="entropy")])
def test_a_teacher_without_a_bound_gets_a_whole_sentence(home, monkeypatch, parts):
    monkeypatch.setitem(METHODS, "unsure", Parts(**parts))
    run = train(home, "unsure", method="unsure")
    monkeypatch.setattr(type(run), "metrics", lambda self, step=-1: dict(pseudo_labels=dict(recall=0.0)))
    (finding,) = _find_unsure_teacher(run, 1)
    lower = "lower parts.threshold (now 0.7) or " if parts["pseudo_labels"] is True else ""
    assert finding.text == f"the teacher relabels 0.0 % of the hidden old pixels; {lower}train the step before longer"
