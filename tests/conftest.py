"What several test files share."
import pytest


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "An mbs and a kd run of the same steps, trained for seconds: enough to see more than background."
    from mbs.experiment import Experiment
    from mbs.run import Settings
    folder = tmp_path_factory.mktemp("explore")
    short = dict(crop=40, batch=8, iterations=300, new_iterations=15, optimizer="adamw", lr=2e-3)
    network = dict(encoder_options=dict(patch_size=8, embed_dim=32, depth=2, num_heads=2), samples=4)
    return tuple(Experiment(Settings(name=m, method=m, protocol="6-1", training=short, scenes=dict(n_train=120, n_test=8, size=40), **network), folder).run() for m in ("mbs", "kd"))
