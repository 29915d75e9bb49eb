"""The recipe of a folder of pictures: chosen unless another is named, and fitted to the pictures.

That a newcomer's run learns its new classes is checked by the tutorial own_data."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mbs import Settings, describe_folder
from mbs.cli import app
from mbs.recipe import RECIPES, fit_recipe
from mbs.scenes import draw_scene
from mbs.settings import settings_from_notebook
from mbs.setup import Setup, trace_parameters

NAMES = ["ball", "leaf", "mushroom", "fish"]


def write_folder(folder, n=40, size=64, first=0):
    "Write `n` scenes as photos and masks, with four of their eight kinds as classes."
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for k in range(n):
        photo, mask = draw_scene(np.random.default_rng(first + k), size)
        Image.fromarray(photo).save(folder / f"images/scene{k:03d}.jpg", quality=95)
        Image.fromarray(np.where(mask > 4, 0, mask).astype(np.uint8)).save(folder / f"masks/scene{k:03d}.png")
    describe_folder(folder, NAMES, test=0.2)
    return str(folder)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    return write_folder(tmp_path / "mine")


def test_a_folder_gets_its_own_recipe_unless_another_is_named(mine):
    assert Settings(data=mine).recipe == "own" and Settings(data=mine).training == {}
    assert Settings(data=mine, recipe="clean").recipe == "clean"
    assert Settings(data=mine, recipe="clean").training == {}  # the smoke run's crop suits generated scenes only
    assert [Settings(data=name).recipe for name in ("scenes", "voc", "ade")] == ["clean"] * 3
    assert Settings(recipe="own").training == {} and Settings().training
    assert settings_from_notebook(dict(data=mine, recipe=None, training={})).recipe == "own"
    file = dict(recipe="paper", training=dict(batch=4))
    layered = Settings.from_layers(file, dict(data=mine))
    assert layered.recipe == "paper" and layered.training == dict(batch=4)


def test_settings_survive_their_dump(mine):
    for settings in (Settings(data=mine), Settings(data=mine, recipe="clean"), Settings(recipe="own"), Settings()):
        assert Settings.checked(**settings.model_dump()) == settings


@pytest.mark.parametrize(
    "sizes, memory, crop, batch",
    [
        ([[64, 64]], 2**40, 64, 16),
        ([[375, 500], [500, 333], [480, 640]], 2**40, 368, 16),
        ([[3000, 4000]], 2**40, 512, 16),
        ([[10, 90]], 2**40, 32, 16),
        ([[512, 512]], 2 * 8 * 512**2 * 4096, 512, 8),
        ([[512, 512]], 1, 512, 2),
    ],
)
def test_crop_and_batch_follow_pictures_and_memory(sizes, memory, crop, batch):
    fitted = fit_recipe(np.array(sizes), True, memory)
    assert (fitted["crop"], fitted["batch"], fitted["encoder_factor"]) == (crop, batch, (0.1, 0))
    assert fit_recipe(np.array(sizes), False, memory)["encoder_factor"] == (1, 1)


def test_few_pictures_get_the_minimum_of_iterations_and_overrides_count(mine):
    setup = Setup(Settings(data=mine, protocol="2-1"))
    assert setup.recipe.crop == 64 and setup.recipe.token_factor == RECIPES["own"]["token_factor"]
    assert setup.iterations() == [400, 400, 400]
    assert Setup(Settings(data=mine, protocol="2-1", training=dict(batch=2, min_iterations=1))).iterations()[0] > 100
    assert Setup(Settings(data=mine, protocol="2-1", training=dict(crop=48))).recipe.crop == 48


def test_the_configuration_names_the_pictures_as_a_source(mine):
    rows = {row.name: row for row in trace_parameters({"command line": dict(data=mine, protocol="2-1")})}
    assert (rows["recipe"].value, rows["training.crop"].source) == ("own", "the pictures")
    assert (rows["training.token_factor"].source, rows["training.lr"].source) == ("recipe own", "default")


def test_the_command_prints_the_recipe_before_it_runs(mine):
    words = [f"data={mine}", "protocol=3-1", "training.iterations=2", "training.batch=4", "samples=0"]
    found = CliRunner().invoke(app, ["run", *words, "decoder.depth=1", "name=short"])
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[1].startswith("Recipe own: crops of 64 pixels, batches of 4, iterations 2, 2")
    assert "! step 1: the teacher relabels" in found.output
