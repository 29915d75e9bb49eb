"""Explore runs in a notebook: pseudo-labels, features, class tokens, mixed-up classes; live, as figures, pages, tables.

`evidence` collects what the models say about one photo, `states` hold what is chosen, `paint`, `page` and `figures`
draw it, `widgets` make it live, `explorers` put it together, `test_set` shows all test pictures, `tour` and `app`
all explorers. A module imports only from those named before it.
"""

# Public names and their modules, imported at first use: `import mbs.explore` loads neither torch nor a widget library.
_HOME = {
    "check_comparable": "explorers",
    "explore_class_tokens": "explorers",
    "explore_confusions": "explorers",
    "explore_features": "explorers",
    "explore_pseudo_labels": "explorers",
    "explore_test_set": "test_set",
    "has_test_part": "test_set",
    "write_tour": "tour",
}
__all__ = list(_HOME)


def __getattr__(name):
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(
            f"module 'mbs.explore' has no attribute {name!r}: expected one of {', '.join(__all__)}, or a submodule"
        )
    return getattr(import_module(f"mbs.explore.{_HOME[name]}"), name)
