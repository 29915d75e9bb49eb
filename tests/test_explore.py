"Explorers without a browser: functions, states, widgets without a kernel, and the three ways out."

import base64
import json
import re
from io import BytesIO
from zlib import decompress

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets.widgets.widget import _instances
from PIL import Image
from torch.nn import functional as F
from traitlets import TraitError

from mbs.bounds import bound_miou
from mbs.experiment import Experiment
from mbs.explore.evidence import (
    DIFFERENCES,
    FLOWS,
    IGNORED_OLD,
    LEVELS,
    PREDICTORS,
    THRESHOLDS,
    Evidence,
    classify_flow,
    collect_evidence,
    compare_tokens,
    count_codes,
    fit_colours,
    make_step_labels,
    project_colours,
    relabel_background,
    trace_thresholds,
)
from mbs.explore.explorers import explore_class_tokens, explore_confusions, explore_features, explore_pseudo_labels
from mbs.explore.figures import SHIFT_PANELS
from mbs.explore.page import Display, describe_shift_panels, describe_shift_picture, describe_shift_pixel, encode_script
from mbs.explore.paint import FATE_STYLE, FLOW_STYLE, make_class_style, make_group_style, paint, quantise
from mbs.explore.states import COLOURS, ORDERS, SOURCES, FeatureState, Pictures, ShiftState
from mbs.explore.test_set import explore_test_set, has_test_part
from mbs.explore.widgets import make_control
from mbs.identity import IdentifiedSegmenter
from mbs.inference import segment, to_batch
from mbs.protocol import VOID, Protocol
from mbs.pseudo_labels import selective_pseudo_labels
from mbs.run import load_run
from mbs.segmenter import Segmenter
from mbs.settings import Settings
from mbs.viz import AGREE, FATES, classify_fate

matplotlib.use("Agg")
HOSTILE = "</script><script>alert(1)</script>"


def make_evidence(seed, n_old=4, height=23, width=31, stride=8, scale=3.0):
    "Return random evidence of a teacher, and its upsampled logits."
    rng = np.random.default_rng(seed)
    h, w = -(-height // stride), -(-width // stride)
    logits = (scale * rng.standard_normal((n_old, h, w))).astype(np.float32)
    full = F.interpolate(torch.from_numpy(logits)[None], size=(h * stride, w * stride), mode="bilinear")[
        ..., :height, :width
    ]
    p = full.softmax(1)[0]
    confidence, best = p.max(0)
    return Evidence(
        confidence.numpy(), best.numpy().astype(np.uint8), (p[0] < p[1:].sum(0)).numpy(), logits, {}, stride
    ), full


# functions


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.booleans())
def test_stored_confidences_give_the_training_labels(seed, tau, ignore):
    teacher, logits = make_evidence(seed)
    step_labels = (
        np.random.default_rng(seed).choice([0, 4, VOID], teacher.best.shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
    )
    tau = float(np.float32(tau))  # the comparison with float32 confidences is the training's
    expected = selective_pseudo_labels(torch.from_numpy(step_labels)[None].long(), logits, tau, ignore)[0].numpy()
    assert (relabel_background(step_labels, teacher, tau, ignore) == expected).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_curve_is_what_counting_at_every_threshold_gives(seed, ignore):
    teacher, _ = make_evidence(seed, scale=1.5)
    rng = np.random.default_rng(seed)
    step_labels, truth = (
        rng.choice(choices, teacher.best.shape).astype(np.uint8)
        for choices in ([0, 0, 0, 4, VOID], [0, 1, 2, 3, 4, VOID])
    )
    curve = trace_thresholds(step_labels, truth, teacher, ignore)
    for k in range(0, 101, 10):
        labels = relabel_background(step_labels, teacher, THRESHOLDS[k], ignore)
        fates = count_codes(classify_fate(step_labels, labels), FATES)
        assert [values[k] for values in curve[:3]] == [fates[n] for n in ("kept background", "relabelled", "ignored")]
        new = (step_labels == 0) & (labels > 0) & (labels != VOID)
        known, hidden = new & (truth != VOID), (step_labels == 0) & (truth > 0) & (truth < 4)
        assert curve.recall[k] == pytest.approx((new & (labels == truth)).sum() / hidden.sum())
        if known.any():
            assert curve.precision[k] == pytest.approx((new & (labels == truth)).sum() / known.sum())
        else:
            assert np.isnan(curve.precision[k])


@given(st.integers(0, 10_000))
def test_every_pixel_flows_somewhere_once(seed):
    truth, labels = np.random.default_rng(seed).choice([0, 1, 2, 3, VOID], (2, 9, 7)).astype(np.uint8)
    flow = classify_flow(truth, labels, 2)
    assert sum(count_codes(flow, FLOWS).values()) == 63 and count_codes(flow, FLOWS).keys() == FLOWS.keys()
    assert ((flow == AGREE) == ((truth == labels) & (truth != VOID))).all()
    assert ((flow == IGNORED_OLD) == ((labels == VOID) & (truth == 1))).all()


def test_labels_of_a_step_under_a_permuted_order():
    protocol = Protocol("2-1", 4, order=[3, 1, 4, 2])
    truth = np.array([[0, 1, 2, 3, 4, VOID]], np.uint8)
    assert make_step_labels(truth, protocol[1]).tolist() == [[0, 0, 0, 3, 0, VOID]]


def test_painting_keeps_to_its_arguments():
    rng = np.random.default_rng(0)
    photo, labels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.integers(0, 5, (20, 30), dtype=np.uint8)
    style = make_class_style(list("abcde"))
    assert (paint(photo, labels, style, 0) == photo).all()
    assert (paint(photo, labels, style, 0.7, hidden=range(5)) == photo).all()
    everywhere = paint(photo, labels, style, 0.7, darkened=np.ones((20, 30), bool))
    assert (everywhere <= photo).all()
    with pytest.raises(ValueError, match="a colour for each of 5"):
        make_class_style(list("abcde"), np.zeros((4, 3), np.uint8))
    assert (make_class_style(list("ab"), np.array([[0, 0, 0], [9, 8, 7]])).colours[1, :3] == (9, 8, 7)).all()


def test_flow_and_fate_colours_are_apart_for_every_eye():
    "Same colour, same look, is allowed only where a hatch tells them apart."
    for style in (FLOW_STYLE, FATE_STYLE):
        looks = [(*style.colours[c].tolist(), c in style.hatched) for c in style.names]
        assert len(set(looks)) == len(looks), looks
    assert make_group_style(3, 4, 6).names == {
        0: "background",
        1: "an old class",
        2: "an old class",
        3: "a new class",
        4: "a later class",
        5: "a later class",
        VOID: "ignored or void",
    }


def test_components_do_not_flip():
    features = np.random.default_rng(1).standard_normal((50, 8)) * np.arange(1, 9)
    basis = fit_colours(features)
    assert np.allclose(basis.components, fit_colours(np.concatenate([features[::-1]] * 2)).components)
    assert (
        project_colours(features, basis).dtype == np.uint8
        and (basis.components[np.abs(basis.components).argmax(0), range(3)] > 0).all()
    )
    flat = fit_colours(np.ones((10, 8)))  # no variance: no division by zero
    assert np.isfinite(project_colours(np.ones((2, 2, 8)), flat)).all()


def test_script_content_cannot_leave_its_element():
    assert "<" not in encode_script({"a": HOSTILE}) and json.loads(encode_script({"a": HOSTILE}))["a"] == HOSTILE
    assert base64.b64decode(json.loads(encode_script(b"\x00\xff"))["base64"]) == b"\x00\xff"


# states


def sums(state):
    return [sum(state.counts[n] for n in names) for names in (FATES, FLOWS)]


def test_counts_sum_to_the_picture_whatever_is_chosen(runs):
    pictures = Pictures(runs[0])
    state = ShiftState(pictures)
    for state.step in range(1, pictures.n_steps):
        for state.index in range(len(pictures)):
            for state.source in SOURCES:
                for state.tau in (0, 0.3, 0.7, 1):
                    assert sums(state) == [40 * 40] * 2
    assert any(state.pictures.get_moment(1, i).teacher.best.any() for i in range(4)), (
        "the teacher only sees background: the tests would say nothing"
    )


def test_limits_of_tau(runs):
    state = ShiftState(Pictures(runs[0]), step=1, index=0)
    m = state.moment
    candidates, doubted = (m.step_labels == 0) & (m.teacher.best > 0), (m.step_labels == 0) & m.teacher.doubt
    state.tau = 0
    assert (
        state.counts["relabelled"] == candidates.sum()
        and state.counts["ignored"] == (doubted & ~candidates).sum() + (m.step_labels == VOID).sum()
    )
    state.tau = 1
    assert (
        state.counts["relabelled"] == 0
        and state.counts["ignored"] == doubted.sum() + (m.step_labels == VOID).sum()
        and np.isnan(state.quality.precision)
    )
    state.ignore = False
    assert (
        state.counts["ignored"] == (m.step_labels == VOID).sum() and (state.shift.pseudo_labels == m.step_labels).all()
    )


def test_relabelled_only_falls_with_tau(runs):
    state = ShiftState(Pictures(runs[0]), step=2, index=1)
    relabelled = []
    for state.tau in np.linspace(0, 1, 11):
        relabelled.append(state.counts["relabelled"])
    assert relabelled == sorted(relabelled, reverse=True) and relabelled[0] > relabelled[-1]
    curve = state.curve
    assert curve.relabelled[::10].tolist() == relabelled


def test_orders_go_round_and_are_sorted(runs):
    state = ShiftState(Pictures(runs[0]), step=1)
    for state.order in ORDERS:
        assert state.index == state.ranking[0] and sorted(state.ranking) == [0, 1, 2, 3]
        seen = [state.index]
        for _ in range(3):
            state.move(1)
            seen.append(state.index)
        assert seen == state.ranking
        state.move(1)
        assert state.index == state.ranking[0]
        state.move(-1)
        assert state.index == state.ranking[-1]
    state.order, state.source = "most forgotten", "prediction"
    forgotten = []
    for index in state.ranking:
        state.index = index
        forgotten.append(state.counts["old->background"] / state.moment.truth.size)
    assert forgotten == sorted(forgotten, reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(tau=-0.1),
        dict(tau=1.01),
        dict(step=0),
        dict(step=3),
        dict(index=4),
        dict(index=-1),
        dict(pick=(40, 0)),
        dict(alpha=2),
        dict(tua=0.5),
        dict(moment=None),
    ],
)
def test_wrong_choices_are_refused(runs, wrong):
    with pytest.raises(ValueError, match="expected"):
        explore_pseudo_labels(runs[0], **wrong)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 90), (41, 40)])
def test_any_size_of_picture(runs, size):
    "Sizes that no patch fits; a truth of one part; no truth at all."
    rng = np.random.default_rng(0)
    photo, truth = (
        rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        rng.choice([0, 1, 6, 8, VOID], size).astype(np.uint8),
    )
    for images in ([photo], [(photo, truth)], [Image.fromarray(photo)]):
        explorer = explore_pseudo_labels(*runs, images=images)
        assert sums(explorer.state) == [photo[..., 0].size] * 2
        assert (
            describe_shift_picture(explorer.state, Display())["size"] == list(size)
            and describe_shift_pixel(explorer.state)["bars"]
        )
        explorer.to_figure(), explorer.to_frame()
        explore_features(runs[0], images=images).to_frame()


def test_features_share_their_colours_over_steps_and_pictures(runs):
    state = FeatureState(Pictures(runs[0]), step=1)
    before = state.get_basis(state.level)
    state.step, state.index = 2, 3
    assert state.get_basis(state.level) is before
    for state.level in LEVELS:
        assert state.maps.teacher.shape == (5, 5, 3) and np.isclose(max(c.max() for c in state.cosines), 1, atol=1e-5)
    row, column = (n // 8 for n in state.pick)
    assert all(np.isclose(c[row, column], 1, atol=1e-5) for c in state.cosines)


def test_runs_that_do_not_fit_are_refused(runs, tmp_path):
    other = Experiment(
        Settings(
            name="other",
            protocol="7-1",
            training=dict(replace=True, crop=32, batch=4, iterations=1),
            scenes=dict(n_train=30, n_test=4, size=40),
            samples=2,
            encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
        ),
        tmp_path,
    ).run()
    with pytest.raises(ValueError, match="in other steps"):
        explore_pseudo_labels(runs[0], other)
    with pytest.raises(ValueError, match="in other steps"):
        explore_class_tokens(runs[0], other)


# network and identity


def test_teacher_has_an_identity_only_where_training_gave_it_one(identified, monkeypatch):
    assert isinstance(identified.model(0), IdentifiedSegmenter)
    network = identified.teacher(1)
    assert isinstance(network, Segmenter)
    pairs = zip(network.state_dict().values(), identified.model(0, identity=False).state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert identified.teacher(-1).n_channels == identified.protocol[2].n_old
    with pytest.raises(ValueError, match="step 0 has no teacher: expected an incremental step"):
        identified.teacher(0)
    parts = identified.card.parts.model_copy(update=dict(identity_teacher=True))
    monkeypatch.setattr(identified, "card", identified.card.model_copy(update=dict(parts=parts)))
    assert isinstance(identified.teacher(1), IdentifiedSegmenter)


def describe_card(state):
    return describe_shift_pixel(state)["lines"]


def test_predictor_is_the_one_that_is_chosen(identified):
    "Prediction, flow, ranking and probabilities are those of the network, or of network and identity."
    state = ShiftState(Pictures(identified), step=2, order="as stored")
    models = dict(network=identified.model(2, identity=False), both=identified.model(2), identity=identified.model(2))
    models["identity"].identity.share = 1
    assert state.predictor == "both"
    seen = {}
    for state.predictor, model in models.items():
        for state.index in range(4):
            m = state.moment
            assert (m.prediction == segment(model, m.photo, identified.card.normalisation)).all()
            assert (state.shift.flow == classify_flow(m.seen_truth, m.prediction, state.n_old)).all()
            with torch.inference_mode():
                p = model(to_batch(m.photo, identified.card.normalisation)).logits.softmax(1)[0]
            assert np.allclose(state.probabilities.student, p[(slice(None), *state.pick)], atol=1e-5)
            seen[state.predictor, state.index] = m.prediction
    for name in ("network", "identity"):
        assert any((seen[name, k] != seen["both", k]).any() for k in range(4)), f"{name} says what both say"
    assert all((seen["both", k] == sample.predictions[2]).all() for k, sample in enumerate(identified.samples()))


def test_network_alone_is_the_run_without_identity(runs, identified):
    "The regression changes nothing in training, so the explorers of both runs show the same numbers."
    state, plain = (ShiftState(Pictures(run), order="as stored") for run in (identified, runs[0]))
    state.predictor = "network"
    for state.step in (1, 2):
        plain.step = state.step
        for index in range(4):
            state.index = plain.index = index
            assert state.counts == plain.counts and np.array_equal(state.quality, plain.quality, equal_nan=True)
            assert all(map(np.array_equal, state.probabilities, plain.probabilities))


def test_pictures_are_ranked_by_the_chosen_predictor(identified):
    samples = identified.samples()
    images = [tuple(np.roll(a, by, 1) for a in sample[:2]) for sample in samples for by in (0, 7, 19, 26)]
    state = ShiftState(Pictures(identified, images), step=2, order="most forgotten")
    rankings = set()
    for state.predictor in PREDICTORS:
        forgotten = []
        for index in state.ranking:
            state.index = index
            forgotten.append(state.counts["old->background"])
        assert forgotten == sorted(forgotten, reverse=True)
        rankings.add(tuple(state.ranking))
    assert len(rankings) > 1, "all predictors rank alike: the test would say nothing"


def test_identity_alone_is_the_run_with_a_share_of_one(runs, train_briefly):
    "Then nothing but the regression divides the foreground, so both predictors agree at every pixel."
    run = train_briefly(name="alone", method="mbs-analytic", parts=dict(identity_width=32))
    pictures = Pictures(run)
    for index in range(4):
        assert (pictures.predict(2, index, "identity") == pictures.predict(2, index)).all()


def test_evidence_of_the_teacher_is_that_of_training(identified, monkeypatch):
    "The network alone, whichever predictor is shown, unless the identity made the pseudo-labels, too."
    for teaches, labels in ((False, False), ("targets", False), ("labels", True), (True, True)):
        parts = identified.card.parts.model_copy(update=dict(identity_teacher=teaches))
        monkeypatch.setattr(identified, "card", identified.card.model_copy(update=dict(parts=parts)))
        state = ShiftState(Pictures(identified), step=2, order="least confident")
        expected = collect_evidence(
            identified.model(1, identity=labels), state.moment.photo, identified.card.normalisation
        )
        for state.predictor in PREDICTORS:
            assert np.array_equal(state.moment.teacher.confidence, expected.confidence)
        confidences = [state.pictures.get_teacher_evidence(2, k).confidence.mean() for k in state.ranking]
        assert confidences == sorted(confidences)
        assert (
            f"pseudo-labels are those of {'network and identity' if labels else 'the network alone'}."
            in (describe_shift_picture(state, Display())["note"])
        )


def test_card_says_what_network_and_identity_each_think(identified):
    state = ShiftState(Pictures(identified), step=2)
    model, (row, column) = identified.model(2), state.pick
    images = to_batch(state.moment.photo, identified.card.normalisation)
    with torch.inference_mode():
        logits = model.network(images).logits[0, 1:, row, column]
        log_identity = model.identity((model.reference or model.network).encode(images), (5, 5))
        upsampled = F.interpolate(log_identity, size=(40, 40), mode="bilinear")[0, :, row, column]
    assert model.identity.known.tolist() == list(range(1, 9))
    expected = []
    for name, values in (("network", logits), ("identity", upsampled)):
        p, classes = values.softmax(0).topk(2)
        first, second = (f"{identified.names[1 + int(c)]} {q:.2f}" for q, c in zip(p, classes))
        expected.append(f"{name}, given the foreground: {first}, {second}")
    lines = describe_card(state)
    assert [line for line in lines if "given the foreground" in line] == expected
    for state.predictor in PREDICTORS:
        lines = describe_card(state)
        assert [line for line in lines if "given the foreground" in line] == expected
        assert f"blue: new model ({state.predictor})" in lines[-1]
        assert f"prediction: {identified.names[state.moment.prediction[row, column]]}" in lines


def test_run_without_identity_has_no_switch_and_no_cost(runs, identified):
    assert "prediction by" in controls(explore_pseudo_labels(identified).view)
    explorer = explore_pseudo_labels(runs[0])
    assert not [name for name in controls(explorer.view) if "prediction by" in name]
    with pytest.raises(ValueError, match="run mbs has no identity: expected predictor=both, its only one"):
        explorer.state.predictor = "network"
    assert explorer.state.opinions is None and "given the foreground" not in " ".join(describe_card(explorer.state))
    assert "predictor" not in explorer.to_frame()
    pictures = Pictures(runs[0])
    pictures.get_moment(1, 0), pictures.get_moment(2, 0)
    assert pictures._get_evidence.cache_info().misses == 3  # the student of a step is the teacher of the next one
    assert pictures._load_teacher.cache_info().misses == pictures.get_opinions.cache_info().misses == 0


def test_every_way_out_follows_the_predictor(identified, runs, tmp_path):
    explorer = explore_pseudo_labels(identified, runs[0], step=2, order="as stored")
    found, (canvas, second) = controls(explorer.view), explorer.canvases
    switch = found["prediction by (mbs-analytic)"]
    assert switch.options == tuple(PREDICTORS) and not [name for name in found if name == "prediction by (mbs)"]
    before = second.picture
    for switch.value in PREDICTORS:
        prediction = explorer.state.moment.prediction
        assert explorer.state.predictor == switch.value and explorer.states[1].predictor == "both"
        assert decompress(canvas.picture["maps"]["predicted"]) == prediction.tobytes()
        titles = {panel["key"]: (panel["title"], panel["about"]) for panel in canvas.panels["panels"]}
        assert titles["predicted"][0] == f"prediction ({switch.value}) after step 2"
        assert titles["predicted"][1].endswith(PREDICTORS[switch.value])
        title = f"Error map for the prediction ({switch.value})"
        assert titles["flow"][0] == canvas.panels["tables"][1]["title"] == title
        page = explorer.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
        states = json.loads(re.search(r'<script type="application/json" id="states">(.*?)</script>', page, re.S)[1])
        assert decompress(base64.b64decode(states[0]["picture"]["maps"]["predicted"]["base64"])) == prediction.tobytes()
        assert states[0]["frames"][3]["panels"]["moment"] == states[0]["picture"]["moment"]
        rows = {
            row["name"].replace(" → ", "->"): row["count"]
            for row in states[0]["frames"][3]["panels"]["tables"][1]["rows"]
        }
        assert rows == {name: explorer.state.counts[name] for name in FLOWS}
        figure = explorer.to_figure()
        drawn = [ax.get_title() for part in figure.subfigs for top in part.subfigs for ax in top.axes]
        assert f"prediction ({switch.value})" in drawn and "prediction" in drawn
        frame = explorer.to_frame().set_index(["run", "picture"])
        row = frame.loc["analytic", explorer.state.index]
        assert row["predictor"] == switch.value
        assert {name: row[name] for name in explorer.state.counts} == explorer.state.counts
        assert "picture 1 of " in repr(explorer)
        assert repr(explorer).endswith(f", {switch.value})") == (switch.value != "both")
    assert second.picture is before
    explorer.close()


# widgets without a kernel


def controls(box):
    "Every widget below `box`, by its description."
    return {
        w.description: w
        for row in box.children
        for w in (row, *getattr(row, "children", ()))
        if getattr(w, "description", "")
    }


def test_view_follows_the_state_and_the_state_the_view(runs):
    explorer = explore_pseudo_labels(*runs, step=1)
    found, (canvas, second) = controls(explorer.view), explorer.canvases
    found["τ"].value = 0.35
    assert explorer.state.tau == canvas.tau == second.tau == 0.35
    rows = {r["name"]: r["count"] for table in canvas.panels["tables"] for r in table["rows"]}
    assert rows == {name.replace("->", " → "): n for name, n in explorer.state.counts.items()}
    explorer.state.step = 2
    assert found["step"].value == 2 and "labels of step 2" in [p["title"] for p in second.panels["panels"]]
    ranking = explorer.state.ranking
    place = ranking.index(explorer.state.index)
    canvas._handle_custom_msg({"move": 1}, [])
    assert (
        explorer.state.index == explorer.states[1].index == ranking[(place + 1) % 4]
        and found["Image"].value == (place + 1) % 4 + 1
    )
    canvas.tau, canvas.hidden, canvas.pick, second.flow_filter = 0.8, [0, VOID], (3, 4), [1]
    assert (explorer.state.tau, explorer.states[1].hidden, explorer.states[1].pick, explorer.state.flow_filter) == (
        0.8,
        [0, VOID],
        (3, 4),
        [1],
    )
    view = explorer.view
    assert explorer.view is view
    explorer.close()
    explorer.state.tau = 0.1
    assert explorer.states[1].tau == 0.8, "links live on after close"


def test_own_pictures_replace_those_of_the_run_and_the_choice_stays(runs, tmp_path):
    explorer = explore_pseudo_labels(*runs, step=1, tau=0.35)
    view, own = explorer.view, explorer.own
    photo = runs[0].samples()[0].photo[:, ::-1].copy()
    Image.fromarray(photo).save(tmp_path / "photo.png")
    n_widgets = len(_instances)
    content = (tmp_path / "photo.png").read_bytes()
    explorer.canvases[1]._handle_custom_msg({"dropped": ["photo.png"]}, [memoryview(content)])
    assert explorer.view is view and view.children[-2:] == tuple(explorer.canvases)
    assert [len(state.pictures) for state in explorer.states] == [1, 1] and explorer.states[1].tau == 0.35
    assert (explorer.states[1].moment.photo == photo).all() and not explorer.state.has_truth
    assert [p["key"] for p in explorer.canvases[0].panels["panels"]] == ["pseudo", "predicted", "weight"]
    explorer.state.tau = 0.5
    assert explorer.states[1].tau == 0.5 and explorer.states[1].partner is explorer.state
    own.show_files([("a.txt", b"hi")])
    assert "a.txt cannot be read" in own.message.value and len(explorer.state.pictures) == 1
    own.samples.click()
    assert len(explorer.state.pictures) == 4 and explorer.state.has_truth and "cannot" not in own.message.value
    file = next(w for w in own.row.children if w.description == "or file")
    file.value = str(tmp_path / "photo.png")
    assert len(explorer.state.pictures) == 1
    file.value = str(tmp_path / "none.png")
    assert "none.png" in own.message.value and len(explorer.state.pictures) == 1
    own.samples.click()
    assert len(_instances) == n_widgets, "widgets of pictures that are gone were left"
    explorer.close()


def test_features_keep_a_channel_that_only_their_level_has(runs):
    explorer = explore_features(runs[0], level="encoder", kind="channel")
    explorer.state.channel = explorer.state.n_features - 1
    explorer.show_images([runs[0].samples()[0].photo])
    assert (explorer.state.level, explorer.state.channel) == ("encoder", explorer.state.n_features - 1)


# the whole test set


@pytest.fixture(scope="module")
def grid(runs):
    "The explorer of all eight test pictures after the last step, computed."
    explorer = explore_test_set(runs[0], order="as stored")
    explorer.compute()
    return explorer


def test_pictures_of_the_test_set_add_up_to_the_confusion_matrix(grid, runs):
    for step in range(runs[0].n_steps):
        grid.state.pictures.compute(step)
        n = runs[0].protocol[step].n_channels
        total = sum(grid.state.pictures.kept[step, i].pairs.to_matrix(n) for i in range(8))
        assert (total == runs[0].confusion(step).counts).all()


def test_forgotten_is_what_was_right_when_its_class_was_learnt(grid, runs):
    "Against the predictions of the run, pixel by pixel."
    run, pictures = runs[0], grid.state.pictures
    for record in grid.state.choose():
        photo, truth = pictures.read_pair(record.position)
        last = run.predict(photo)
        lost = 0
        for step in list(run.protocol)[:-1]:
            is_own = np.isin(truth, list(step.new_channels))
            learnt = run.predict(photo, step.number)
            lost += (is_own & (learnt == truth)).sum() - (is_own & (last == truth)).sum()
        assert record.forgotten == pytest.approx(lost / truth.size)
        assert record.accuracy == pytest.approx((last == truth)[truth != VOID].mean())
    assert any(record.forgotten > 0 for record in grid.state.choose())


def test_the_test_set_is_sorted_and_filtered(grid):
    state = grid.state
    records = state.choose()
    state.order = "lowest IoU"
    assert [r.iou for r in state.choose()] == sorted(r.iou for r in records)
    pair = next(iter(max(records, key=lambda record: len(record.pairs)).pairs))
    state.order, state.pair = "most confused", list(pair)
    shares = [r.pairs[pair] for r in state.choose()]
    assert shares == sorted((r.pairs[pair] for r in records if pair in r.pairs), reverse=True)
    state.pair, state.contains, state.place = [], 2, "prediction"
    assert {r.position for r in state.choose()} == {r.position for r in records if 2 in r.predicted}
    assert list(grid.to_frame()["picture"]) == [r.name for r in state.choose()]
    for name, value in dict(contains=9, pair=[1], order="best").items():
        with pytest.raises((ValueError, TraitError), match=r"expected|must be"):
            setattr(state, name, value)
    state.order, state.contains, state.place = "as stored", -1, "truth or prediction"


def test_the_test_set_is_computed_in_pieces(runs):
    "A piece ends after its time; each prediction is made once; the first records do not wait for what is forgotten."
    explorer = explore_test_set(runs[0])
    pictures, step = explorer.state.pictures, explorer.state.step
    places = pictures.list_work(step)
    assert len(set(places)) == len(places) and places[:8] == [(step, i) for i in range(8)]
    assert explorer.view is not None
    sent, canvas = [], explorer.canvases[0]
    canvas.send = lambda content, buffers=None: sent.append((content, buffers))
    assert pictures.compute(step, seconds=0) == {0} and len(pictures.kept) == 1
    while not sent or sent[-1][0]["n_left"]:
        canvas._handle_custom_msg({"ask": "records", "is_new": not sent}, [])
    last = {record["position"]: record for content, _ in sent for record in content["records"]}
    assert len(last) == 8 and len(pictures.kept) == len(places)
    assert all("…" not in record["texts"]["most forgotten"] for record in last.values())
    canvas._handle_custom_msg({"ask": "thumbnails", "positions": [3, 5]}, [])
    assert sent[-1][0]["positions"] == [3, 5] and all(b.startswith(b"\xff\xd8") for b in sent[-1][1])
    canvas._handle_custom_msg({"ask": "open", "position": 3}, [])
    photo, truth = pictures.read_pair(3)
    assert (explorer.opened.state.moment.photo == photo).all() and (explorer.opened.state.moment.truth == truth).all()
    assert sent[-1][0] == dict(answer="opened", sentence="")
    explorer.close()


def test_other_pictures_than_those_of_the_test_are_refused(runs):
    assert has_test_part(runs[0])
    card = runs[0].card
    changed = card.model_copy(update=dict(data=card.data.model_copy(update=dict(test="0" * 16, n_test=9))))
    other = load_run(runs[0].folder)
    other.card = changed
    assert not has_test_part(other)
    with pytest.raises(ValueError, match="have changed: expected those that run mbs was tested on"):
        explore_test_set(other)


def test_maps_of_the_view_are_those_of_the_state(runs):
    state = ShiftState(Pictures(runs[0]), step=1)
    for state.colour_by in COLOURS:
        maps = {
            k: np.frombuffer(decompress(v), np.uint8)
            for k, v in describe_shift_panels(state, Display())["maps"].items()
        }
        shown = state.shift.fate if state.colour_by == "fate" else state.shift.pseudo_labels
        assert (
            (maps["pseudo"] == shown.ravel()).all()
            and (maps["flow"] == state.shift.flow.ravel()).all()
            and (maps["weight"] == quantise(state.shift.weights, 0, 1).ravel()).all()
        )


def test_large_pictures_are_thinned_for_the_eye_alone(runs):
    photo, truth, _ = runs[0].samples()[0]
    large = np.kron(photo, np.ones((4, 4, 1), np.uint8)), np.kron(truth, np.ones((4, 4), np.uint8))
    explorer = explore_pseudo_labels(runs[0], images=[large], max_side=64)
    part = explorer.describe_picture(explorer.state)
    assert (
        part["size"] == [54, 54]
        and part["thinning"] == 3
        and "1/3" in part["note"]
        and len(decompress(part["maps"]["truth"])) == 54 * 54
    )
    assert sums(explorer.state) == [160 * 160] * 2


def test_controls_are_named(runs):
    "Every control has a name that a screen reader finds."
    for explorer in (explore_pseudo_labels(*runs), explore_features(*runs)):
        for row in explorer.view.children[:-2]:
            for widget in row.children:
                named = widget.children[0] if getattr(widget, "children", ()) else widget
                assert getattr(named, "description", "") or named.value
        explorer.close()
    assert make_control("FloatSlider", "x", min=0, max=1).description == "x"


def test_static_where_nothing_can_be_live(runs, monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG", "SERVER_SOFTWARE", "MBS_STATIC"):
        monkeypatch.delenv(name, raising=False)
    charts = explore_class_tokens(*runs), explore_confusions(*runs)
    explorers = explore_pseudo_labels(*runs), explore_features(runs[0]), *charts
    for explorer in explorers:
        bundle, _ = explorer._repr_mimebundle_()
        assert bundle.keys() == {"text/plain", "image/png"} and explorer._view is None
        assert Image.open(BytesIO(base64.b64decode(bundle["image/png"]))).width > 300
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert "application/vnd.jupyter.widget-view+json" in explorers[0]._repr_mimebundle_()[0]
    monkeypatch.setenv("MBS_STATIC", "1")
    assert "application/vnd.jupyter.widget-view+json" not in explorers[1]._repr_mimebundle_()[0]


# two runs, and pictures without a ground truth


def test_difference_says_who_is_right(runs):
    "The panel stands with the second run, counts every pixel once, and follows both runs."
    explorer = explore_pseudo_labels(*runs, step=1)
    first, second = explorer.states
    assert second.difference is None
    first.compare = True  # the box of the view sets it for both
    assert first.difference is None and second.compare
    here, there, truth = second.moment.prediction, first.moment.prediction, second.moment.seen_truth
    codes, names = second.difference, list(DIFFERENCES)
    known = (truth != VOID) & (here != there)
    assert ((codes == names.index("same prediction")) == (here == there)).all()
    assert ((codes == names.index("only this run is right")) == (known & (here == truth))).all()
    assert ((codes == names.index("only the other run is right")) == (known & (there == truth))).all()
    assert ((codes == names.index("both are wrong")) == (known & (here != truth) & (there != truth))).all()
    parts = describe_shift_panels(second, Display())
    assert parts["panels"][-1]["key"] == "difference" and "difference" in parts["maps"]
    rows = parts["tables"][-1]["rows"]
    assert parts["tables"][-1]["title"] == f"difference to {runs[0].folder.name}"
    assert (
        sum(row["count"] for row in rows) == truth.size
        and sum(row["count"] for row in rows[1:]) == (here != there).sum()
    )
    before = second.index
    first.move(1)
    assert second.index != before and second.difference.shape == second.moment.truth.shape


def test_a_picture_without_a_truth_shows_nothing_of_it(runs):
    photo = runs[0].samples()[0].photo
    explorer = explore_pseudo_labels(runs[0], images=[photo], step=1)
    state = explorer.state
    panels, picture = describe_shift_panels(state, Display()), describe_shift_picture(state, Display())
    assert [panel["key"] for panel in panels["panels"]] == ["pseudo", "predicted", "weight"]
    assert [table["title"] for table in panels["tables"]] == [f"fate of the pixels at τ = {state.tau:.2f}"]
    assert panels["tables"][0]["lines"] == []
    assert [line["name"] for line in picture["curve"]["lines"]] == ["kept", "relabelled", "ignored"]
    assert {*panels["maps"], *picture["maps"]} == {"pseudo", "weight", "predicted"}
    assert not [line for line in describe_shift_pixel(state)["lines"] if "truth" in line or "step's label" in line]
    assert "no ground truth" in picture["note"]
    assert len(explorer.to_figure(annotate=False).axes) == 3


# three ways out


def test_figure_is_the_state(runs):
    explorer = explore_pseudo_labels(runs[0], step=1, alpha=0.8)

    def drawn():
        return [ax.images[0].get_array() for ax in explorer.to_figure(SHIFT_PANELS[:5], annotate=False).axes]

    before = drawn()
    assert len(before) == 5
    style = make_class_style(runs[0].names)
    assert (before[0] == paint(explorer.state.moment.photo, explorer.state.moment.truth, style, 0.8)).all()
    explorer.state.alpha = 0.2
    after = drawn()
    assert all((a != b).any() for a, b in zip(before, after)), "opacity is left out"
    explorer.state.flow_filter = [AGREE]
    assert (drawn()[0] != after[0]).any(), "the filter is left out"
    with pytest.raises(ValueError, match="panel 'x' is not known"):
        explorer.to_figure(["x"])


def test_pages_load_nothing(runs, tmp_path):
    "No address in anything that a browser would fetch; plotly's source holds addresses, so the browser test checks it."
    for explorer in (explore_pseudo_labels(*runs), explore_features(*runs)):
        page = explorer.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
        assert "{{" not in page and not re.search(r"https?:|//cdn|@import|(src|href)\s*=|url\(", page)
        states = json.loads(re.search(r'<script type="application/json" id="states">(.*?)</script>', page, re.S)[1])
        assert len(states) == 2 and [s["title"].split()[0] for s in states] == ["mbs", "kd"]
    for explorer in (explore_class_tokens(*runs), explore_confusions(*runs)):
        chart = explorer.to_html(tmp_path / "chart.html").read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=", chart)


def test_saved_thresholds_are_those_of_the_kernel(runs, tmp_path):
    explorer = explore_pseudo_labels(runs[0], step=1, tau=0.37)
    saved = explorer.describe_saved(explorer.state)["frames"]
    assert {0.37, 0.7, 0, 1} <= {f["tau"] for f in saved}
    for frame in saved[::5]:
        explorer.state.tau = frame["tau"]
        assert (
            frame["panels"]["tables"][0]["rows"]
            == describe_shift_panels(explorer.state, Display())["tables"][0]["rows"]
        )


def test_hostile_names_stay_text(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs[0], "names", [HOSTILE] * len(runs[0].names))
    page = explore_pseudo_labels(runs[0]).to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "alert(1)" in page


def test_tables_are_the_states(runs):
    explorer = explore_pseudo_labels(*runs, step=1, tau=0.4)
    table = explorer.to_frame()
    assert explorer.state.ignore and not explorer.states[1].ignore  # kd trains without rule 2
    assert (table[table["run"] == "kd"]["ignored"] == 0).all()
    assert table[["run", "picture"]].drop_duplicates().shape == (8, 2)
    for state in explorer.states:
        row = table[(table["run"] == state.run.folder.name) & (table["picture"] == state.index)].iloc[0]
        assert {name: row[name] for name in state.counts} == state.counts
    tokens = explore_class_tokens(runs[0], step=2)
    pairs = tokens.to_frame()
    cosine = compare_tokens(runs[0].model(2).decoder.tokens().detach().numpy())
    assert (
        np.allclose(pairs["cosine"], [cosine[i, j] for i in range(len(cosine)) for j in range(i)])
        and pairs["change"].notna().sum() == 8 * 7 // 2
    )


# mixed-up classes


def read_cells(trace):
    "Return percent and pixels that a trace of the chart shows, as two arrays."
    return np.array(trace.z, float), np.array(trace.customdata, float)


def test_chart_shows_the_confusion_of_every_step(runs):
    explorer = explore_confusions(*runs)
    for explorer.state.step in range(3):
        for trace, run in zip(explorer.to_chart().data, runs):
            counts = run.confusion(explorer.state.step).counts
            n = len(counts)
            percent, pixels = read_cells(trace)
            assert percent.shape == (9, 9) and list(trace.x) == list(trace.y) == runs[0].names
            assert (pixels[:n, :n] == counts).all()
            assert np.isnan(pixels[n:]).all() and np.isnan(percent[:, n:]).all()
            total = counts.sum(1, keepdims=True)
            np.testing.assert_allclose((percent[:n, :n] * total / 100), counts, atol=1e-4 * total.max())
    assert "of the true class" in trace.hovertemplate and "pixels" in trace.hovertemplate


def test_lines_part_the_classes_of_the_steps(runs):
    "6-1: background | six classes | one | one."
    shapes = explore_confusions(runs[0]).to_chart().layout.shapes
    assert sorted(s.x0 for s in shapes if s.x0 == s.x1) == [0.5, 6.5, 7.5]
    assert sorted(s.y0 for s in shapes if s.y0 == s.y1) == [0.5, 6.5, 7.5]


def test_slider_goes_from_the_score_of_the_run_to_its_bounds(runs):
    explorer = explore_confusions(runs[0])
    state, bounds = explorer.state, bound_miou(runs[0].confusion().counts)
    assert state.corrected_miou == state.miou == pytest.approx(runs[0].metrics()["scores"]["all"])
    for state.share, name in ((0.5, "classes half corrected"), (1, "classes corrected")):
        assert state.corrected_miou == pytest.approx(bounds[name])
    state.share, state.perfect_background = 0, True
    assert state.corrected_miou == pytest.approx(bounds["background corrected"])
    assert state.miou == pytest.approx(bounds["as it is"])
    state.share = 1
    assert state.corrected_miou > max(bounds.values()) and len(set(bounds.values())) == 4
    assert (read_cells(explorer.to_chart().data[0])[1] == state.corrected.round(2)).all()


def test_title_names_both_scores(runs):
    explorer = explore_confusions(runs[0], step=1)

    def title():
        return explorer.to_chart().layout.annotations[0].text.replace("<br>", " ")

    bounds = {name: f"{100 * miou:.1f}" for name, miou in bound_miou(runs[0].confusion(1).counts).items()}
    assert title() == f"mbs (mbs), after step 1: mIoU {bounds['as it is']} as it is"
    explorer.state.share = 0.5
    says = f"{bounds['classes half corrected']} with 50 % of the mixed-up classes corrected"
    assert title().endswith(f"{bounds['as it is']} as it is, {says}")
    explorer.state.share, explorer.state.perfect_background = 0, True
    assert title().endswith(f"{bounds['background corrected']} with a perfect background")
    drawn = explorer.to_figure().axes[0]
    assert drawn.get_title().replace("\n", " ") == title()
    assert (np.ma.filled(drawn.images[0].get_array(), 0)[0] == [1, *[0] * 8]).all()


def test_view_of_mixed_up_classes_follows_the_state(runs, identified):
    explorer = explore_confusions(identified, runs[0], step=2)
    steps, row, out = explorer.view.children
    share, background, predictor = row.children

    def drawn():
        return out.outputs[0]["data"]["application/vnd.plotly.v1+json"]["layout"]["annotations"]

    before = drawn()
    share.value, background.value = 0.25, True
    assert all(s.share == 0.25 and s.perfect_background for s in explorer.states)
    assert all(a["text"] != b["text"] for a, b in zip(before, drawn()))
    predictor.value = "network"
    assert [s.predictor for s in explorer.states] == ["network", "both"]
    assert (explorer.state.counts == identified.confusion(2, "network").counts).all()
    assert "network alone" in drawn()[0]["text"] and "alone" not in drawn()[1]["text"]
    steps.children[1].value = 1
    assert len(explorer.states[1].counts) == 8 and "after step 1" in drawn()[1]["text"].replace("<br>", " ")
    explorer.close()
    explorer.state.share = 0
    assert explorer.states[1].share == 0.25, "links live on after close"


def test_saved_slider_holds_every_step(runs):
    explorer = explore_confusions(*runs, step=1)
    explorer.state.share = 0.5
    chart = explorer._make_page_chart()
    (slider,) = chart.layout.sliders
    assert slider.active == 1 and [step.label for step in slider.steps] == ["0", "1", "2"]
    for step in slider.steps:
        explorer.state.step = int(step.label)
        shown, titles = step.args
        now = explorer.to_chart()
        for k, trace in enumerate(now.data):
            np.testing.assert_array_equal(shown["z"][k], trace.z)
            np.testing.assert_array_equal(shown["customdata"][k], trace.customdata)
            assert titles[f"annotations[{k}].text"] == now.layout.annotations[k].text


def test_table_of_mixed_up_classes_has_a_row_for_every_pair(runs):
    explorer = explore_confusions(*runs, step=1)
    explorer.state.share = 1
    table = explorer.to_frame()
    assert len(table) == 2 * 8 * 8
    for state in explorer.states:
        rows = table[table["run"] == state.run.folder.name]
        counts = state.run.confusion(1).counts
        assert (rows["pixels"].to_numpy().reshape(8, 8) == counts).all()
        assert (rows["corrected"].to_numpy().reshape(8, 8) == state.corrected).all()
        tested = rows[rows["share"].notna()]
        np.testing.assert_allclose(tested.groupby("true")["share"].sum(), 1)


@pytest.mark.parametrize("wrong", [dict(step=3), dict(step=-1), dict(share=1.1), dict(predictor="network")])
def test_wrong_choices_of_mixed_up_classes_are_refused(runs, wrong):
    state = explore_confusions(runs[0]).state
    with pytest.raises(ValueError, match="expected"):
        for name, value in wrong.items():
            setattr(state, name, value)
