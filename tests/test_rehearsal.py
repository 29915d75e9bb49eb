"What would stop a run is found out before its notebook starts, once for each kind of network and data."

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mbs.batch
import mbs.rehearsal
from mbs.batch import Batch, prepare_experiment
from mbs.cli import app
from mbs.layouts import describe_folder
from mbs.parts import METHODS
from mbs.rehearsal import Rehearsal, load_first_batch, pass_network, probe_folder
from mbs.settings import Settings
from mbs.setup import Setup

TINY = dict(
    protocol="6-2",
    scenes=dict(n_train=16, n_test=2, size=32),
    samples=0,
    encoder="vit_tiny_patch16_224",
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
    decoder=dict(depth=1),
    training=dict(crop=32, batch=4, iterations=2),
)


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))


def make_setup(**changes):
    return Setup(Settings.from_layers(TINY, changes))


BEIT = dict(depth=1, embed_dim=32, num_heads=2)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(encoder="resnet18", encoder_options=dict(in_chans=1)), r"crops of 32 × 32 pixels, 2 at a time .*channel"),
        (dict(encoder="convnext_atto", encoder_options=dict(in_chans=4)), "crops of 32 × 32 pixels"),
        (
            {"encoder": "resnet18", "training.crop": 16, "training.batch": 1},
            "16 × 16 pixels, 1 at a time .*1 value per",
        ),
        (dict(encoder="beit_base_patch16_224", encoder_options=BEIT), "crops of 32 × 32 pixels, 2 .*match model .224"),
        (
            {"encoder": "beit_base_patch16_224", "encoder_options": BEIT, "training.crop": 224},
            "whole test pictures of 32 × 32 pixels, 1 at a time",
        ),
        (dict(processes=3), "a batch of 4 pictures cannot be shared by 3 processes"),
        (
            {"training.batch": 64, "processes": 2, "scenes.n_train": 17, "protocol": "offline"},
            "cannot be shared by 2 proc",
        ),
    ],
    ids=str,
)
def test_what_a_network_cannot_do_is_refused(changes, says):
    setup = make_setup(**changes)
    with pytest.raises(ValueError, match=says) as refused:
        pass_network(setup, setup.model())
    assert "\n" not in str(refused.value) and ": expected" in str(refused.value)


@pytest.mark.parametrize("crop", [16, 40, 512])
@pytest.mark.parametrize(
    "encoder, options",
    [
        ("vit_tiny_patch16_224", dict(depth=1)),
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1))),
    ],
)
def test_what_a_network_can_do_is_not(encoder, options, crop):
    setup = make_setup(**{"encoder": encoder, "encoder_options": options, "training.crop": crop})
    pass_network(setup, setup.model())


def test_a_network_that_cannot_be_followed_is_computed(monkeypatch):
    setup, tried = make_setup(**{"training.crop": 320}), []

    def fail(network, *shape):
        tried.append(shape)
        raise NotImplementedError("no fake tensors")

    monkeypatch.setattr(mbs.rehearsal, "_follow_zeros", fail)
    pass_network(setup, setup.model())
    assert tried == [(2, 3, 320, 320)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_rehearsed_with_the_same_network(method):
    rehearsal, setup = Rehearsal(), make_setup(method=method)
    rehearsal.try_out(setup, setup.model())
    assert len(rehearsal.passed) == 2


def make_own_folder(root):
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for k in range(6):
        Image.fromarray(np.full((40, 40, 3), 30 * k, np.uint8)).save(root / "images" / f"{k}.png")
        Image.fromarray(np.full((40, 40), 1 + k % 2, np.uint8)).save(root / "masks" / f"{k}.png")
    describe_folder(root, ["a", "b"], test=["5"])
    return str(root)


def test_a_picture_that_cannot_be_read_is_found_before_the_run(tmp_path):
    data = make_own_folder(tmp_path / "own")
    setup = make_setup(data=data, protocol="1-1", recipe="clean")
    network = setup.model()
    load_first_batch(setup, network)
    (tmp_path / "own/images/0.png").write_bytes(b"no picture any more")
    with pytest.raises(ValueError, match=r"0\.png"):
        load_first_batch(setup, network)


def test_the_command_refuses_before_it_starts_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(mbs.batch, "execute_notebook", None)
    words = ["protocol=6-2", "name=r", "encoder=resnet18", "encoder_options={in_chans: 1}", "training.crop=32"]
    refused = CliRunner().invoke(app, ["run", *words])
    assert refused.exit_code == 2 and refused.stderr.startswith("mbs: encoder 'resnet18' with options {'in_chans': 1}")
    assert not (tmp_path / "outputs").exists()
    (tmp_path / "outputs").write_text("a file")
    refused = CliRunner().invoke(app, ["run", "protocol=6-2", "training.crop=32"])
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr


def test_a_batch_tries_each_network_once(monkeypatch):
    tried = []
    monkeypatch.setattr(mbs.rehearsal, "pass_network", lambda *_: tried.append("network"))
    monkeypatch.setattr(mbs.rehearsal, "load_first_batch", lambda *_: tried.append("batch"))
    grid = dict(method=["finetune", "kd"], seed=[0, 1], **{"decoder.depth": [1, 2]})
    Batch(dict(name="b", parameters=TINY, grid=grid))
    assert sorted(tried) == ["batch", "network", "network"]


def test_a_finished_run_is_not_rehearsed(monkeypatch):
    from mbs.experiment import Experiment

    settings = Settings.from_layers(TINY, dict(name="done", method="finetune"))
    Experiment(settings).run()
    monkeypatch.setattr(mbs.batch, "Rehearsal", None)
    assert prepare_experiment(settings).folder.name == "done"


def test_a_folder_is_written_once(tmp_path):
    probe_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file/x", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"cannot be written .*: expected space and write permission"):
            probe_folder(wrong)
