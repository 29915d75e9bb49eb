"""Write the live pages of the site: explorers of the trained run, which need neither a kernel nor a network."""

from pathlib import Path

from mbs import explore_confusions, explore_features, explore_pseudo_labels, trained_run

PAGES = {
    "pseudo-labels": ("Pseudo-labels", lambda run: explore_pseudo_labels(run, step=1)),
    "features": ("Features", lambda run: explore_features(run, step=1)),
    "confusions": ("Confusions", lambda run: explore_confusions(run)),
}


def write_pages(folder: Path):
    "Write the live pages into `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, explore) in PAGES.items():
        explore(trained_run("mbs")).to_html(folder / f"{name}.html")


def embed_pages(up: str) -> str:
    "Return Markdown that shows the first live page and links to all of them; `up` leads to the root of the site."
    links = " · ".join(f'<a href="{up}_static/live/{name}.html">{title}</a>' for name, (title, _) in PAGES.items())
    attributes = 'title="Pseudo-labels" class="live" loading="lazy"'
    frame = f'<iframe src="{up}_static/live/pseudo-labels.html" {attributes}></iframe>'
    text = "Drag τ, click a pixel, click a row of the table: this page is live, without a kernel."
    return f"## Live, here\n\n{text} Alone in a window: {links}.\n\n{frame}\n"
