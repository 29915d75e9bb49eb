"Dictionaries of parameters are merged, replaced only when asked, stored exactly, and shown with their sources."

import json
from inspect import signature
from typing import Any

import nbformat
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as plan
from hypothesis import strategies as some
from timm import create_model
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from mbs.cli import app
from mbs.experiment import Experiment
from mbs.folders import find_runs_folder
from mbs.grid import expand_grid, read_grid
from mbs.methods import Method
from mbs.notebooks import execute_notebook
from mbs.parameter_files import list_built_in, merge_parameters, parse_words, read_parameters
from mbs.parts import Parts
from mbs.recipe import Recipe, make_recipe
from mbs.run import load_run
from mbs.scenes import write_scenes
from mbs.segmenter import MaskTransformer
from mbs.settings import Settings, settings_from_notebook
from mbs.setup import trace_parameters

DEFAULTS = {name: f.default for name, f in Settings.model_fields.items() if isinstance(f.default, dict)}
NEW = dict(scenes="seed", parts="threshold", memory="size", encoder_options="mlp_ratio", decoder="depth", training="lr")
BRIEF = dict(replace=True, crop=32, batch=4, iterations=2)  # and the optimiser of `Recipe`, not that of `Settings`


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def from_file(group, values):
    with open("own.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump({group: values}, file)
    return Settings.from_layers(read_parameters("own.yaml"))


def from_words(group, values):
    return Settings.from_layers(parse_words([f"{group}.{name}={json.dumps(value)}" for name, value in values.items()]))


def from_word(group, values):
    return Settings.from_layers(parse_words([f"{group}={json.dumps(values)}"]))


def from_grid(place, group, values):
    places = dict(parameters={group: values}, runs=[{group: values}], grid={group: [values]})
    (made,) = expand_grid(read_grid(dict(name="x", grid=dict(seed=[0])) | {place: places[place]}))
    return made


WAYS = {
    "Python": lambda group, values: Settings(**{group: values}),
    "a name with dots": lambda group, values: Settings(**{f"{group}.{name}": value for name, value in values.items()}),
    "checked": lambda group, values: Settings.checked(**{group: values}),
    "a file": from_file,
    "words": from_words,
    "one word": from_word,
    "a notebook": lambda group, values: settings_from_notebook({group: values}),
    "parameters of a batch": lambda group, values: from_grid("parameters", group, values),
    "runs of a batch": lambda group, values: from_grid("runs", group, values),
}


def test_every_dictionary_is_tried():
    assert NEW.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", NEW)
def test_a_dictionary_changes_only_what_it_names(way, group):
    settings = WAYS[way](group, {NEW[group]: 1})
    assert getattr(settings, group) == DEFAULTS[group] | {NEW[group]: 1}
    assert all(getattr(settings, other) == DEFAULTS[other] for other in DEFAULTS if other != group)
    assert getattr(WAYS[way](group, {}), group) == DEFAULTS[group]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", NEW)
def test_replace_starts_a_dictionary_anew(way, group):
    settings = WAYS[way](group, {"replace": True, NEW[group]: 1})
    assert getattr(settings, group) == {NEW[group]: 1}
    with pytest.raises(ValueError, match="replace cannot be False: expected true"):
        WAYS[way](group, {"replace": False})


def test_one_word_changes_one_number_of_a_run():
    plain, changed = Settings(method="kd"), Settings.from_layers(parse_words(["method=kd", "training.lr=1e-2"]))
    before, after = (make_recipe(s.recipe, **s.training) for s in (plain, changed))
    assert after == before.model_copy(update=dict(lr=0.01))
    assert (after.crop, after.batch, after.optimizer, after.iterations) == (48, 8, "adamw", 20)


def test_a_new_dictionary_of_settings_is_merged_without_more_code():
    class More(Settings):
        memory: dict[str, Any] = dict(size=0, choice="random")

    assert More(memory=dict(size=5)).memory == dict(size=5, choice="random")
    assert More.from_layers(dict(memory=dict(size=5)), {"memory.choice": "x"}).memory == dict(size=5, choice="x")
    replaced = More(memory=dict(replace=True, size=5))
    assert replaced.memory == dict(size=5) and More(**replaced.model_dump()) == replaced


def test_layers_are_merged_in_order():
    demo = read_parameters("demo")
    settings = Settings.from_layers(demo, parse_words(["training.lr=1", "scenes.seed=3"]))
    assert settings.training == demo["training"] | dict(lr=1) and settings.scenes == demo["scenes"] | dict(seed=3)
    (run,) = expand_grid(
        read_grid(
            dict(
                name="x",
                base="demo",
                parameters=dict(training=dict(lr=1), decoder=dict(replace=True, depth=1)),
                runs=[dict(training=dict(replace=True, batch=2))],
                grid={"training.crop": [32]},
            )
        )
    )
    assert run.training == dict(batch=2, crop=32) and run.decoder == dict(depth=1)


def test_the_order_of_words_does_not_matter():
    words = ["training.lr=1", "training.replace=true", "encoder_options.drop_rate=0.5", "encoder=resnet18"]
    one, other = (Settings.from_layers(parse_words(w)) for w in (words, words[::-1]))
    assert one == other and one.training == dict(lr=1) and one.encoder_options == dict(drop_rate=0.5)


def test_no_option_is_called_replace():
    models, functions = (Recipe, Parts, Settings), (MaskTransformer, VisionTransformer, create_model, write_scenes)
    names = {name for model in models for name in model.model_fields}
    names |= {name for function in functions for name in signature(function).parameters}
    assert "depth" in names and "replace" not in names
    with pytest.raises(ValueError, match="'replace' is not known"):
        Settings.checked(replace=True)


# --- values that lose their sense under a higher layer


def test_options_belong_to_the_encoder_that_they_are_given_with():
    small = dict(encoder="vit_small_patch16_224", encoder_options=dict(depth=3))
    assert Settings(encoder="resnet18").encoder_options == {}
    assert Settings(encoder="vit_tiny_patch16_224").encoder_options == DEFAULTS["encoder_options"]
    assert Settings(**small).encoder_options == dict(depth=3)
    assert Settings.from_layers(small, {"encoder_options.num_heads": 2}).encoder_options == dict(depth=3, num_heads=2)
    assert Settings.from_layers(small, dict(encoder="resnet18")).encoder_options == {}
    # a file with another encoder hides the options of the default encoder, too
    assert Settings.from_layers(small, dict(encoder="vit_tiny_patch16_224")).encoder_options == {}
    anywhere = dict(encoder_options=dict(drop_rate=0.1))  # names no encoder, so it is for any
    assert Settings.from_layers(anywhere, dict(encoder="resnet18")).encoder_options == dict(drop_rate=0.1)
    assert settings_from_notebook(dict(encoder="resnet18", encoder_options={})).encoder_options == {}


def test_epochs_take_the_place_of_iterations_below():
    def count(*layers):
        training = Settings.from_layers(*layers).training
        return training.get("epochs"), training.get("iterations")

    assert count({}) == (None, 20)
    assert count({"training.epochs": 3}) == (3, None)
    assert count(read_parameters("demo"), {"training.epochs": 3}) == (3, None)
    assert count({"training.epochs": 3}, {"training.iterations": 5}) == (3, 5)  # iterations decide
    assert count({"training.epochs": 3, "training.iterations": 5}) == (3, 5)
    assert count({"training.iterations": 5}, {"training.lr": 1}) == (None, 5)


# --- built-in files


@pytest.mark.parametrize("name", [name for name in list_built_in() if name not in ("demo", "voc-animals")])
def test_published_files_are_the_published_recipe(name):
    for settings in (Settings(**read_parameters(name)), Settings.from_layers(read_parameters(name))):
        assert settings.training == {} and settings.encoder_options == {} and settings.decoder == {}
        assert make_recipe(settings.recipe, settings.data, **settings.training) == make_recipe("paper", settings.data)


@pytest.mark.parametrize("name", ["demo", "voc-animals"])
def test_files_with_a_recipe_of_their_own_take_nothing_from_the_defaults(name):
    values = read_parameters(name)
    settings = Settings(**values)
    assert settings.training == values["training"] and settings.decoder == values["decoder"]
    assert settings.encoder_options == {k: v for k, v in values["encoder_options"].items() if k != "replace"}


# --- stored runs


PLAIN = (
    some.none()
    | some.booleans()
    | some.integers(-9, 9)
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text("ab", max_size=3)
)
KEYS = some.sampled_from(["crop", "batch", "epochs", "iterations", "optimizer", "patch_size", "depth", "lr"])
GROUPS = some.dictionaries(KEYS, PLAIN | some.dictionaries(KEYS, PLAIN, max_size=2), max_size=4)
MARKED = some.builds(lambda group, marked: group | (dict(replace=True) if marked else {}), GROUPS, some.booleans())
ENCODERS = some.sampled_from(["vit_tiny_patch16_224", "resnet18"])
LAYERS = some.fixed_dictionaries(
    {},
    optional=dict(training=MARKED, encoder_options=MARKED, decoder=MARKED, encoder=ENCODERS, seed=some.integers(0, 5)),
)


@plan(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(some.lists(LAYERS, max_size=3))
def test_a_dump_gives_the_same_settings(layers):
    settings = Settings.from_layers(*layers)
    assert Settings(**settings.model_dump()) == settings
    assert Settings.checked(**json.loads(settings.model_dump_json())) == settings
    assert settings_from_notebook(settings.model_dump(mode="json")) == settings
    assert all("replace" not in getattr(settings, group) for group in DEFAULTS)


def test_a_dump_may_leave_fields_out():
    dump = Settings(training=dict(replace=True)).model_dump(exclude={"encoder"})
    assert "encoder" not in dump and dump["training"] == dict(replace=True)
    assert Settings().model_dump(mode="json")["training"] == DEFAULTS["training"]


def test_a_stored_run_keeps_its_meaning(home):
    "A run.json without the key `replace`, as earlier versions wrote it, is read as it is, and the run can be resumed."
    settings = Settings(name="old", samples=0, training=BRIEF, parts=dict(threshold=0.8))
    run = Experiment(settings).run()
    file = run.folder / "run.json"
    card = json.loads(file.read_text())
    assert card["settings"]["training"].pop("replace") is True
    file.write_text(json.dumps(card))
    stored = load_run(run.folder)
    assert stored.settings == settings and stored.settings.training == {k: BRIEF[k] for k in BRIEF if k != "replace"}
    assert stored.card.recipe.optimizer == make_recipe(**stored.settings.training).optimizer == "sgd"
    assert Experiment(settings).run().finished and Experiment(stored.settings).run().finished
    merged = {k: v for k, v in BRIEF.items() if k != "replace"}
    with pytest.raises(ValueError, match=r"holds another run \(settings\.training: .*, recipe\.optimizer: 'sgd' there"):
        Experiment(Settings(name="old", samples=0, training=merged, parts=dict(threshold=0.8))).run()


def test_a_notebook_and_a_child_process_get_exactly_the_settings_of_a_run(home):
    "Dictionaries that lack defaults pass through papermill and through the YAML file of a launch unchanged."
    train = nbformat.read(find_runs_folder() / "train.ipynb", 4)
    read = "from mbs.settings import settings_from_notebook\nprint(settings_from_notebook(globals()).model_dump_json())"
    parameters = next(cell for cell in train.cells if "parameters" in cell.metadata.get("tags", []))
    train.cells = [parameters, nbformat.v4.new_code_cell(read)]
    nbformat.write(train, home / "read.ipynb")
    settings = Settings(training=BRIEF, encoder="resnet18", decoder=dict(depth=1), scenes=dict(replace=True, size=32))
    execute_notebook(home / "read.ipynb", home / "out.ipynb", settings.model_dump(mode="json"))
    printed = nbformat.read(home / "out.ipynb", 4).cells[-1].outputs[0]["text"]
    assert Settings.checked(**json.loads(printed)) == settings
    assert Settings.checked(**yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))) == settings


# --- mbs run --print-config


def call(*words):
    result = CliRunner().invoke(app, ["run", *words], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output


def test_print_config_shows_every_parameter_with_its_source_and_runs_nothing(home):
    text = call("demo", "method=kd", "training.lr=1e-2", "--print-config")
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["training.lr"] == ["training.lr", "0.01", "command", "line"]
    assert lines["training.crop"] == ["training.crop", "64", "file", "demo"]
    assert lines["training.momentum"] == ["training.momentum", "0.9", "default"]
    assert lines["parts.output_distillation"] == ["parts.output_distillation", "plain", "method", "kd"]
    assert lines["decoder.drop_path"] == ["decoder.drop_path", "0", "file", "demo"]
    assert lines["decoder.depth"] == ["decoder.depth", "2", "default"]
    assert lines["seed"] == ["seed", "0", "default"]
    wanted = {f"training.{name}" for name in Recipe.model_fields} | {f"parts.{name}" for name in Parts.model_fields}
    assert wanted | Settings.model_fields.keys() - DEFAULTS.keys() <= lines.keys()
    assert max(map(len, text.splitlines())) <= 80
    assert not any(home.iterdir())


def test_print_config_names_recipe_and_data_set(home):
    "The data need not be there."
    rows = {row.name: row for row in trace_parameters({"file ade": read_parameters("ade-100-10-overlapped")})}
    assert rows["training.test"] == ("training.test", "crop", "recipe paper")
    assert rows["training.epochs"] == ("training.epochs", 64, "data set ade")
    assert rows["parts.output_weight"] == ("parts.output_weight", 50, "data set ade")
    assert rows["encoder_options"] == ("encoder_options", {}, "file ade")
    assert "scenes.size" not in rows
    assert "data set ade" in call("ade-100-10-overlapped", "--print-config")


def test_traced_values_are_those_of_the_run():
    layers = {"file demo": read_parameters("demo"), "command line": {"method": "plop", "training.epochs": 2}}
    settings = Settings.from_layers(*layers.values())
    traced = {row.name: row.value for row in trace_parameters(layers)}
    recipe, parts = make_recipe(settings.recipe, 8, **settings.training), Method("plop", 8).parts
    assert {k: traced[f"training.{k}"] for k in Recipe.model_fields} == recipe.model_dump()
    assert {k: traced[f"parts.{k}"] for k in Parts.model_fields} == parts.model_dump()
    assert traced["training.iterations"] is None and traced["name"] == settings.name


@pytest.mark.parametrize("words", [["training.epoch=3"], ["parts.tau=1"], ["metod=kd"], ["data=nowhere"], ["nosuch"]])
def test_print_config_refuses_what_a_run_refuses(words):
    result = CliRunner().invoke(app, ["run", *words, "--print-config"])
    assert result.exit_code == 2 and result.stderr.startswith("mbs: ") and "Traceback" not in result.output


def test_the_built_in_notebook_changes_no_default():
    cells = json.loads((find_runs_folder() / "train.ipynb").read_text())["cells"]
    cell = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    variables = {}
    exec("".join(cell["source"]), {}, variables)
    assert settings_from_notebook(variables) == Settings()
    assert settings_from_notebook(variables | dict(encoder="resnet18")).encoder_options == {}


def test_merging_keeps_its_arguments():
    base, change = dict(training=dict(scale=[1, 2])), dict(training=dict(lr=1))
    merged = merge_parameters(base, change)
    merged["training"]["scale"].append(3)
    assert base == dict(training=dict(scale=[1, 2])) and change == dict(training=dict(lr=1))
