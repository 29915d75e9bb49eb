"Memory of exemplars: which are kept, what their labels hide in every setting, batches, resume, processes, reports."

import json
import random
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from mbs.augment import IMAGENET, TestTransform
from mbs.cli import app
from mbs.comparison import group_runs
from mbs.data import SegmentationFolder, open_data
from mbs.draws import Draws, ExemplarView
from mbs.experiment import Experiment
from mbs.inspect import inspect_steps
from mbs.launch import launch
from mbs.memory import Exemplars, Memory, find_labelled, label_exemplar, select_exemplars
from mbs.methods import Method
from mbs.parameter_files import parse_words
from mbs.protocol import SETTINGS, VOID, Protocol
from mbs.report import write_report
from mbs.run import load_run
from mbs.settings import Settings
from mbs.setup import Setup, trace_parameters
from mbs.views import StepView

NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1), decoder=dict(depth=1), samples=1)
SHORT = dict(crop=24, batch=4, iterations=4, optimizer="adamw", scale=(1, 1))
SCENES = dict(n_train=50, n_test=4, size=32)
TINY = NETWORK | dict(scenes=SCENES, protocol="4-2", training=SHORT)
SELECTIONS = ("random", "balanced", "most-classes", "herding")


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))


def read_weights(run) -> list[dict]:
    return [load_file(run.step_path(t, "model.safetensors")) for t in range(run.n_steps)]


def assert_equal_runs(one, two):
    assert one.finished and two.finished and one.log() == two.log()
    assert [one.exemplars(t).to_lists() for t in range(one.n_steps)] == [
        two.exemplars(t).to_lists() for t in range(two.n_steps)
    ]
    for mine, theirs in zip(read_weights(one), read_weights(two), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# which pictures are kept


@st.composite
def draw_courses(draw):
    "A protocol on four classes, which of up to 30 pictures holds which, and the features of the classes in them."
    split = draw(st.sampled_from(["1-1", "2-1", "2-2", "1-2-1"]))
    protocol = Protocol(split, 4, draw(st.sampled_from(SETTINGS)), draw(st.permutations([1, 2, 3, 4])))
    n, seed = draw(st.integers(0, 30)), draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    index = rng.random((n, 5)) < draw(st.floats(0.1, 0.9))
    memory = Memory(size=draw(st.integers(0, 12)), selection=draw(st.sampled_from(SELECTIONS)))
    return protocol, index, memory, seed, rng.normal(size=(n, 5, 3))


def make_features(vectors, index, positions, step):
    "The features of each labelled class in the pictures at `positions`."
    table = step.channel_table()
    found = {}
    for class_id in range(1, index.shape[1]):
        shown = positions[index[positions, class_id]]
        if table[class_id] and len(shown):
            found[int(table[class_id])] = shown, vectors[shown, class_id]
    return found


def follow(protocol, index, memory, seed, vectors):
    "Yield step, exemplars before and after it, and the positions that it sees."
    kept = Exemplars()
    for step in protocol:
        positions = step.select(index)
        features = make_features(vectors, index, positions, step)
        before, kept = kept, select_exemplars(memory, kept, positions, step, index, seed, features)
        yield step, before, kept, positions


@settings(max_examples=300, deadline=None)
@given(draw_courses())
def test_a_memory_is_full_holds_each_picture_once_and_only_shrinks(course):
    _, _, memory, *_ = course
    seen = set()
    for step, before, after, positions in follow(*course):
        seen |= set(positions.tolist())
        kept = after.positions.tolist()
        assert len(after) == min(memory.size, len(seen)) == len(set(kept))
        old = dict(zip(before.positions.tolist(), before.steps.tolist()))
        for position, own in zip(kept, after.steps.tolist()):
            if position in old:
                assert own == old[position]  # the step in which it entered
            else:
                assert own == step.number and position in positions
    again = [after.to_lists() for *_, after, _ in follow(*course)]
    assert again == [after.to_lists() for *_, after, _ in follow(*course)]


@settings(max_examples=300, deadline=None)
@given(draw_courses())
def test_turns_give_every_class_its_share_as_far_as_it_has_pictures(course):
    protocol, index, memory, *_ = course
    if memory.selection not in ("balanced", "herding"):
        return
    for step, before, after, positions in follow(*course):
        fresh = np.setdiff1d(positions, before.positions)
        own = Exemplars(fresh, np.full(len(fresh), step.number))
        available = sum(find_labelled(part, protocol, index).sum(0) for part in (before, own))
        kept = find_labelled(after, protocol, index).sum(0)
        n_classes = step.n_channels - 1
        assert (kept[:n_classes] >= np.minimum(available[:n_classes], memory.size // n_classes)).all()
        if (index.sum(1) <= 1).all() and len(after) and available[:n_classes].min() >= memory.size:
            assert np.ptp(kept[:n_classes]) <= 1


def test_pictures_of_one_class_each_are_balanced_within_one():
    protocol = Protocol("2-1", 4, "disjoint")
    index = np.eye(5, dtype=bool)[np.repeat([1, 2, 3, 4], 20)]
    memory, kept = Memory(size=10), Exemplars()
    for step, expected in zip(protocol, ([5, 5, 0, 0], [4, 3, 3, 0], [3, 3, 2, 2])):
        kept = select_exemplars(memory, kept, step.select(index), step, index)
        assert find_labelled(kept, protocol, index).sum(0).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(draw_courses(), st.integers(0, 100))
def test_classes_that_a_step_does_not_label_decide_nothing(course, other_seed):
    "With other hidden classes in the same pictures every selection is the same."
    protocol, index, memory, seed, vectors = course
    before, changed_before = Exemplars(), Exemplars()
    labelled = np.zeros_like(index)
    steps = {}
    for step in protocol:
        positions = step.select(index)
        for position in positions.tolist():
            steps.setdefault(position, step)
    for position, step in steps.items():
        labelled[position] = step.channel_table()[: index.shape[1]] > 0
    if any(len(set(step.select(index)) & {p for p, s in steps.items() if s != step}) for step in protocol):
        return  # a picture that two steps see is labelled by both
    noise = np.random.default_rng(other_seed).random(index.shape) < 0.5
    changed = np.where(labelled, index, noise)
    for step in protocol:
        positions = step.select(index)
        features = make_features(vectors, index, positions, step)
        before = select_exemplars(memory, before, positions, step, index, seed, features)
        changed_before = select_exemplars(memory, changed_before, positions, step, changed, seed, features)
        assert before.to_lists() == changed_before.to_lists()


def test_random_exemplars_are_a_uniform_sample_of_all_that_was_seen():
    "Not of the last step, although it has most candidates; herding follows the formula, written out."
    protocol = Protocol("2-1", 3, "disjoint")
    index = np.eye(4, dtype=bool)[[1] * 45 + [2] * 45 + [3] * 10]
    counts = np.zeros(100)
    for seed in range(400):
        kept = Exemplars()
        for step in protocol:
            kept = select_exemplars(Memory(size=10, selection="random"), kept, step.select(index), step, index, seed)
        counts[kept.positions] += 1
    assert counts.sum() == 4000 and abs(counts[:90].sum() / 90 - counts[90:].sum() / 10) < 6


def test_most_classes_come_first_and_herding_follows_its_formula():
    protocol = Protocol("3-1", 4)
    index = np.array([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 0]], bool)
    most = select_exemplars(Memory(size=2, selection="most-classes"), Exemplars(), np.arange(4), protocol[0], index)
    assert most.positions.tolist() == [2, 1]  # picture 0 has two classes, but step 0 labels one of them
    one = Protocol("1-1", 2)[0]
    x = np.random.default_rng(0).normal(size=(9, 4))
    features = {1: (np.arange(9), x)}
    index = np.array([[1, 1, 0]] * 9, bool)
    kept = select_exemplars(Memory(size=5, selection="herding"), Exemplars(), np.arange(9), one, index, 0, features)
    unit, chosen = [v / np.sqrt((v * v).sum()) for v in x], []
    for k in range(1, 6):
        left = [i for i in range(9) if i not in chosen]
        distances = [
            np.linalg.norm(sum(unit) / 9 - (sum((unit[j] for j in chosen), np.zeros(4)) + unit[i]) / k) for i in left
        ]
        chosen.append(left[int(np.argmin(distances))])
    assert kept.positions.tolist() == chosen


# what an exemplar's labels hide


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SETTINGS), st.sampled_from([5, "ade"]), st.permutations([1, 2, 3, 4, 5]), st.integers(0, 10**6))
def test_labels_of_an_exemplar_teach_no_arrived_class_as_background(setting, dataset, order, seed):
    "And they are its own step's, or void, in the settings and on data whose background is not tested."
    protocol = Protocol([2, 1, 1], dataset, setting, order[:4])  # the last class is never taught
    masks = np.random.default_rng(seed).choice([0, *order, VOID], (20, 6))
    index = np.array([[(mask == c).any() for c in range(protocol.n_classes + 1)] for mask in masks])
    for own in protocol:
        for now in list(protocol)[own.number + 1 :]:
            for mask in masks[own.select(index)]:
                check_labels(label_exemplar(mask, own, now), mask, own, now)


def check_labels(labels, mask, own, now):
    "Compare the labels that a picture of step `own` has in step `now` with the truth, pixel by pixel."
    protocol = own.protocol
    has_older = protocol.setting == "sequential"
    allowed = set(range(1 if has_older else own.n_old, own.n_channels))
    hidden = VOID if own.number < now.number else 0  # only a step's own pictures have the background shift
    for class_id, label in zip(mask.ravel().tolist(), labels.ravel().tolist()):
        channel = protocol.order.index(class_id) + 1 if class_id in protocol.order else 0
        if channel in allowed:
            assert label == channel
        elif channel and channel < now.n_channels:
            assert label == hidden
        elif class_id == VOID and protocol.background_tested:
            assert label == VOID
        else:
            assert label in (0, VOID)


@pytest.mark.parametrize("setting", SETTINGS)
def test_background_stays_where_nothing_can_hide(setting):
    protocol = Protocol("2-1", 4, setting)
    kept = {(own.number, now.number): label_exemplar(np.zeros((1, 1), int), own, now)[0, 0] for own in protocol
            for now in protocol if own.number < now.number}  # fmt: skip
    is_void = {pair for pair, label in kept.items() if label == VOID}
    everything, later = {(0, 1), (0, 2), (1, 2)}, {(1, 2)}
    assert is_void == dict(overlapped=everything, partitioned=everything, disjoint=later, sequential=set())[setting]


# batches


@pytest.fixture
def views():
    "The picture view of a step with eight pictures, and exemplars of the step before."
    train, _ = open_data("scenes", dict(n_train=40, n_test=1, size=32, seed=0))
    protocol = Protocol("5-1", 8)
    view = StepView(train, protocol[1], TestTransform(), IMAGENET, positions=np.arange(8))
    return view, lambda n: ExemplarView(view, Exemplars(np.arange(6, 8 + n), np.zeros(2 + n, int)))


def test_draws_without_memory_are_those_of_earlier_versions():
    "Recorded before there was a memory."
    train, _ = open_data("scenes", dict(n_train=12, n_test=1, size=32, seed=0))

    def draw_number(image, labels):
        return round(random.random(), 6)

    view = StepView(train, Protocol("5-1", 8)[0], draw_number, IMAGENET, positions=np.arange(11))
    draws = Draws(view, 4, seed=3)
    recorded = [[9, 7, 0, 2], [1, 4, 6, 10], [7, 4, 10, 1], [2, 5, 9, 0], [7, 0, 1, 4]]
    assert [draws.ids(i) for i in range(5)] == [[train.ids[p] for p in row] for row in recorded]
    assert [draws[k] for k in (0, 1, 7, 19)] == [0.578425, 0.44324, 0.759165, 0.704442]
    empty = Draws(view, 4, 3, ExemplarView(view, Exemplars()), 2)
    assert [empty.ids(i) for i in range(5)] == [draws.ids(i) for i in range(5)] and empty[19] == draws[19]


@pytest.mark.parametrize(
    "n, n_exemplars, own, replayed", [(9, 2, 4, 2), (9, 5, 1, 5), (3, 5, 3, 3), (1, 3, 5, 1), (0, 3, 6, 0)]
)
def test_a_batch_holds_both_parts_and_no_picture_twice(views, n, n_exemplars, own, replayed):
    "Exemplars that the step sees are left out, a small memory gives all it has, and each epoch shows all pictures."
    view, remember = views
    draws = Draws(view, 6, 1, remember(n), n_exemplars)
    ids = view.data.ids
    assert (draws.n_own, draws.n_exemplars, draws.batch) == (own, replayed, 6)
    mine, others = set(ids[:8]), set(ids[8 : 8 + n])
    for i in range(40):
        batch = draws.ids(i)
        assert len(set(batch)) == 6 and set(batch[:own]) <= mine and set(batch[own:]) <= others
    shown = {picture for i in range(40) for picture in draws.ids(i)}
    assert shown == mine | (others if replayed else set())
    again = Draws(view, 6, 1, remember(n), n_exemplars)
    assert [again.ids(i) for i in (30, 3)] == [draws.ids(i) for i in (30, 3)]
    assert all((a == b).all() for a, b in zip(draws[17], again[17]))


def test_impossible_exemplars_are_refused(views):
    view, remember = views
    for n in (-1, 6, 7):
        with pytest.raises(ValueError, match=rf"a batch of 6 pictures cannot hold {n} exemplars: expected 0 to 5"):
            Draws(view, 6, 1, remember(9), n)
    with pytest.raises(ValueError, match="step 1 gets exemplars of step 1: expected earlier steps only"):
        ExemplarView(view, Exemplars(np.array([9]), np.array([1])))


def test_a_share_leaves_room_for_both_parts():
    count = Method("finetune").count_exemplars
    assert [count(batch, Memory(size=1)) for batch in (1, 2, 3, 8, 16)] == [0, 1, 2, 4, 8]
    assert [count(8, Memory(size=1, share=share)) for share in (0.01, 0.25, 0.99)] == [1, 2, 7]


# the labels that a loss receives


@pytest.fixture
def read_truth(monkeypatch):
    """Make pictures of their own truth: red is the class id, green the position.

    The function that is returned takes the batch that a loss is computed on."""
    images = []
    read = SegmentationFolder.__getitem__

    def read_encoded(self, i):
        _, mask = read(self, i)
        return np.stack([mask, np.full_like(mask, i), np.zeros_like(mask)], 2), mask

    def keep_images(*arguments):
        for batch, labels in iterate(*arguments):
            images.append(batch)
            yield batch, labels

    iterate = sys.modules["mbs.training"].iterate_batches
    monkeypatch.setattr(SegmentationFolder, "__getitem__", read_encoded)
    monkeypatch.setattr("mbs.training.iterate_batches", keep_images)

    def read_last():
        mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
        pixels = ((images[-1] * std + mean) * 255).round().long()
        return pixels[:, 0].numpy(), pixels[:, 1, 0, 0].tolist()

    return read_last


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_loss_receives_a_label_outside_the_step_of_its_picture(setting, size, read_truth, tmp_path):
    "Nor does an exemplar teach a class that has arrived as background. The truth is in the pictures themselves."
    received = []

    class Watched(Method):
        def loss(self, student, teacher, target, step):
            received.append((step, target.numpy().copy(), *read_truth()))
            return super().loss(student, teacher, target, step)

    exact = SHORT | dict(normalisation="imagenet", crop=32, iterations=12)  # mirrored at most
    values = TINY | dict(setting=setting, scenes=dict(n_train=150, n_test=4, size=32), training=exact)
    experiment = Experiment(Settings(**values, method="mbs", memory=dict(size=size)), tmp_path, Watched)
    run = experiment.run()
    n_replayed, n_hidden = 0, 0
    for step, target, truths, positions in received:
        assert len(set(positions)) == len(positions) == 4
        exemplars = run.exemplars(step.number - 1) if step.number else Exemplars()
        steps = dict(zip(exemplars.positions.tolist(), exemplars.steps.tolist()))
        mine = set(experiment.setup.positions[step.number].tolist())
        for labels, truth, position in zip(target, truths, positions):
            if position in mine:
                check_labels(labels, truth, step, step)
                continue
            own = run.protocol[steps[position]]
            assert own.number < step.number
            check_labels(labels, truth, own, step)
            n_replayed += 1
            n_hidden += ((own.to_channels(truth) == 0) & (labels == VOID) & (truth > 0)).sum()
    n_later = sum(step.number > 0 for step, *_ in received)
    assert len(received) == 36 and n_replayed == (2 * n_later if size else 0)
    assert (n_hidden > 0) == (size > 0 and setting != "sequential")


# runs


@pytest.mark.parametrize("method", ["mbs", "kd", "mbs-analytic"])
def test_methods_run_with_a_memory_and_share_the_base_step(method, tmp_path):
    "A base step taken over gives the same exemplars and networks as one that the run trained."
    parts = dict(identity_width=16) if method == "mbs-analytic" else {}
    values = TINY | dict(method=method, parts=parts)
    memory = dict(size=8, selection="herding")
    without = Experiment(Settings(**values, name="without"), tmp_path).run()
    shared = Experiment(Settings(**values, name="shared", memory=memory), tmp_path).run()
    alone = Experiment(Settings(**values, name="alone", memory=memory, share_base=False), tmp_path).run()
    assert without.card.base == shared.card.base and shared.metrics(0)["base_from"] == "without"
    assert_equal_runs(shared, alone)
    assert without.log() != shared.log() and not (without.step_path(2, "exemplars.json")).exists()
    assert len(without.exemplars()) == 0 and [len(shared.exemplars(t)) for t in range(3)] == [8, 8, 8]
    assert set(shared.exemplars(2).steps.tolist()) == {0, 1, 2}


def test_a_memory_of_size_0_is_none(tmp_path):
    plain = Experiment(Settings(**TINY, name="plain", share_base=False), tmp_path).run()
    zero = Experiment(Settings(**TINY, name="zero", share_base=False, memory=dict(size=0)), tmp_path).run()
    assert_equal_runs(plain, zero)


@pytest.mark.parametrize("broken", [3, 15, 27])
def test_a_resumed_run_replays_the_same(broken, tmp_path, monkeypatch):
    "Stopped in the base step, and in the middle of both later steps after a saved state."
    values = TINY | dict(share_base=False, save_minutes=0, memory=dict(size=6, selection="herding"))
    values["training"] = SHORT | dict(iterations=4, new_iterations=12)
    whole = Experiment(Settings(**values, name="run"), tmp_path / "whole").run()
    calls, loss = [], Method.loss

    def break_once(*arguments):
        calls.append(0)
        if len(calls) == broken:
            raise RuntimeError("power cut")
        return loss(*arguments)

    monkeypatch.setattr(Method, "loss", break_once)
    with pytest.raises(RuntimeError, match="power cut"):
        Experiment(Settings(**values, name="run"), tmp_path / "cut").run()
    assert_equal_runs(Experiment(Settings(**values, name="run"), tmp_path / "cut").run(), whole)


def test_two_processes_replay_the_same_as_one(tmp_path):
    quiet = dict(crop=32, batch=8, iterations=10, optimizer="adamw", lr=1e-3, scale=(1, 1), flip=False)
    common = TINY | dict(training=quiet, share_base=False, workers=0, memory=dict(size=9, selection="herding"))
    common["decoder"] = dict(depth=1, drop_path=0.0)
    one = Experiment(Settings(**common, name="one"), tmp_path).run()
    worker = tmp_path / "worker.py"
    worker.write_text(
        textwrap.dedent("""
        import sys
        from mbs.launch import train_in_process
        if __name__ == "__main__": train_in_process(*sys.argv[1:3])
        """)
    )
    two = launch(Settings(**common, name="two", processes=2), tmp_path, [str(worker)])
    for step in range(3):
        assert two.exemplars(step).to_lists() == one.exemplars(step).to_lists()
    for a, b in zip(one.log(), two.log(), strict=True):
        assert b == pytest.approx(a, rel=2e-2, abs=5e-3)


def test_held_out_pictures_never_enter_and_shots_do(tmp_path):
    "In no step is a picture that the step holds out in the memory as its own, or replayed."
    values = TINY | dict(shots=6, memory=dict(size=16, share=0.3))
    values["training"] = SHORT | dict(selection="held-out", held_out=0.3)
    experiment = Experiment(Settings(**values), tmp_path)
    shown = []

    class Watched(ExemplarView):
        def __init__(self, view, exemplars):
            super().__init__(view, exemplars)
            shown.append((view.step.number, set(self.positions.tolist())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbs.experiment.ExemplarView", Watched)
        run = experiment.run()
    setup = experiment.setup
    for step in range(3):
        exemplars = run.exemplars(step)
        own = exemplars.positions[exemplars.steps == step]
        assert not set(own) & set(setup.held_out[step]) and set(own) <= set(setup.positions[step])
        assert len(own)
    assert [number for number, _ in shown] == [0, 1, 2] and shown[2][1]
    for number, positions in shown:
        assert not positions & {*setup.held_out[number].tolist(), *setup.positions[number].tolist()}


def test_a_method_may_compose_its_own_batches(tmp_path):
    counted = []

    class OneExemplar(Method):
        def count_exemplars(self, batch, memory):
            counted.append((batch, memory.size))
            return 1

    class Greedy(Method):
        def count_exemplars(self, batch, memory):
            return batch

    Experiment(Settings(**TINY, memory=dict(size=5), name="one"), tmp_path, OneExemplar).run()
    assert counted == [(4, 5)] * 2  # not in the base step
    with pytest.raises(ValueError, match=r"a batch of 4 pictures cannot hold 4 exemplars.*count_exemplars"):
        Experiment(Settings(**TINY, memory=dict(size=5), name="greedy"), tmp_path, Greedy).run()


def test_damaged_exemplars_are_one_sentence(tmp_path):
    run = Experiment(Settings(**TINY, memory=dict(size=5)), tmp_path).run()
    file = run.step_path(1, "exemplars.json")
    good = json.loads(file.read_text())
    damages = [
        ([], "damaged"),
        (dict(positions=good["positions"]), "'steps' is missing"),
        (dict(good, positions=[*good["positions"][:-1], 50]), "not among the 50 training pictures"),
        (dict(good, positions=[*good["positions"][:-1], 1.5]), "should be a valid integer"),
        (dict(good, positions=[good["positions"][0]] * 5), "a picture is in the memory twice"),
        (dict(good, steps=[2] * 5), "another step than 0 to 1"),
        (dict(good, steps=[0]), "5 positions and 1 steps"),
        (dict(positions=list(range(6)), steps=[0] * 6), "for 1 to 5 exemplars"),
        (dict(positions=[], steps=[]), "0 positions"),
    ]
    for content, words in damages:
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words) as caught:
            run.exemplars(1)
        assert str(caught.value).count("expected") == 1 and "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        run.exemplars(1)


# parameters, names, cards and reports


def test_wrong_values_give_one_sentence():
    wrong = [
        (dict(size=-1), "'size' cannot be -1"),
        (dict(size=2.5), "'size' cannot be 2.5"),
        (dict(share=0), "'share' cannot be 0"),
        (dict(share=1), "'share' cannot be 1"),
        (dict(selection="newest"), "'selection' cannot be 'newest'"),
        (dict(sizes=3), "'sizes' is not known: expected one of size.*; did you mean 'size'"),
    ]
    for memory, words in wrong:
        with pytest.raises(ValueError, match=words) as caught:
            Setup(Settings(**TINY, memory=memory))
        assert "\n" not in str(caught.value)


def test_the_command_line_sets_names_and_shows_a_memory(tmp_path):
    chosen = Settings.from_layers(parse_words(["memory.size=20"]))
    assert chosen.memory == dict(size=20) and chosen.name == "scenes-5-1-overlapped-mbs-memory=20-s0"
    assert Settings(memory=dict(size=20, share=0.3)).name == "scenes-5-1-overlapped-mbs-memory=20-share=0.3-s0"
    assert Settings(memory=dict(share=0.3)).name == Settings().name
    traced = {row.name: row[1:] for row in trace_parameters({"the command": parse_words(["memory.size=20"])})}
    assert traced["memory.size"] == (20, "the command") and traced["memory.selection"] == ("balanced", "default")
    words = ["--home", str(tmp_path), "run", "memory.size=20", "--print-config"]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0 and "memory.size" in printed.output
    inspected = CliRunner().invoke(
        app, ["--home", str(tmp_path), "inspect", "scenes", "5-1", "memory.size=20", "scenes={n_train: 60, size: 32}"]
    )
    assert inspected.exit_code == 0 and "20 exemplars, balanced" in inspected.output
    refused = CliRunner().invoke(app, ["--home", str(tmp_path), "run", "memory.size=-3"])
    assert refused.exit_code == 2 and "'size' cannot be -3" in refused.output


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [7, 45])
def test_inspection_knows_the_size_of_the_memory(setting, size):
    setup = Setup(Settings(**TINY | dict(setting=setting, shots=4), memory=dict(size=size)))
    kept, expected = Exemplars(), []
    for step in setup.protocol:
        expected.append(len(kept))
        kept = select_exemplars(setup.memory, kept, setup.positions[step.number], step, setup.train.index)
    assert [row["exemplars"] for row in inspect_steps(setup)] == expected


def test_cards_and_reports_tell_memories_apart(tmp_path):
    values = TINY | dict(method="finetune")
    memories = [{}, dict(size=5), dict(size=5, selection="random")]
    outputs = tmp_path / "outputs"
    runs = [Experiment(Settings(**values, memory=m, name=f"run{i}"), outputs).run() for i, m in enumerate(memories)]
    (group,) = group_runs(runs)
    assert list(group.lines) == ["finetune", "finetune memory=5", "finetune memory=5 selection=random"]
    assert load_run(runs[1].folder).card.memory == Memory(size=5) and "5 exemplars, balanced" in runs[1]._repr_html_()
    assert "exemplars" not in runs[0]._repr_html_()
    text = (write_report(runs, tmp_path / "report") / "summary.md").read_text(encoding="utf-8")
    assert "| 5 exemplars, random |" in text and "also train on n exemplars" in text
    with pytest.raises(ValueError, match=r"settings\.memory: {'size': 5} there, {'size': 6} now"):
        Experiment(Settings(**values, memory=dict(size=6), name="run1"), outputs).run()
