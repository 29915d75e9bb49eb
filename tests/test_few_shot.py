"Runs of uneven and few-shot steps: every way to write them, the pictures they train on, names, cards and reports."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mbs.cli import app
from mbs.comparison import group_runs
from mbs.experiment import Experiment
from mbs.grid import Grid, expand_grid, read_grid
from mbs.parameter_files import parse_words, read_parameters
from mbs.report import write_report
from mbs.run import load_run
from mbs.settings import Settings, settings_from_notebook
from mbs.setup import Setup

NETWORK = dict(encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1), decoder=dict(depth=1), samples=1)
SHORT = dict(crop=32, batch=2, epochs=1, optimizer="adamw")
SCENES = dict(n_train=60, n_test=8, size=32)
FEW = NETWORK | dict(scenes=SCENES, protocol=[4, 3, 1], shots=2, training=SHORT)


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))


def test_every_way_to_write_a_list_gives_the_same_run(tmp_path):
    "Python, words of a command, YAML in block and in line style, variables of a notebook."
    expected = Settings(protocol="3-1-2")
    (tmp_path / "block.yaml").write_text("protocol:\n- 3\n- 1\n- 2\n")
    (tmp_path / "line.yaml").write_text("protocol: [3, 1, 2]\n")
    (tmp_path / "text.yaml").write_text("protocol: 3-1-2\n")
    parameters = [read_parameters(tmp_path / f"{name}.yaml") for name in ("block", "line", "text")]
    parameters += [parse_words([f"protocol={text}"]) for text in ("[3,1,2]", "[3, 1, 2]", "3-1-2", "'3-1-2'")]
    assert all(Settings.checked(**values) == expected for values in parameters)
    assert settings_from_notebook(dict(protocol=[3, 1, 2])) == expected
    assert expected.name == "scenes-3-1-2-overlapped-mbs-s0"
    assert Settings.checked(**json.loads(expected.model_dump_json())) == expected


def test_names_tell_protocols_and_shots_apart():
    choices = ("5-1", [5, 1], [5, 1, 2], [8]), (None, 1, 5)
    names = {Settings(protocol=p, shots=n).name for p in choices[0] for n in choices[1]}
    assert len(names) == 12 and "scenes-5-1-overlapped-mbs-s0" in names
    assert "scenes-5+1-overlapped-mbs-shots=5-s0" in names
    grid = dict(name="toy", grid=dict(protocol=list(choices[0]), shots=[1, 5]))
    names = [s.name.removeprefix("toy/") for s in expand_grid(read_grid(grid))]
    assert names[:4] == ["5-1-shots=1", "5-1-shots=5", "5+1-shots=1", "5+1-shots=5"] and len(set(names)) == 8
    assert [s.protocol for s in expand_grid(Grid(name="toy", runs=[dict(protocol=[3, 1, 2])]))] == ["3-1-2"]


def test_a_grid_over_single_numbers_says_what_a_list_is():
    with pytest.raises(ValueError, match=r"protocol 3 is not known: .*such as \[3, 1, 2\]"):
        expand_grid(Grid(name="toy", grid=dict(protocol=[3, 1, 2])))
    with pytest.raises(ValueError, match=r"^protocol 20 is not known"):
        Settings.checked(protocol=20)
    for shots in (0, -1, 1.5, "five"):
        with pytest.raises(ValueError, match="'shots'"):
            Settings.checked(shots=shots)


@pytest.mark.parametrize("setting", ["overlapped", "disjoint", "sequential", "partitioned"])
def test_later_steps_see_few_pictures_and_the_base_step_all(setting):
    "In every setting; with the same seed one shot is among two, and the iterations follow the pictures."
    scenes = SCENES | dict(n_train=400)
    values = NETWORK | dict(scenes=scenes, setting=setting, protocol="3-3-2", training=SHORT | dict(epochs=3))
    every, two, one = (Setup(Settings(**values, shots=n)) for n in (None, 2, 1))
    assert one.positions[0].tolist() == two.positions[0].tolist() == every.positions[0].tolist()
    for step in list(two.protocol)[1:]:
        few, all_ = two.positions[step.number], every.positions[step.number]
        assert set(one.positions[step.number]) < set(few) < set(all_)
        assert (two.train.index[few][:, list(step.classes)].sum(0) == 2).all()
    assert two.iterations() == [3 * max(1, len(p) // 2) for p in two.positions]
    assert every.iterations()[1:] > two.iterations()[1:]
    other = Setup(Settings(**values, shots=2, seed=1))
    assert other.positions[1].tolist() != two.positions[1].tolist()


def test_held_out_pictures_are_among_the_shots():
    values = NETWORK | dict(scenes=SCENES, protocol="6-2", shots=10)
    whole = Setup(Settings(**values, training=SHORT))
    parted = Setup(Settings(**values, training=SHORT | dict(selection="held-out", held_out=0.3)))
    assert len(parted.held_out[1]) and not set(parted.held_out[1]) & set(parted.positions[1])
    assert sorted({*parted.held_out[1], *parted.positions[1]}) == whole.positions[1].tolist()


def test_too_few_pictures_of_a_class_are_counted():
    "The run works, and a warning says how many pictures each such class has."
    with pytest.warns(UserWarning, match="step 1 draws fewer than shots=50 pictures") as caught:
        few = Setup(Settings(**FEW | dict(shots=50)))
    message = next(str(w.message) for w in caught if "step 1 draws" in str(w.message))
    counts = few.train.index[few.positions[1]].sum(0)
    for class_id in few.protocol[1].classes:
        assert f"{counts[class_id]} of {few.names[class_id]}" in message
    assert few.positions[1].tolist() == Setup(Settings(**FEW | dict(shots=None))).positions[1].tolist()


def test_joint_training_sees_all_pictures():
    joint = Setup(Settings(**FEW | dict(method="joint")))
    assert [len(p) for p in joint.positions] == [len(joint.protocol[0].select(joint.train.index))]


def test_few_shot_runs_share_the_base_step_and_are_reported(tmp_path):
    "Card, report and folders show the shots; another number of shots is another run."
    runs = [
        Experiment(Settings(**FEW | dict(name=f"few{n}", shots=n, method="finetune")), tmp_path / "outputs").run()
        for n in (None, 1, 2)
    ]
    every, one, two = runs
    assert len({run.card.base for run in runs}) == 1 and one.metrics(0)["base_from"] == every.folder.name
    assert one.card.images[1] <= 3 and one.card.images[2] == 1 and two.card.images[2] == 2
    assert one.card.images[0] == every.card.images[0] and one.settings.shots == 1
    assert one.card.settings.protocol == "4-3-1" and "4-3-1, overlapped, 1 shot" in one._repr_html_()
    with pytest.raises(ValueError, match=r"settings\.shots: 1 there, 2 now"):
        Experiment(Settings(**FEW | dict(name="few1", shots=2, method="finetune")), tmp_path / "outputs").run()
    titles = [group.title for group in group_runs(runs)]
    assert titles == [f"scenes · 4-3-1 · overlapped{shots}" for shots in ("", ", 1 shot", ", 2 shots")]
    text = (write_report(runs, tmp_path / "report") / "summary.md").read_text(encoding="utf-8")
    images = ", ".join(map(str, two.card.images))
    assert "at most 2 pictures of each new class" in text and f"| 2 | {images} |" in text


def test_the_command_runs_a_list_with_shots_on_two_processes(tmp_path, put_namesakes):
    "The notebook receives the list as text; both processes draw the same pictures as one, in a folder of bad names."
    (tmp_path / "here").mkdir()
    put_namesakes(tmp_path / "here")
    words = ["encoder_options={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}", "decoder.depth=1", "samples=1"]
    words += ["scenes={n_train: 60, n_test: 8, size: 32}", "training={crop: 32, batch: 2, iterations: 2}", "shots=2"]
    command = [Path(sys.executable).with_name("mbs"), "--home", tmp_path, "run", "protocol=[6,2]", "name=two"]
    here = dict(cwd=tmp_path / "here", timeout=600)
    subprocess.run([*command, "processes=2", *words], check=True, capture_output=True, **here)
    two = load_run(tmp_path / "outputs" / "two")
    one = Experiment(Settings.checked(**parse_words(words), protocol=[6, 2], share_base=False)).run()
    assert two.finished and two.settings.protocol == "6+2" and two.card.images == one.card.images
    assert np.allclose([r["loss"] for r in one.log()], [r["loss"] for r in two.log()], rtol=0.01)
    refused = CliRunner().invoke(app, ["--home", str(tmp_path), "run", "protocol=[5,1]", *words])
    assert refused.exit_code == 2 and "brings 6 classes in 2 steps" in refused.output
