"A layout shows its facts and never its thousands of file names."

from pathlib import Path

import pytest

from mbs.layouts import Layout, Part
from mbs.value_table import join_few, render_values


def make_part(n):
    ids = [f"photo{k}" for k in range(n)]
    return Part(ids, [Path("images", f"{i}.jpg") for i in ids], [Path("masks", f"{i}.png") for i in ids])


@pytest.fixture
def layout():
    classes = [f"class {k}" for k in range(1, 150)]
    classes.append("<b>cat</b>")
    return Layout(Path("/somewhere/pets & more"), 150, tuple(classes), make_part(10_000), make_part(500))


def test_layout_is_one_line(layout):
    assert repr(layout) == "Layout(pets & more: 150 classes, 10,000 train and 500 test pictures)"
    assert str(layout) == repr(layout)


def test_layout_is_a_small_table_in_a_notebook(layout):
    shown = layout._repr_html_()
    assert len(shown) < 2000 and "photo" not in shown and "somewhere" not in shown
    for fact in ("pets &amp; more", "1 class 1, 2 class 2", "…, 150 &lt;b&gt;cat&lt;/b&gt;", "10,000", "500"):
        assert fact in shown, fact


def test_layout_says_whether_masks_hold_colours(layout):
    assert "class ids" in layout._repr_html_()
    assert "class ids" not in layout._replace(colours={(0, 0, 0): 0})._repr_html_()


def test_markup_is_escaped_everywhere():
    shown = render_values("<i>", {"<i>": "<i>"})
    assert "<i>" not in shown and shown.count("&lt;i&gt;") == 3


@pytest.mark.parametrize("n,shown", [(0, ""), (2, "0, 1"), (3, "0, 1, 2"), (4, "0, 1, …, 3"), (99, "0, 1, …, 98")])
def test_a_list_is_cut_in_its_middle(n, shown):
    assert join_few(range(n), most=3) == shown
