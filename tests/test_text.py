"Words are text where their field is text, in commands, files, batches and notebooks; and a tilde is the home folder."

import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from typer.testing import CliRunner

from mbs import cli
from mbs.folders import expand_tilde, home
from mbs.grid import Grid, expand_grid, read_grid
from mbs.layouts import Description
from mbs.memory import Memory
from mbs.parameter_files import nest_parameters, parse_words, read_parameters, read_yaml
from mbs.parameters import find_entry_type, takes_none, takes_text
from mbs.parts import Parts
from mbs.recipe import Recipe
from mbs.settings import Settings
from mbs.weights import make_encoder

# what YAML would make something else of, or nothing
WORDS = (
    "007 010 1e3 1E-3 .5 3.10 1_000 0x10 0b1 +1 2024 2024-01-15 2001-99-99 12:30 12:30:00 1:2.5 "
    "on off yes no y n true False null Null ~ .inf .NaN"
).split()
ODD = [
    "a #b",
    "a: b",
    "- a",
    "[a",
    "[a, b]",
    "{a}",
    "@a",
    "%a",
    "&a",
    "*a",
    "!a",
    "| a",
    "> a",
    "? a",
    " a",
    "a ",
    "'a",
]
TEXTS = ["name", "data", "setting", "method", "encoder", "weights", "recipe", "training.optimizer", "memory.selection"]
NOT_TEXT = [
    "seed",
    "shots",
    "protocol",
    "classes",
    "training.lr",
    "training.flip",
    "parts.pseudo_labels",
    "parts.nosuch",
]


def test_types_say_what_is_text():
    assert all(takes_text(find_entry_type(Settings, name)) for name in TEXTS)
    assert not any(takes_text(find_entry_type(Settings, name)) for name in NOT_TEXT)
    for group, model in dict(training=Recipe, parts=Parts, memory=Memory).items():
        for name in model.model_fields:
            assert find_entry_type(Settings, f"{group}.{name}") == find_entry_type(model, name)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TEXTS), st.sampled_from(WORDS + ODD) | st.text(min_size=1, max_size=12))
def test_a_word_of_a_command_is_the_text(name, word):
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        return  # quotes that a shell has left
    group, _, last = name.rpartition(".")
    parsed = parse_words([f"{name}={word}"])
    assert (parsed[group][last] if group else parsed[last]) == word
    quoted = parse_words([f"{name}='{word}'"]) if "'" not in word and word.isprintable() else parsed
    assert quoted == parsed


@pytest.mark.parametrize("style", ["[{}]", "[ {} ]", "['{}']", '["{}"]'])
def test_classes_are_text_in_lists(style):
    for word in WORDS:
        assert parse_words([f"classes={style.format(word)}"]) == dict(classes=[word])
    assert parse_words([f"classes=[{', '.join(WORDS)}]"]) == dict(classes=WORDS)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(WORDS)),
    st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
)
def test_a_file_says_the_same_as_words(tmp_path_factory, values, classes):
    "In block and in line style, under names with dots and in dictionaries. Only null is nothing where it is allowed."
    nothing = {name for name, word in values.items() if word in ("null", "Null", "~")}
    values = {k: v for k, v in values.items() if not (k in nothing and takes_none(find_entry_type(Settings, k)))}
    file = tmp_path_factory.mktemp("files") / "p.yaml"
    expected = parse_words([f"{name}={word}" for name, word in values.items()]) | dict(classes=classes)
    for text in (f"classes: [{', '.join(classes)}]", "classes:\n" + "\n".join(f"- {c}" for c in classes)):
        file.write_text("\n".join([*(f"{name}: {word}" for name, word in values.items()), text]))
        assert nest_parameters(read_parameters(file)) == expected
    groups = {name: group for name, group in expected.items() if isinstance(group, dict)}
    lines = [f"{name}: {{{', '.join(f'{k}: {v}' for k, v in group.items())}}}" for name, group in groups.items()]
    file.write_text("\n".join(lines) or "{}")
    assert read_parameters(file) == groups


def test_nothing_stays_nothing(tmp_path):
    (tmp_path / "p.yaml").write_text("recipe: null\nname:\nshots: null\nclasses: ~\n")
    assert Settings.checked(**read_parameters(tmp_path / "p.yaml")) == Settings()
    assert Settings.checked(**parse_words(["recipe=", "name=", "shots=null", "classes="])) == Settings()
    with pytest.raises(ValueError, match="'encoder' cannot be None: expected text"):
        Settings.checked(**parse_words(["encoder="]))


@pytest.mark.parametrize(
    "word, value",
    [
        ("010", 10),
        ("007", 7),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e3", 1000),
        ("-5", -5),
        ("12:30", "12:30"),
    ],
)
def test_numbers_are_those_that_people_write(word, value, tmp_path):
    (tmp_path / "p.yaml").write_text(f"seed: {word}\nencoder_options: {{a: [{word}]}}\n")
    expected = dict(seed=value, encoder_options=dict(a=[value]))
    assert read_parameters(tmp_path / "p.yaml") == expected
    assert parse_words([f"seed={word}", f"encoder_options.a=[{word}]"]) == expected


@pytest.mark.parametrize(
    "wrong", [dict(name=7), dict(data=True), dict(classes=[True, "a"]), dict(encoder=1e3), dict(weights=None)]
)
def test_values_that_are_no_text_are_refused(wrong):
    "As papermill makes them of a file that it reads itself."
    with pytest.raises(ValueError, match="expected text, in quotes if it looks like a value"):
        Settings.checked(**wrong)


def test_a_batch_reads_its_words_by_the_types_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "007.yaml").write_text("""base: 010.yaml
parameters: {encoder: null, classes: [on, 007]}
runs: [{name: 1e3}, {base: 011.yaml, parts.orthogonality: off}, {weights: 12:30}]
grid: {data: [2024, 2024-01-15], training.optimizer: [on], seed: [010], training.lr: [1e-3]}
""")
    grid = read_grid("007.yaml")
    assert grid.name == "007" and grid.base == "010.yaml"
    assert grid.parameters == dict(encoder="null", classes=["on", "007"])
    assert (
        grid.runs[0] == dict(name="1e3") and grid.runs[1]["base"] == "011.yaml" and grid.runs[2]["weights"] == "12:30"
    )
    assert grid.runs[1]["parts.orthogonality"] is False
    assert grid.grid == {
        "data": ["2024", "2024-01-15"],
        "training.optimizer": ["on"],
        "seed": [10],
        "training.lr": [0.001],
    }
    (tmp_path / "orders.yaml").write_text("orders: [similar-last, 2]")
    assert read_grid("orders.yaml").orders == ["similar-last", "order1", "order2"]
    chosen = expand_grid(Grid(name="on", runs=[dict(name="1e3"), dict(name="012")], grid=dict(seed=[0, 1])))
    written = Grid(
        name="on", runs=[dict(classes=["1e3", "on"])], grid={"training.lr": ["1e-3"], "memory.size": ["1e1"]}
    )
    ((entry, point),) = written.points()  # from Python
    assert entry == dict(classes=["1e3", "on"]) and point == {"training.lr": 0.001, "memory.size": 10}
    assert [one.name for one in chosen] == ["on/1e3-s0", "on/1e3-s1", "on/012-s0", "on/012-s1"]


def test_a_description_is_text(tmp_path):
    lines = ["classes: [on, 007, 12:30]", "test: [001, 2024-01-15]", "colours: {on: [1, 2, 3], 007: [4, 5, 6]}"]
    (tmp_path / "dataset.yaml").write_text("\n".join(lines))
    read = Description.checked(**read_yaml(tmp_path / "dataset.yaml", Description))
    assert read.classes == ["on", "007", "12:30"] and read.test == ["001", "2024-01-15"]
    assert list(read.colours) == ["on", "007"]
    (tmp_path / "dataset.yaml").write_text("classes: [a]\ntest: 0.5")
    assert read_yaml(tmp_path / "dataset.yaml", Description)["test"] == 0.5
    for classes in (WORDS, ODD):  # as `describe_folder` writes them
        (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(dict(classes=classes), allow_unicode=True))
        assert read_yaml(tmp_path / "dataset.yaml", Description)["classes"] == classes


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS + ODD) | st.text(max_size=8), min_size=3, max_size=3))
def test_a_notebook_receives_the_text(words):
    given_ = Settings(name="a", data=words[0], classes=words[1:], weights=words[0]).model_dump(mode="json")
    received = {}
    exec(PythonTranslator.codify(given_), received)
    assert {name: received[name] for name in given_} == given_


@pytest.mark.parametrize("word", ["2024-01-15", "007", "3.10", "12:30:00", "1e3", "on", "null"])
def test_a_command_takes_names_as_typed(word, monkeypatch):
    shown = CliRunner().invoke(cli.app, ["run", f"name={word}", "--print-config"])
    assert shown.exit_code == 0 and ["name", word, "command", "line"] in map(str.split, shown.output.splitlines())


@pytest.mark.parametrize("data", [".", "-x", "/", "a/-b", "..."])
def test_no_name_of_a_run_looks_like_an_option(data):
    assert not Settings(data=data, recipe="clean").name.startswith(("-", "."))
    with pytest.raises(ValueError, match="parameter 'name' cannot be"):
        Settings.checked(name=data)
    with pytest.raises(ValueError, match="parameter 'name' cannot be"):
        Grid.checked(name=data)


def list_path_parameters(app):
    "Return command, parameter and marks of every argument and option that is a path."
    commands = {c.callback.__name__: c.callback for c in app.registered_commands}
    commands |= {g.callback.__name__: g.callback for g in [app.registered_callback] if g}
    for command, function in commands.items():
        for name, annotation in typing.get_type_hints(function, include_extras=True).items():
            kind, *marks = typing.get_args(annotation) or (annotation,)
            if "Path" in str(kind):
                yield command, name, marks[0]


def test_every_path_of_the_command_line_may_begin_with_a_tilde():
    found = [*list_path_parameters(cli.app), *list_path_parameters(cli.data)]
    assert len(found) >= 19 and {command for command, *_ in found} >= {"main", "predict", "voc", "ade", "coco"}
    assert all(mark.parser is expand_tilde for _, _, mark in found)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MBS_HOME", "elsewhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("seed: 3")
    shown = CliRunner().invoke(cli.app, ["--home=~/there", "run", "~/p.yaml", "--print-config"])
    assert shown.exit_code == 0 and "file p.yaml" in shown.output
    assert home("x") == tmp_path / "there/x"
    assert expand_tilde("~") == tmp_path and str(expand_tilde("~nosuch/x")) == "~nosuch/x"
    for words in (["data", "check", "~nosuch"], ["predict", "~/r", "~/a.jpg", "--out=~/out"], ["batch", "~/g.yaml"]):
        refused = CliRunner().invoke(cli.app, words)
        assert refused.exit_code == 2 and refused.stderr.startswith("mbs: ")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/w.pth"):
        make_encoder("resnet18", "~/w.pth", 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.yaml"]
