"Studies: class orders, batches that vary one thing, and the sections of a report that show what it changes."

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mbs.batch import Batch
from mbs.cli import app
from mbs.comparison import find_runs, group_runs, summarise_runs
from mbs.executors import Local
from mbs.experiment import Experiment
from mbs.grid import _make_run_name, expand_grid, read_grid
from mbs.memory import Memory
from mbs.orders import (
    SIMILAR,
    _view_all_classes,
    compare_tokens,
    draw_order,
    gather_similar,
    group_similar,
    list_order_names,
    make_orders,
    measure_similarity,
    order_by_similarity,
)
from mbs.report import make_sections, write_report
from mbs.run import load_run
from mbs.segmenter import pad_to_multiple
from mbs.settings import Settings
from mbs.studies import (
    draw_memory_curves,
    find_order_studies,
    make_encoder_table,
    make_memory_table,
    make_order_class_table,
    make_order_table,
    make_studies,
)
from mbs.tables import summarise_seeds
from mbs.views import move_to_device

TINY = dict(
    protocol="5-1",
    scenes=dict(n_train=60, n_test=10, size=32),
    samples=1,
    workers=0,
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
    training=dict(crop=32, batch=4, iterations=3, new_iterations=2, optimizer="adamw"),
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MBS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Class orders


@st.composite
def similarities(draw):
    "Draw a symmetric matrix, -1..1, no two pairs of which are equally similar, and the sizes of the steps."
    n = draw(st.integers(2, 8))
    upper = np.triu(np.random.default_rng(draw(st.integers(0, 2**32))).uniform(-1, 1, (n, n)), 1)
    matrix = upper + upper.T + np.eye(n)
    base = draw(st.integers(1, n))
    sizes = [base]
    while sum(sizes) < n:
        sizes.append(draw(st.integers(1, n - sum(sizes))))
    return matrix, sizes


def rank_pairs(matrix, members):
    "Return the similarities of all pairs of `members`, largest first."
    return sorted((matrix[a, b] for a in members for b in members if a < b), reverse=True)


@given(similarities())
def test_an_order_from_similarity_is_a_permutation_and_always_the_same(case):
    matrix, sizes = case
    for name in SIMILAR:
        order = order_by_similarity(name, matrix, sizes)
        assert sorted(order) == list(range(len(matrix)))
        assert order == order_by_similarity(name, matrix.copy(), list(sizes))


@given(similarities(), st.randoms(use_true_random=False))
def test_the_steps_do_not_depend_on_the_order_in_which_classes_are_listed(case, random):
    matrix, sizes = case
    shuffled = list(range(len(matrix)))
    random.shuffle(shuffled)
    other = matrix[np.ix_(shuffled, shuffled)]
    n = sizes[0]
    if n > 1:  # of a single pair either class may come first
        assert {shuffled[c] for c in gather_similar(other, n)} == set(gather_similar(matrix, n))
    groups = {frozenset(shuffled[c] for c in group) for group in group_similar(other, n)}
    assert groups == {frozenset(group) for group in group_similar(matrix, n)}


@given(similarities())
def test_similar_classes_are_first_or_last_together(case):
    matrix, sizes = case
    n, base = len(matrix), sizes[0]
    closest = max(((matrix[a, b], {a, b}) for a in range(n) for b in range(a)), key=lambda pair: pair[0])[1]
    if base > 1:
        assert closest <= set(order_by_similarity("similar-first", matrix, sizes)[:base])
    last = order_by_similarity("similar-last", matrix, sizes)
    if n - base > 1:
        assert set(last[-2:]) == closest
    elif n - base == 1:
        assert last[-1] in closest


@given(similarities())
def test_every_gathered_class_has_a_look_alike_among_those_gathered_before(case):
    "Nobody is gathered through a pair that is less similar than one that was possible at that time."
    matrix, _ = case
    for n in range(2, len(matrix) + 1):
        gathered = gather_similar(matrix, n)
        assert len(gathered) == len(set(gathered)) == n
        assert rank_pairs(matrix, gathered)[0] == rank_pairs(matrix, range(len(matrix)))[0]


@given(similarities())
def test_spread_puts_one_class_of_each_group_into_the_base_step(case):
    matrix, sizes = case
    groups = group_similar(matrix, sizes[0])
    assert sorted(c for group in groups for c in group) == list(range(len(matrix))) and len(groups) == sizes[0]
    order = order_by_similarity("similar-spread", matrix, sizes)
    base = set(order[: sizes[0]])
    assert all(len(base & set(group)) == 1 for group in groups)


@given(similarities())
def test_spread_repeats_a_group_in_a_step_only_when_no_other_has_classes_left(case):
    matrix, sizes = case
    groups = group_similar(matrix, sizes[0])
    owner = {c: k for k, group in enumerate(groups) for c in group}
    order = [owner[c] for c in order_by_similarity("similar-spread", matrix, sizes)]
    start = 0
    for size in sizes:
        counts = [order[start : start + size].count(k) for k in range(len(groups))]
        left_after = [order[start + size :].count(k) for k in range(len(groups))]
        skipped = [c for c, left in zip(counts, left_after) if left]
        assert not skipped or max(counts) <= min(skipped) + 1
        start += size


def test_hoofed_animals():
    "The orders of benchmarks/identity_study.py: cat, dog, person, and three animals that are taken for one another."
    matrix = np.eye(6)
    for a, b, alike in ((3, 4, 0.8), (3, 5, 0.9), (4, 5, 0.85), (0, 1, 0.4), (0, 2, 0.1), (1, 2, 0.05)):
        matrix[a, b] = matrix[b, a] = alike
    sizes = [3, 1, 1, 1]
    assert set(order_by_similarity("similar-last", matrix, sizes)[:3]) == {0, 1, 2}
    assert set(order_by_similarity("similar-first", matrix, sizes)[:3]) == {3, 4, 5}
    spread = order_by_similarity("similar-spread", matrix, sizes)
    assert {2} < set(spread[:3]) and len({0, 1} & set(spread[:3])) == len({3, 4, 5} & set(spread[:3])) == 1
    assert set(spread[3:5]) & {3, 4, 5} and set(spread[3:]) & {0, 1}


def test_equal_similarities_go_by_position():
    assert gather_similar(np.ones((4, 4)), 3) == [0, 1, 2]
    assert group_similar(np.ones((3, 3)), 2) == [[0, 1], [2]]
    assert order_by_similarity("similar-first", np.eye(1), [1]) == [0]


def test_similarity_ignores_what_all_classes_share():
    tokens = np.random.default_rng(0).normal(size=(5, 8))
    expected = compare_tokens(tokens)
    assert np.allclose(compare_tokens(tokens + 100), expected)
    assert np.allclose(compare_tokens(7 * tokens), expected)
    assert np.allclose(np.diag(expected), 1) and np.allclose(expected, expected.T)
    centred = tokens - tokens.mean(0)
    cosine = centred[1] @ centred[3] / np.linalg.norm(centred[1]) / np.linalg.norm(centred[3])
    assert expected[1, 3] == pytest.approx(cosine)


def test_names_of_orders():
    assert list_order_names(3) == ["order1", "order2", "order3"]
    assert list_order_names(["order7", "similar-spread", 1]) == ["order7", "similar-spread", "order1"]
    for wrong in (0, -1, True, "order0", "similar", [2, 3], 1.5, 10**9):
        with pytest.raises(ValueError, match="class order"):
            list_order_names(wrong)
    orders = [draw_order(20, seed) for seed in range(1, 21)]
    assert len(set(map(tuple, orders))) == 20 and all(sorted(order) == list(range(20)) for order in orders)


def test_orders_of_a_run_do_not_depend_on_its_seed_and_method(home):
    first = make_orders(Settings(**TINY, seed=0, method="mbs"), [*SIMILAR, 2])
    (kept,) = (home / "data").glob("*/.mbs-similarity-*.npz")
    stamp = kept.stat().st_mtime_ns
    assert make_orders(Settings(**TINY, seed=3, method="joint"), [*SIMILAR, 2]) == first
    assert kept.stat().st_mtime_ns == stamp, "the similarity was measured twice"
    kept.write_bytes(b"damaged")
    assert make_orders(Settings(**TINY), [*SIMILAR, 2]) == first
    assert all(sorted(order) == sorted(first["order1"]) for order in first.values())
    some = Settings(**TINY | dict(protocol="2-1"), classes=["leaf", "fish", "star"])
    assert {frozenset(order) for order in make_orders(some, [*SIMILAR, 1]).values()} == {
        frozenset(("leaf", "fish", "star"))
    }
    assert measure_similarity(some).shape == (3, 3)


def test_orders_go_by_the_tokens_of_ground_truth_patches(home):
    "The similarity equals that of mean tokens which are computed one patch at a time."
    settings = Settings(**TINY)
    model, view = _view_all_classes(settings, None)
    stride, n = model.encoder.stride, view.step.n_new
    total, weight = np.zeros((n, model.encoder.dim)), np.zeros(n)
    for k in range(len(view)):
        picture, labels = view[k]
        batch = [(torch.from_numpy(picture)[None], torch.from_numpy(labels)[None])]
        ((images, targets),) = move_to_device(batch, view.normalisation)
        with torch.no_grad():
            tokens = model.eval().encode(images)[0].numpy()
        padded = pad_to_multiple(targets[:, None].float(), stride)[0, 0].numpy()
        patches = [
            padded[y : y + stride, x : x + stride]
            for y in range(0, padded.shape[0], stride)
            for x in range(0, padded.shape[1], stride)
        ]
        for token, patch in zip(tokens, patches):
            for c in range(n):
                share = (patch == c + 1).mean()
                total[c] += share * token
                weight[c] += share
    assert np.allclose(compare_tokens(total / weight[:, None]), measure_similarity(settings), atol=1e-4)


# Batches


def names(grid):
    return [settings.name.partition("/")[2] for settings in expand_grid(read_grid(grid))]


def test_orders_multiply_the_runs_and_end_their_names(home):
    grid = dict(name="b", parameters=TINY, grid=dict(method=["kd", "mbs"], seed=[0, 1]), orders=["similar-last", 2])
    settings = expand_grid(read_grid(grid))
    assert len(settings) == 12
    assert names(grid)[:4] == ["kd-s0-similar-last", "kd-s0-order1", "kd-s0-order2", "kd-s1-similar-last"]
    for order in ("similar-last", "order1"):
        same = {tuple(one.classes) for one in settings if one.name.endswith(order)}
        assert len(same) == 1, "runs of one order have different classes"
    assert names(dict(name="b", parameters=TINY, orders=2)) == ["order1", "order2"]


def test_an_order_fits_every_protocol_of_a_grid(home):
    grid = dict(name="b", parameters=TINY, grid=dict(protocol=["5-1", [3, 3, 2]]), orders=["similar-spread"])
    five, three = expand_grid(read_grid(grid))
    assert sorted(five.classes) == sorted(three.classes) and five.protocol == "5-1" and three.protocol == "3-3-2"
    expected = make_orders(Settings(**TINY | dict(protocol="3-3-2")), "similar-spread")
    assert three.classes == expected["similar-spread"]


def test_similarity_may_come_from_a_finished_run(home):
    Experiment(Settings(name="first", **TINY | dict(protocol="8-1"))).run()
    grid = dict(name="b", parameters=TINY, orders=["similar-last"], features="first")
    (settings,) = expand_grid(read_grid(grid))
    run = load_run(home / "outputs/first")
    assert settings.classes == make_orders(Settings(**TINY), "similar-last", run)["similar-last"]
    with pytest.raises(ValueError, match="not a run folder"):
        expand_grid(read_grid(grid | dict(features="nosuch")))


@pytest.mark.parametrize("orders", ["similar", [1, 1], 0, ["order1", None]])
def test_wrong_orders_are_refused_before_any_data_is_read(home, orders):
    with pytest.raises(ValueError, match="class order"):
        read_grid(dict(name="b", parameters=TINY, orders=orders))
    assert not (home / "data").exists()


def test_a_batch_without_orders_is_as_before(home):
    grid = dict(name="b", parameters=TINY, grid=dict(method=["kd"], seed=[0]))
    (settings,) = expand_grid(read_grid(grid))
    assert settings == Settings(name="b/kd-s0", **TINY, method="kd", seed=0) and settings.classes is None


def test_encoder_runs_have_readable_names(home):
    factors = [[1, 1], [1, 0], [0.1, 0.1], [0.1, 0], [1, 0.5], [0, 0]]
    assert names(dict(name="b", parameters=TINY, grid={"training.encoder_factor": factors})) == [
        "encoder-learns",
        "encoder-rests",
        "encoder-learns-0.1",
        "encoder-rests-0.1",
        "encoder_factor=1_0.5",
        "encoder_factor=0_0",
    ]


def dry_run(file):
    result = CliRunner().invoke(app, ["batch", file, "--dry-run", "--no-measure"])
    assert result.exit_code == 0, result.output
    return result.output


def test_ready_file_of_class_orders(home):
    said = dry_run("scenes-orders")
    assert "scenes-orders: 12 runs" in said and "6 base steps to train" in said
    for method in ("kd", "mbs"):
        for order in (*SIMILAR, "order1", "order2", "order3"):
            assert f"{method}-{order} " in said


def test_ready_file_of_the_encoder(home):
    said = dry_run("scenes-encoder")
    assert "scenes-encoder: 12 runs" in said and "2 base steps to train" in said
    for method in ("finetune", "kd", "mbs"):
        assert f"{method}-encoder-learns-s0 " in said and f"{method}-encoder-rests-s1 " in said


def test_ready_file_of_the_memory_names_its_runs(home):
    points = read_grid("scenes-memory").points()
    found = [_make_run_name(entry | point) for entry, point in points]
    assert len(found) == 24 and found[0] == "finetune-memory=0-s0" and found[-1] == "mbs-memory=300-s1"


def test_ready_file_of_the_memory(home):
    said = dry_run("scenes-memory")
    assert "scenes-memory: 24 runs" in said and "2 base steps to train" in said
    assert "kd-memory=100-s0 " in said


def test_command_prints_orders_that_a_run_takes(home):
    words = [f"{name}={value}" for name, value in (("protocol", "5-1"), ("scenes", TINY["scenes"]))]
    result = CliRunner().invoke(app, ["orders", *words, "--orders", "similar-last,2", "--figure", "orders.png"])
    assert result.exit_code == 0 and (home / "orders.png").is_file(), result.output
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert [name for name, _ in lines] == ["similar-last", "order1", "order2"]
    for _, word in lines:
        (argument,) = shlex.split(word)
        classes = yaml.safe_load(argument.removeprefix("classes="))
        assert Settings(**TINY, classes=classes).classes == classes and len(set(classes)) == 8
    wrong = CliRunner().invoke(app, ["orders", *words, "--orders", "first"])
    assert wrong.exit_code == 2 and "class order 'first' is not known" in wrong.output


# Reports


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Train a batch in two orders, with two methods and two seeds, and a pair of runs whose encoder learns or rests."
    root = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBS_HOME", str(root))
        ordered = dict(name="ordered", parameters=TINY, grid=dict(method=["kd", "mbs"], seed=[0, 1]), orders=2)
        factors = {"training.encoder_factor": [[1, 1], [1, 0]]}
        paired = dict(name="paired", parameters=TINY, grid=factors | dict(method=["kd"], seed=[0, 1, 2]))
        for settings in [*expand_grid(read_grid(ordered)), *expand_grid(read_grid(paired))]:
            Experiment(settings).run()
    return root / "outputs"


def test_orders_are_joined_by_the_names_of_their_classes(trained):
    groups = group_runs(find_runs([trained / "ordered"])[0])
    assert [group.title for group in groups] == [f"scenes · 5-1 · overlapped · order{k}" for k in (1, 2)]
    (study,) = find_order_studies(groups)
    assert study.title == "scenes · 5-1 · overlapped" and list(study.lines) == ["kd", "mbs"]
    iou = {}  # class → order → seeds
    for order in (1, 2):
        for seed in (0, 1):
            run = load_run(trained / f"ordered/mbs-s{seed}-order{order}")
            for name, value in zip(run.names, run.iou()[-1]):
                iou.setdefault(name, {}).setdefault(order, []).append(value)
    rows = {row[1]: row for row in make_order_class_table(study).rows if row[0] == "mbs"}
    assert set(rows) == set(iou) - {"background"}
    first = {order: load_run(trained / f"ordered/mbs-s0-order{order}").names[1:6] for order in (1, 2)}
    for name, row in rows.items():
        means = {order: np.nanmean(values) for order, values in iou[name].items() if not np.isnan(values).all()}
        for cell, expected in zip(
            row[2:],
            (
                list(means.values()),
                [mean for order, mean in means.items() if name in first[order]],
                [mean for order, mean in means.items() if name not in first[order]],
            ),
        ):
            wanted = summarise_seeds(expected)
            assert cell.n == wanted.n and np.allclose(cell[:2], wanted[:2], equal_nan=True), name


def test_the_row_of_all_orders_is_over_the_means_of_orders(trained):
    (study,) = find_order_studies(group_runs(find_runs([trained / "ordered"])[0]))
    table = make_order_table(study)
    scores = [
        [load_run(trained / f"ordered/kd-s{seed}-order{order}").metrics()["scores"]["all"] for seed in (0, 1)]
        for order in (1, 2)
    ]
    row = next(row for row in table.rows if row[:2] == ["kd", "all 2 orders"])
    value = row[table.columns.index("all")]
    assert value.n == 2 and value.mean == pytest.approx(np.mean(scores))
    assert value.std == pytest.approx(np.std(np.mean(scores, axis=1), ddof=1))
    assert row[2] == 4 and "order2: " in table.note and "CAUTION" not in table.note


def test_a_method_that_lacks_an_order_is_named(trained, tmp_path):
    for path in (trained / "ordered").iterdir():
        shutil.copytree(path, tmp_path / path.name)
    third = Settings(**TINY, seed=0, method="kd", classes=make_classes(trained, 3))
    Experiment(third.model_copy(update=dict(name="kd-s0-order3")), tmp_path).run()
    (study,) = find_order_studies(group_runs(find_runs([tmp_path])[0]))
    assert "CAUTION: mbs was not run in order3" in make_order_table(study).note


def make_classes(trained, seed):
    names = sorted(load_run(trained / "ordered/kd-s0-order1").names[1:])
    return [names[c] for c in draw_order(8, seed)]


def test_encoders_are_compared_seed_by_seed(trained, tmp_path):
    (group,) = group_runs(find_runs([trained / "paired"])[0])
    table = make_encoder_table(group)
    ((label, seeds, *cells),) = table.rows
    assert label == "kd" and seeds == 3
    scores = {
        way: np.array(
            [load_run(trained / f"paired/encoder-{way}-kd-s{k}").metrics()["scores"]["all"] for k in range(3)]
        )
        for way in ("learns", "rests")
    }
    learns, rests, difference = cells[2], cells[5], cells[8]
    assert learns.mean == pytest.approx(scores["learns"].mean()) and rests.mean == pytest.approx(scores["rests"].mean())
    assert difference.mean == pytest.approx((scores["rests"] - scores["learns"]).mean())
    assert difference.std == pytest.approx((scores["rests"] - scores["learns"]).std(ddof=1))
    for path in (trained / "paired").iterdir():
        if path.name != "encoder-rests-kd-s2":
            shutil.copytree(path, tmp_path / path.name)
    (fewer,) = group_runs(find_runs([tmp_path])[0])
    assert make_encoder_table(fewer).rows[0][1] == 2, "a seed without its pair was counted"


def remember(runs, sizes):
    "Give runs a memory, as their cards would name it."
    for run, size in zip(runs, sizes):
        object.__setattr__(run.card, "memory", Memory(size=size))
    return runs


def load_with_memory(trained, sizes=(0, 20)):
    "Load the runs of one order as if they had memories: kd and mbs with two seeds each, one copy for each size."
    loaded = []
    for size in sizes:
        for name in ("kd-s0", "kd-s1", "mbs-s0", "mbs-s1"):
            loaded += remember([load_run(trained / f"ordered/{name}-order1")], [size])
    return loaded


def test_memories_make_lines_and_a_curve(trained):
    runs = load_with_memory(trained)
    (group,) = group_runs(runs)
    assert list(group.lines) == ["kd", "mbs", "kd memory=20", "mbs memory=20"] and not group.repeats
    table = make_memory_table(group)
    assert [row[:3] for row in table.rows] == [["kd", 0, 2], ["kd", 20, 2], ["mbs", 0, 2], ["mbs", 20, 2]]
    scores = [run.metrics()["scores"]["all"] for run in runs[:2]]
    assert table.rows[1][5].mean == pytest.approx(np.mean(scores))
    figure = draw_memory_curves(group)
    assert [len(ax.containers) for ax in figure.axes] == [2, 2, 2]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "20"]


def test_runs_without_a_memory_are_the_start_of_the_curve(trained):
    plain = [load_run(trained / "ordered/kd-s0-order1")]
    kept = remember([load_run(trained / "ordered/kd-s0-order1")], [100])
    (group,) = group_runs(plain + kept)
    assert [row[1] for row in make_memory_table(group).rows] == [0, 100]
    assert list(group_runs(plain)[0].lines) == ["kd"]


def test_report_has_a_section_for_each_study(trained, tmp_path):
    runs = find_runs([trained / "ordered", trained / "paired"])[0]
    folder = write_report(runs, tmp_path / "report")
    html = (folder / "report.html").read_text(encoding="utf-8")
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings[0] == "Class orders · scenes · 5-1 · overlapped" and headings[-1] == "Appendix"
    assert "Encoder · scenes · 5-1 · overlapped" in headings
    text = (folder / "summary.md").read_text(encoding="utf-8")
    for title in ("Class orders", "Classes over all orders", "Encoder learns or rests"):
        assert text.count(f"### {title}: scenes") == 1
    assert "| data set's |" in text, "the order without a list of classes has no name"
    assert "at its place of arrival in every order" in html and "all 2 orders" in html


def test_report_without_a_study_is_as_before(trained):
    runs = [load_run(trained / f"ordered/{method}-s{k}-order1") for method in ("kd", "mbs") for k in (0, 1)]
    assert [section.heading for section in make_sections(runs)] == ["scenes · 5-1 · overlapped · order1", "Appendix"]
    assert not make_studies(group_runs(runs))
    assert {row["table"] for row in summarise_runs(runs)} == {"scenes · 5-1 · overlapped · order1"}


def test_orders_without_names_are_numbered(trained, tmp_path):
    "Folders that someone has renamed: the classes, not the names, decide what is another order."
    for k in (1, 2):
        target = tmp_path / "ab"[k - 1]
        shutil.copytree(trained / f"ordered/kd-s0-order{k}", target)
        card = json.loads((target / "run.json").read_text(encoding="utf-8"))
        card["settings"]["name"] = target.name
        (target / "run.json").write_text(json.dumps(card), encoding="utf-8")
    (study,) = find_order_studies(group_runs(find_runs([tmp_path])[0]))
    assert list(study.orders) == ["classes 1", "classes 2"]
    assert study.title == "scenes · 5-1 · overlapped"


def test_tiny_batch_from_a_file(home):
    "One file, one command: two orders are run, resumed for nothing, and reported."
    file = home / "tiny.yaml"
    tiny = TINY | dict(protocol="7-1", samples=0)
    file.write_text(yaml.safe_dump(dict(parameters=tiny, orders=["similar-spread", 1], grid=dict(method=["kd"]))))
    runs = Batch(file).run(Local(1, 0), lambda table: None)
    assert [run.folder.name for run in runs] == ["kd-similar-spread", "kd-order1"]
    assert all(run.finished and run.names[1:] == run.settings.classes for run in runs)
    assert {row[1] for row in Batch(file).plan(measure=False).rows} == {"done"}
    assert len(find_order_studies(group_runs(runs))) == 1
