"""Measure how much time a batch of small runs takes on two nodes of a Slurm cluster, as a share of that on one node.

python benchmarks/nodes.py [--runs 12] [--rounds 1]

Both nodes are on this machine, with one core each; it needs two idle cores, root's rights and Slurm, see
`tests/slurm_cluster.py`. The aim is at most 0.6.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from slurm_cluster import Cluster, explain_absence

from mbs.batch import Batch
from mbs.slurm import OnSlurm

PARAMETERS = dict(
    protocol="6-2",
    scenes=dict(n_train=40, n_test=8, size=32),
    samples=1,
    workers=0,
    share_base=False,
    decoder=dict(depth=1),
    encoder_options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=1),
    training=dict(crop=32, batch=4, iterations=400, optimizer="adamw"),
)


def measure_batch(home: Path, n_runs: int, nodes: str) -> float:
    "Return the seconds of a batch whose jobs may use `nodes`."
    os.environ["MBS_HOME"] = str(home)
    batch = Batch(dict(name="batch", parameters=PARAMETERS, grid=dict(seed=list(range(n_runs)))))
    excluded = {"n1", "n2"} - set(nodes.split(","))
    options = dict(exclude=",".join(excluded)) if excluded else {}
    began = time.monotonic()
    batch.run(OnSlurm(every=0.5, sbatch=options), show=lambda table: None, every=0.5)
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    chosen = parser.parse_args()
    if reason := explain_absence():
        sys.exit(reason)
    os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cluster").mkdir()
        cluster = Cluster(Path(folder, "cluster"), cpus=1)
        try:
            for k in range(chosen.rounds):
                one, two = (
                    measure_batch(Path(folder, f"{k}-{nodes}"), chosen.runs, nodes) for nodes in ("n1", "n1,n2")
                )
                print(f"{chosen.runs} runs: {one:.0f} s on one node, {two:.0f} s on two, {two / one:.2f} of it")
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
