"""Explore runs in a notebook: pseudo-labels, features, class tokens, mixed-up classes; live, as figures, pages, tables.

`evidence` collects what the models say about one photo, `states` hold what is chosen, `paint`, `page` and `figures`
draw it, `widgets` make it live, `explorers` put it together. A module imports only from those named before it.
"""

# Public names, imported at first use: `import mbs.explore` itself loads neither torch nor a widget library.
__all__ = [
    "check_comparable",
    "explore_class_tokens",
    "explore_confusions",
    "explore_features",
    "explore_pseudo_labels",
    "write_tour",
]


def __getattr__(name):
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(
            f"module 'mbs.explore' has no attribute {name!r}: expected one of {', '.join(__all__)}, or a submodule"
        )
    return getattr(import_module("mbs.explore.explorers"), name)
