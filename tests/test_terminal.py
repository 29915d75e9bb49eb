"What a terminal shows: how runs end, how far they are, what is meant by a misspelt name."

import json
import shlex
import sys

import pytest
from typer.testing import CliRunner

import mbs.cli
from mbs.cli import app
from mbs.live import Progress, write_progress


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("my home")


@pytest.fixture(scope="module")
def finished(home):
    "A finished run of the defaults, trained without a notebook."
    from mbs.experiment import Experiment
    from mbs.settings import Settings

    settings = Settings(name="brief", training=dict(iterations=11), scenes=dict(n_train=30, n_test=6, size=48))
    return Experiment(settings, home / "outputs").run()


WORDS = ["run", "name=brief", "training.iterations=11", "scenes.n_train=30", "scenes.n_test=6"]


def call(home, *words):
    answer = CliRunner().invoke(app, ["--home", str(home), *words], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_a_run_ends_with_its_folder_and_commands_to_paste(finished, home, monkeypatch, tmp_path):
    "Also a run that was finished already; the commands are words that lead to its folder."
    monkeypatch.setenv("MBS_HOME", str(home))  # restored after the command has set it
    monkeypatch.chdir(tmp_path)
    lines = call(home, *WORDS).splitlines()
    commands = [shlex.split(line) for line in lines[lines.index("Next:") + 1 :]]
    folder = str(home / "outputs" / "brief")
    assert commands == [["mbs", "--home", str(home), name, folder] for name in ("explore", "report")]
    assert f"Folder: {folder}" in lines
    assert not any(line.startswith("Notebook:") for line in lines)  # it was trained by a call of Python
    monkeypatch.chdir(home)
    assert "Folder: outputs/brief" in call(home, *WORDS).splitlines()


def test_a_command_names_the_program_that_was_called(monkeypatch, tmp_path):
    monkeypatch.setattr(mbs.cli, "_home_words", [])
    program = tmp_path / "bin" / "mbs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mbs.cli._write_command("report") == f"{program} report"
    monkeypatch.setenv("PATH", str(program.parent))
    assert mbs.cli._write_command("report") == "mbs report"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mbs" / "__main__.py")])
    assert mbs.cli._write_command("report") == f"{sys.executable} -m mbs report"


MISSPELT = {
    "run methd=3": "'method'",
    "run lr=1e-3": "'training.lr'",
    "run threshold=0.5": "'parts.threshold'",
    "run parts.treshold=0.5": "'threshold'",
    "run method=MBZ": "'mib' or 'mbs'",
    "run recipe=papr": "'paper'",
    "run setting=overlaped": "'overlapped'",
    "run data=voc protocol=15-l": "'15-1_l'",
    "run voc-15-1": "voc-15-1-disjoint or voc-15-1-overlapped",
    "run scenes.n_trian=3": "'n_train'",
    "batch voc-method": "voc-methods",
    "data check vco": "'voc'",
    "data chekc voc": "'check'",
    "bacth demo": "'batch'",
    "orders --orders similar-fist": "'similar-first'",
}


@pytest.mark.parametrize("words", MISSPELT)
def test_a_misspelt_name_is_met_with_what_was_meant(words):
    answer = CliRunner().invoke(app, words.split())
    assert answer.exit_code == 2
    assert "did you mean " + MISSPELT[words] in answer.output.replace("Did", "did"), answer.output


@pytest.mark.parametrize(
    "changes,meant",
    [
        (dict(encoder="vit_tiny_patch16_244"), "'vit_tiny_patch16_224'"),
        (dict(decoder=dict(dpth=2)), "'depth'"),
        (dict(classes=["strar"]), "'star'"),
    ],
)
def test_what_only_the_setup_knows_is_suggested_too(changes, meant, finished, home, monkeypatch):
    from mbs.settings import Settings
    from mbs.setup import Setup

    monkeypatch.setenv("MBS_HOME", str(home))
    with pytest.raises(ValueError, match=f"is not known: .*did you mean {meant}"):
        setup = Setup(Settings(scenes=finished.settings.scenes, **changes))
        setup.model()


def test_the_built_in_files_are_listed_with_what_they_are():
    answer = CliRunner().invoke(app, ["files"], terminal_width=200)
    assert answer.exit_code == 0
    for line in ("mbs run NAME", "mbs batch NAME", "demo", "voc-methods"):
        assert line in answer.output
    from mbs.parameter_files import describe_built_in

    assert all(meaning for kind in ("protocols", "grids") for meaning in describe_built_in(kind).values())


def inspect(*words):
    answer = CliRunner().invoke(app, ["inspect", *words], terminal_width=120)
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.mark.parametrize("setting,first,second", [("overlapped", "9,568", "487"), ("disjoint", "8,437", "378")])
def test_a_protocol_of_voc_is_inspected_without_its_pictures(tmp_path, monkeypatch, setting, first, second):
    "The pictures of a step are as many as in the lists of the released program."
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    rows = [line.split() for line in inspect("voc", "15-1", "--setting", setting).splitlines()]
    images = {row[0]: row[-7] for row in rows if row and row[0] in ("0", "1") and len(row) > 6}
    assert images == {"0": first, "1": second}
    assert "run mbs data voc before training" in inspect("voc", "15-1")
    assert not list(tmp_path.iterdir())


def test_of_ade_only_the_published_splits_are_known_without_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    assert "20,192" in inspect("ade", "100-10") and "–" in inspect("ade", "100-10")
    answer = CliRunner().invoke(app, ["inspect", "ade", "30-10"])
    assert answer.exit_code == 2 and "run mbs data ade" in answer.output


def test_a_batch_is_planned_without_its_pictures_but_not_run(tmp_path, monkeypatch):
    from mbs.batch import Batch

    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    small = {"encoder": "vit_tiny_patch16_224", "encoder_options": {"embed_dim": 16, "depth": 1, "num_heads": 1}}
    grid = dict(name="plan", base="voc-15-1-overlapped", parameters=small, grid=dict(method=["kd", "mbs"]))
    plan = Batch(grid, may_lack_data=True).plan(measure=False)
    assert [row[3:5] for row in plan.rows] == [("to train", "23,712"), ("from kd", "4,576")]
    assert "without the pictures of voc" in plan.note
    with pytest.raises(ValueError, match="data set 'voc' is not at"):
        Batch(grid)
    assert not list(tmp_path.iterdir())


def test_the_cost_of_a_step_counts_its_tests():
    from mbs.inspect import StepCost
    from mbs.recipe import make_recipe

    cost = StepCost(iteration=2, test=100)
    assert cost.estimate(make_recipe("clean"), 50) == 200
    assert cost.estimate(make_recipe("paper"), 1000) == 2000 + 100 * (1 + 10)


def test_curves_have_times_rates_throughput_and_pictures(finished, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mbs.curves import CurveWriter, collect_scalars
    from mbs.recipe import learning_rate

    CurveWriter([finished.folder], tmp_path)
    events = EventAccumulator(str(tmp_path / "brief")).Reload()
    laps, recipe = finished.laps(), finished.card.recipe
    trained = [lap for lap in laps if lap.iterations]
    ends = [11 * lap.step + lap.iteration for lap in trained]

    rates = events.Scalars("training/learning_rate")
    expected = [learning_rate(recipe, lap.step, lap.iteration - 1, 11) for lap in trained]
    assert [(e.step, e.value) for e in rates] == [(n, pytest.approx(rate)) for n, rate in zip(ends, expected)]
    assert [e.wall_time for e in rates] == [pytest.approx(lap.time, abs=0.02) for lap in trained]
    speeds = events.Scalars("training/pictures_per_second")
    seconds = [recipe.batch * lap.iterations / e.value for lap, e in zip(trained, speeds)]
    assert seconds == [pytest.approx(lap.seconds, rel=1e-3) for lap in trained]
    tested = [lap.time for lap in laps if not lap.iterations]
    assert [e.wall_time for e in events.Scalars("mIoU/all")] == [pytest.approx(time, abs=0.02) for time in tested]
    pictures = events.Images("photo, truth, prediction/0")
    assert [(p.step, p.height, p.width) for p in pictures] == [(11 * t, 48, 3 * 48) for t in (1, 2, 3, 4)]
    assert len(collect_scalars(finished)) > len(trained)


def test_a_run_without_laps_is_still_drawn(finished, tmp_path):
    "Runs of earlier versions have none; damaged lines count as none."
    import shutil

    from mbs.curves import collect_scalars
    from mbs.run import load_run

    folder = shutil.copytree(finished.folder, tmp_path / "old")
    (folder / "laps.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 9, "iteration": 1, "iterations": 1}\n')
    points = collect_scalars(load_run(folder))
    assert {point.time for point in points} == {None}
    assert not any("second" in point.name for point in points)


def test_the_time_left_counts_every_step_and_its_test(finished, tmp_path):
    "From the laps of earlier attempts, too: base step and later steps have paces of their own."
    import shutil

    from mbs.batch import _read_status
    from mbs.run import Lap, load_run

    folder = shutil.copytree(finished.folder, tmp_path / "part")
    for step in (2, 3):
        shutil.rmtree(folder / f"step-{step:02d}")
    log = [record for record in load_run(folder).log() if record["step"] < 2]
    log.append(log[-1] | dict(step=2, iteration=10))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    laps = [Lap(0, 11, 11, 1.1, 0), Lap(0, 11, 0, 3.0, 0), Lap(1, 11, 11, 22.0, 0), Lap(1, 11, 0, 5.0, 0)]
    (folder / "laps.jsonl").write_text("".join(json.dumps(lap._asdict()) + "\n" for lap in laps))
    status = _read_status(folder)
    assert (status.steps, status.iterations) == (2, 32)
    assert status.seconds_left == pytest.approx((1 + 11) * 2.0 + 2 * 4.0)
    assert _read_status(finished.folder).seconds_left == 0


LINE = Progress("demo-mbs-s0", "", 0.53, 1, 4, 30, 100, 0.7214, 0.603, 95)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_line_fits_the_terminal_and_keeps_what_matters_most(width):
    line = write_progress(LINE, width)
    assert len(line) <= width and "53 %" in line
    assert ("ETA 1.6 min" in line) == (width >= 40) and ("iteration 30 of 100" in line) == (width > 80)
    assert len(write_progress(LINE._replace(name="n" * 300), width)) <= width


def test_lines_of_a_log_file_come_with_each_step_and_rarely_between(monkeypatch, capsys):
    from mbs import live

    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.show_progress() as show:
        for second in range(100):
            now[0] = float(second)
            show([LINE._replace(step=1 + second // 50, iteration=second)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("iteration ")[1].split()[0] for line in lines] == ["0", "31", "50", "81"]


def test_a_waiting_run_says_for_whom(tmp_path, capsys):
    from mbs.notebooks import _tell_worker

    _tell_worker(tmp_path / "run", '{"host": "node7", "pid": 42, "since": 1.0}')
    assert capsys.readouterr().out == "waiting for process 42 on node7, which works on the run run\n"
    _tell_worker(tmp_path / "run", "")
    assert "waiting for another process" in capsys.readouterr().out
