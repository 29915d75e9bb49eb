"Trains the small runs that come with mbs, in this folder, and writes their receipt: `make trained`. A run that is there is kept; remove its folder to train it again."

from pathlib import Path

from safetensors.torch import load_file

from mbs import Experiment, Settings
from mbs.checkpoint import save_tensors
from mbs.parameter_files import read_parameters

HERE = Path(__file__).parent
METHODS = "finetune", "kd", "mbs"
KEPT = "mbs"  # the run that keeps its models
RECEIPT = """Three small runs on generated scenes that the notebooks take their pictures from: `mbs.trained_run("mbs")` opens one. Made, with this page, by

```
make trained
```

from `settings.yaml` (minutes on one core; remove a run's folder to train it again). mIoU after the last step in percent,
background included; the last column is the share of old classes' pixels that end as background.

| run | base step | old | new | all | old → background |
|---|---:|---:|---:|---:|---:|
{rows}

One seed, a network of {parameters:,} parameters: what is seen in them is the direction of an effect, not its size.
These are run folders as everywhere, but that models are float16 and that only `{kept}` has them; the others keep what they measured and predicted.
"""


def slim(run):
    "Models of `run` as float16 or, but for the run that keeps them, none; nothing that a reader does not need."
    for t in range(run.n_steps):
        path = run.step(t, "model.safetensors")
        if run.settings.method != KEPT:
            path.unlink(missing_ok=True)
        else:
            save_tensors(path, {k: v.half() for k, v in load_file(path).items()})
    (run.folder / ".lock").unlink(missing_ok=True)
    if (run.folder / "resume").is_dir():
        (run.folder / "resume").rmdir()


def row(run):
    "What `run` reached, as a line of the table."
    end = run.metrics()
    numbers = [
        run.metrics(0)["scores"]["all"],
        *(end["scores"][k] for k in ("old", "new", "all")),
        end["shift"]["old->background"],
    ]
    return f"| `{run.settings.method}` | " + " | ".join(f"{100 * x:.1f}" for x in numbers) + " |"


if __name__ == "__main__":
    parameters = read_parameters(HERE / "settings.yaml")
    runs = [
        Experiment(Settings.checked(**parameters | dict(name=method, method=method)), HERE).run() for method in METHODS
    ]
    for run in runs:
        slim(run)  # at the end: the base step is shared at its full precision
    text = RECEIPT.format(rows="\n".join(map(row, runs)), parameters=runs[0].card["parameters"], kept=KEPT)
    (HERE / "README.md").write_text("# Trained runs\n\n" + text, encoding="utf-8")
    print(text)
