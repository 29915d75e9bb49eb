"Degenerate inputs are defined and finite, for every method, in value and gradient."

import shutil

import numpy as np
import pytest
import torch
from steps import make_step

from mbs.augment import Normalisation, TestTransform, TrainTransform
from mbs.data import open_data
from mbs.draws import Draws
from mbs.experiment import Experiment
from mbs.methods import Method
from mbs.parts import METHODS
from mbs.protocol import VOID
from mbs.run import load_run
from mbs.scenes import write_scenes
from mbs.segmenter import Segmenter
from mbs.settings import Settings
from mbs.setup import Setup
from mbs.views import StepView
from mbs.weights import make_encoder

NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def networks(method, n_new, encoder="vit_tiny_patch16_224", **options):
    "A teacher of 1 + 2 channels and a student grown by `n_new`."
    torch.manual_seed(0)
    old = Segmenter(make_encoder(encoder, image_size=32, **options), [1, 2], dim=32, heads=2)
    return old.frozen(), method.grow(old, make_step(3, n_new)).train()


TINY = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
TARGETS = {
    "every pixel void": torch.full((2, 30, 37), VOID),
    "no new class": torch.zeros(2, 30, 37, dtype=torch.long),
    "only new classes": torch.full((2, 30, 37), 3),  # no patch of weight > 0
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_new", [1, 3])
def test_loss_is_finite(name, target, n_new):
    "Also with one-class steps, and sides that are no multiple of the patch."
    method = Method(name)
    teacher, student = networks(method, n_new, **TINY)
    images = torch.randn(2, 3, 30, 37)
    method.prepare(student, teacher, [(images, target)], make_step(3, n_new))
    terms = method.loss(student(images), teacher(images), target, make_step(3, n_new))
    assert all(torch.isfinite(v) for v in terms.values())
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    if (target == VOID).all():
        assert terms["cross_entropy"] == 0


@pytest.mark.parametrize("height,width", [(1, 1), (5, 64), (33, 7), (32, 32)])
def test_any_picture_size(height, width):
    _, model = networks(Method("mbs"), 1, **TINY)
    out = model.eval()(torch.randn(1, 3, height, width))
    assert out.logits.shape == (1, 4, height, width) and torch.isfinite(out.logits).all()


def test_convolutional_encoder_any_size():
    _, model = networks(Method("mbs"), 1, "tf_efficientnet_lite0")
    assert model.eval()(torch.randn(1, 3, 30, 70)).logits.shape == (1, 4, 30, 70)


@pytest.mark.parametrize("height,width", [(20, 90), (90, 20), (3, 3), (64, 64)])
def test_pictures_smaller_than_the_crop(height, width):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (height, width), dtype=np.uint8)
    for transform in (TrainTransform(64, NORMALISATION), TestTransform(crop=64)):
        for _ in range(20):
            x, y = transform(image, labels)
            assert x.shape == (64, 64, 3) and y.shape == (64, 64) and set(np.unique(y).tolist()) <= {0, 1, 2, VOID}


def test_flat_logits_have_no_nan():
    "Identical class features give a standard deviation of 0 in the mask norm."
    _, model = networks(Method("mbs"), 1, **TINY)
    for tokens in model.decoder.class_tokens:
        tokens.data.zero_()
    out = model(torch.randn(1, 3, 32, 32))
    assert torch.isfinite(out.logits).all()
    out.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_loss_that_is_not_finite_names_its_pictures(tmp_path, monkeypatch):
    "The error names the iteration and its pictures, and the step is not written."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))

    class Exploding(Method):
        seen = 0

        def loss(self, student, teacher, target, step):
            Exploding.seen += 1
            terms = super().loss(student, teacher, target, step)
            return {k: v * float("nan") for k, v in terms.items()} if Exploding.seen == 14 else terms

    settings = Settings(name="run", samples=0)
    with pytest.raises(
        ValueError, match=r"the loss of step 0 is nan in iteration 14 \(pictures (.*)\): expected a finite number"
    ) as failure:
        Experiment(settings, method=Exploding).run()
    setup = Setup(settings)
    view = StepView(setup.train, setup.protocol[0], TestTransform(), NORMALISATION, positions=setup.positions[0])
    drawn = Draws(view, 8, settings.seed).ids(13)
    assert len(drawn) == 8 and ", ".join(drawn) in str(failure.value)
    assert load_run(tmp_path / "outputs" / "run").n_steps == 0


def test_test_pictures_among_the_training_pictures(tmp_path):
    "The same name in both parts is an error; the same picture under another name is a loud warning."
    root = tmp_path / "data"
    write_scenes(root, n_train=4, n_test=2, size=32)
    lists = root / "ImageSets" / "Segmentation"
    seen = (lists / "trainaug.txt").read_text().split()[1]
    for photo in (root / "JPEGImages").glob(f"{seen}.*"):
        shutil.copy(photo, photo.with_stem("copy"))
    shutil.copy(root / "SegmentationClassAug" / f"{seen}.png", root / "SegmentationClassAug" / "copy.png")
    with open(lists / "val.txt", "a") as f:
        f.write("copy\n")
    with pytest.warns(UserWarning, match=f"1 test photos of .* are training photos, too, e.g. 'copy' is '{seen}'"):
        open_data(str(root))
