"Order and grouping of the tests for several processes, and the runs that several test files share."

import pytest

GROUPS = dict(
    test_docs="site",
    test_browser="explorers",
    test_explore="explorers",
    test_packaging="wheel",
    test_report="reports",
    test_protocol_files="protocols",
    test_lists="lists",
    test_slurm="slurm",
)
LONG = (
    "test_batch_kills",
    "test_slurm",
    "test_batch",
    "test_runs",
    "test_notebooks",
    "test_long_runs",
    "test_stopping",
)  # start first


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config, items):
    """Distribute the tests over processes.

    Tests that need the same site, wheel or runs go to one process, so that these are made only once.
    Long tests start early, so that all processes end at about the same time.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if group := GROUPS.get(item.module.__name__):
            item.add_marker(pytest.mark.xdist_group(group))
    rank = {name: position for position, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.module.__name__, len(LONG)))


def pytest_collection_finish(session):
    "Refuse releases that forget the groups: all processes would build the same site and start the same cluster."
    alone = [item for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
    if alone and session.config.getoption("loadgroup", False):
        raise pytest.UsageError(f"pytest-xdist did not group {alone[0].nodeid}: expected releases that fit pytest")


class Herald:
    "Prints each failure when it happens, not only at the end of a long suite."

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"FAILED {report.nodeid} ({report.when}, {report.duration:.0f} s)", red=True)
            self.terminal.write_line(report.longreprtext[-2000:])


@pytest.hookimpl(trylast=True)  # after the terminal
def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(Herald(config.pluginmanager.get_plugin("terminalreporter")))


@pytest.fixture(scope="session")
def put_namesakes():
    "A function that puts files called like libraries into a folder; each ends the process that takes it for one."

    def put(folder):
        for name in ("mbs", "random", "torch", "numpy", "ipykernel", "runpy"):
            (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder was run')\n")

    return put


@pytest.fixture(scope="session")
def train_briefly(tmp_path_factory):
    "A function that trains a run for seconds, in one folder: enough to predict more than background."
    from mbs.experiment import Experiment
    from mbs.settings import Settings

    folder = tmp_path_factory.mktemp("explore")
    common = dict(
        protocol="6-1",
        encoder_options=dict(patch_size=8, embed_dim=32, depth=2, num_heads=2),
        training=dict(crop=40, batch=8, iterations=300, new_iterations=15, optimizer="adamw", lr=2e-3),
        scenes=dict(n_train=120, n_test=8, size=40),
        samples=4,
    )
    return lambda **chosen: Experiment(Settings(**chosen, **common), folder).run()


@pytest.fixture(scope="session")
def runs(train_briefly):
    "An mbs and a kd run of the same steps."
    return tuple(train_briefly(name=name, method=name) for name in ("mbs", "kd"))


@pytest.fixture(scope="session")
def identified(runs, train_briefly):
    "A run of the same steps whose foreground a network and an identity divide, half and half; the teacher has none."
    return train_briefly(name="analytic", method="mbs-analytic", parts=dict(identity_width=32, identity_share=0.5))
