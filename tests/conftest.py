"What several test files share."

import pytest

TOGETHER = dict(
    test_docs="site",
    test_browser="explorers",
    test_explore="explorers",
    test_packaging="wheel",
    test_report="reports",
    test_protocol_files="protocols",
    test_lists="lists",
)
BEFORE = (
    "test_batch",
    "test_runs",
    "test_notebooks",
    "test_long_runs",
    "test_stopping",
)  # what takes long is begun early, so that nobody waits for it at the end


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config, items):
    "Share the tests out among processes so that none makes what another one has made, a site or a run, and all end together."
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if group := TOGETHER.get(item.module.__name__):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: BEFORE.index(item.module.__name__) if item.module.__name__ in BEFORE else len(BEFORE))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "An mbs and a kd run of the same steps, trained for seconds: enough to see more than background."
    from mbs.experiment import Experiment
    from mbs.run import Settings

    folder = tmp_path_factory.mktemp("explore")
    short = dict(crop=40, batch=8, iterations=300, new_iterations=15, optimizer="adamw", lr=2e-3)
    network = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=2, num_heads=2), samples=4)
    return tuple(
        Experiment(
            Settings(
                name=m, method=m, protocol="6-1", training=short, scenes=dict(n_train=120, n_test=8, size=40), **network
            ),
            folder,
        ).run()
        for m in ("mbs", "kd")
    )
