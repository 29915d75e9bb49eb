"Evaluation: windows against a loop over pixels, selection, both columns, tuning parts, files of any size."

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mbs.augment import IMAGENET
from mbs.cli import app
from mbs.data import open_data
from mbs.experiment import Experiment
from mbs.inference import find_labels, predict_in_windows, predict_labels
from mbs.metrics import scores
from mbs.recipe import make_recipe
from mbs.run import load_run
from mbs.segmenter import Segmenter
from mbs.settings import Settings
from mbs.setup import Setup, make_test_view
from mbs.weights import make_encoder

SHORT = dict(
    protocol="6-2",
    scenes=dict(n_train=40, n_test=8, size=32),
    samples=1,
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
)
BRIEF = dict(crop=32, batch=4, iterations=3, optimizer="adamw")


def train(name, training=None, **settings):
    "Train a run of seconds and return it."
    return Experiment(Settings(name=name, **SHORT, **settings, training=BRIEF | (training or {}))).run()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "height,width,window,stride",
    [(40, 56, 24, 8), (40, 56, 24, None), (24, 24, 24, 8), (16, 56, 24, 7), (10, 12, 24, None), (41, 37, 16, 16)],
)
def test_windows_against_a_plain_loop(height, width, window, stride):
    "Every pixel's logits are the mean over all windows that cover it."
    torch.manual_seed(0)
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, **SHORT["encoder_options"])
    model = Segmenter(encoder, [1, 2]).double().eval()
    image, step = torch.randn(1, 3, height, width, dtype=torch.float64), stride or window // 2
    with torch.inference_mode():
        got = predict_in_windows(model, image, window, stride)[0]
        padded = torch.zeros(1, 3, max(height, window), max(width, window), dtype=torch.float64)
        padded[..., :height, :width] = image

        def starts(length):
            found = [0]
            while found[-1] + window < length:
                found.append(min(found[-1] + step, length - window))
            return found

        corners = [(top, left) for top in starts(padded.shape[2]) for left in starts(padded.shape[3])]
        tiles = {
            (top, left): model(padded[..., top : top + window, left : left + window]).logits[0] for top, left in corners
        }
        for y in range(height):
            for x in range(width):
                values = [
                    tile[:, y - top, x - left]
                    for (top, left), tile in tiles.items()
                    if top <= y < top + window and left <= x < left + window
                ]
                torch.testing.assert_close(got[:, y, x], torch.stack(values).mean(0))


def make_spoiled_model():
    "A network whose logits are NaN."
    encoder = make_encoder("vit_tiny_patch16_224", image_size=32, **SHORT["encoder_options"])
    model = Segmenter(encoder, [1, 2]).eval()
    with torch.no_grad():
        model.decoder.mask_norm.bias[0].fill_(float("nan"))
    return model


@pytest.mark.parametrize("window", [None, 16])
@torch.inference_mode()
def test_a_network_that_is_spoiled_predicts_nothing(window):
    "An error, whole or in windows, rather than a picture of background."
    with pytest.raises(ValueError, match="not finite: expected finite logits"):
        predict_labels(make_spoiled_model(), torch.randn(1, 3, 32, 32), window)


@torch.inference_mode()
def test_full_size_logits_that_are_not_finite_are_refused():
    output = make_spoiled_model()(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="not finite: expected finite logits"):
        find_labels(output._replace(full=output.logits))


def test_one_window_that_covers_all_is_the_whole_picture():
    run = train("whole")
    windows = train("window", dict(test="window"))
    assert (run.confusion().counts == windows.confusion().counts).all()


def test_held_out_images_do_not_train():
    "Every step holds out a share of its images, disjoint from those that it trains on."
    settings = Settings(name="held", **SHORT, training=BRIEF | dict(selection="held-out", held_out=0.25))
    whole, setup = Setup(Settings(**SHORT, training=BRIEF)), Setup(settings)
    for t in range(2):
        assert sorted([*setup.positions[t], *setup.held_out[t]]) == whole.positions[t].tolist()
        assert len(setup.held_out[t]) == round(0.25 * len(whole.positions[t]))
    run = Experiment(settings).run()
    assert run.finished and run.card.images == [len(p) for p in setup.positions]


@pytest.mark.parametrize("recipe,both", [("paper", True), ("clean", True), ("clean", False)])
def test_two_columns(recipe, both):
    "Both columns are confusion matrices of all test pixels; the run's own result equals the column that is its recipe."
    run = train(f"{recipe}{both}", dict(crop=24, both=both, iterations=120), recipe=recipe)
    for t in range(run.n_steps):
        columns = run.metrics(t)["columns"]
        assert set(columns) == ({"published", "clean"} if both else set())
        if not both:
            assert "validation" not in run.metrics(t)
            continue
        iterations, values = zip(*run.metrics(t)["validation"]["test"])
        assert iterations == (100, 120) and 0 <= min(values) <= max(values) <= 1
        mine = run.confusion(t).counts
        published, clean = (run.confusion(t, name) for name in ("published", "clean"))
        assert (mine == (published if recipe == "paper" else clean).counts).all()
        assert clean.counts.sum() > published.counts.sum() == 8 * 24 * 24 - (0 if t else published_void(run, t))
        assert columns["clean"] == pytest.approx(scores(clean, run.protocol[t]), nan_ok=True)


def published_void(run, step):
    "Count the pixels of the centre crops whose class arrives in a later step."
    setup = Setup(run.settings)
    view = make_test_view(setup.test, setup.protocol[step], IMAGENET, make_recipe(crop=24), "crop")
    return sum(int((labels == 255).sum()) for _, labels in view)


def test_evaluating_more_does_not_change_the_run():
    "The iterates are the same bit by bit, with or without validation on the way."
    plain = train("plain", dict(iterations=110))
    both = train("both", dict(iterations=110, both=True))
    for a, b in zip(plain.model().state_dict().values(), both.model().state_dict().values()):
        assert torch.equal(a, b)


def test_tuning_never_opens_the_test_part():
    settings = Settings(name="tuned", tuning=0.3, **SHORT, training=BRIEF)
    train, test = open_data("scenes", SHORT["scenes"])
    for path in test.images:
        path.write_bytes(b"")  # a test picture that is opened is an error
    for path in train.root.glob(".mbs-index-test.npz"):
        path.touch()
    with pytest.raises(ValueError):
        test[0]
    setup = Setup.__new__(Setup)
    with pytest.raises(ValueError, match="cannot be read"):
        setup.__init__(settings.model_copy(update=dict(tuning=0)))
    run = Experiment(settings).run()
    assert run.finished and run.card.data.n_train == 28 and run.card.data.n_test == 12


def test_predict_files(home):
    "Pictures of any size in any folder; a broken one is named and does not stop the others; label files hold channels."
    run = train("seen")
    photos = home / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for k, (h, w) in enumerate([(7, 9), (32, 32), (150, 61), (1, 1)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)).save(photos / f"p{k}.png")
    Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(home / "grey.jpg")
    (photos / "broken.jpg").write_bytes(b"x")
    words = ["predict", "seen", str(photos), str(home / "grey.jpg"), "--out", str(home / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "broken.jpg cannot be read" in result.stderr and "Traceback" not in result.stderr
    names = {p.name for p in (home / "out").iterdir()}
    stems = ("p0", "p1", "p2", "p3", "grey")
    assert names == {"legend.png"} | {f"{stem}-{kind}.png" for stem in stems for kind in ("labels", "overlay")}
    for k in range(4):
        labels = np.asarray(Image.open(home / "out" / f"p{k}-labels.png"))
        photo = photos / f"p{k}.png"
        assert (labels == run.predict(photo)).all()
        assert labels.shape == np.asarray(Image.open(photo)).shape[:2]


@pytest.mark.parametrize(
    "words,says",
    [
        (["nowhere", "."], "is not a run folder (run.json missing)"),
        (["seen", "nothing.jpg"], "does not exist"),
        (["seen", "empty"], "no picture in"),
        (["seen", "photo.png", "--step", "5"], "expected 0 to 1"),
    ],
)
def test_predict_refuses_in_one_sentence(home, monkeypatch, words, says):
    monkeypatch.chdir(home)
    train("seen")
    (home / "empty").mkdir()
    Image.new("RGB", (8, 8)).save("photo.png")
    result = CliRunner().invoke(app, ["predict", *words, "--out", "out"])
    assert result.exit_code == 2 and says in result.stderr and "\n" not in result.stderr.strip()


def test_joint_is_scored_by_the_split():
    "All classes arrive in one step; old and new are those of the protocol that joint training is compared with."
    run = load_run(train("joint", method="joint").folder)
    assert run.finished and run.n_steps == 1 and run.confusion().n == 9 and run.protocol.n_base == 7
    iou, found = run.iou()[0], run.metrics()["scores"]
    assert found["new"] == pytest.approx(np.nanmean(iou[7:]))
    assert found["old_fg"] == pytest.approx(np.nanmean(iou[1:7]))


def test_the_report_shows_both_columns():
    "The table's numbers are those of the two confusion matrices; runs with one column are left out."
    from mbs.comparison import group_runs
    from mbs.report_tables import make_columns_table

    both = [train(f"r{seed}", dict(crop=24, both=True), seed=seed) for seed in (0, 1)]
    assert make_columns_table(group_runs([train("one")])[0]) is None
    (row,), ways = make_columns_table(group_runs(both)[0]).rows, ("published", "clean")
    found = {way: [scores(run.confusion(1, way), run.protocol[1])["all"] for run in both] for way in ways}
    assert row[1] == 2 and [row[4].mean, row[7].mean] == pytest.approx([np.mean(found[way]) for way in ways])
    assert row[10].mean == pytest.approx(np.mean(found["published"]) - np.mean(found["clean"]))


def test_pseudo_labels_are_checked_against_the_truth():
    """The quality that a run keeps equals a count over the labels of the stored teacher.

    Methods without pseudo-labels keep nothing."""
    from mbs.comparison import group_runs
    from mbs.label_quality import relabel_pictures
    from mbs.report_tables import make_pseudo_label_table

    run = train("mbs", dict(iterations=60, lr=2e-3))
    assert "pseudo_labels" not in train("ft", method="finetune").metrics(1)
    assert "pseudo_labels" not in run.metrics(0)
    setup, step, pixels = Setup(run.settings), run.protocol[1], 0
    counts = np.zeros((3, 3), int)  # truth: background, old, future × labels: background, void, relabelled right
    assert len(setup.positions[1]) <= 50  # so that the run used all of them
    for _, truth, view, labels in relabel_pictures(setup, run.model(0), step, setup.positions[1]):
        hidden = (view == 0) & (truth != 255)
        kind, fate = np.digitize(truth, [1, 7]), np.select([labels == 0, labels == 255, labels == truth], [0, 1, 2], -1)
        for a in range(3):
            for b in range(3):
                counts[a, b] += (hidden & (kind == a) & (fate == b)).sum()
        pixels += hidden.sum()
    found = run.metrics(1)["pseudo_labels"]
    assert found["ignored"] == pytest.approx(counts[:, 1].sum() / pixels)
    assert found["kept_old"] == pytest.approx(counts[1, 0] / counts[:, 0].sum())
    assert len(make_pseudo_label_table(group_runs([run])[0]).rows) == 1
