"""Train the small runs that come with mbs into this folder, and write their receipt: `make trained`.

An existing run is kept. Remove its folder to train it again."""

from pathlib import Path

from safetensors.torch import load_file

from mbs import Experiment, Settings
from mbs.checkpoint import save_tensors
from mbs.parameter_files import read_parameters

HERE = Path(__file__).parent
METHODS = "finetune", "kd", "mbs"
KEPT = "mbs"  # the run that keeps its models
RECEIPT = """Three small runs on generated scenes, from which the notebooks take their pictures: \
`mbs.trained_run("mbs")` opens one. They and this page are made by

```
make trained
```

from `settings.yaml` (minutes on one core; remove the folder of a run to train it again). The table shows the mIoU \
after the last step in percent, background included; its last column is the share of the pixels of old classes that \
are predicted as background in the end.

| run | base step | old | new | all | old → background |
|---|---:|---:|---:|---:|---:|
{rows}

One seed, a network of {parameters:,} parameters: the runs show the direction of an effect, not its size.
These are ordinary run folders with two differences: models are stored as float16, and only `{kept}` has them. \
The other runs keep their scores and predictions.
"""


def slim(run):
    "Store the models of the run that keeps them as float16, remove those of other runs, and remove files of training."
    for t in range(run.n_steps):
        path = run.step_path(t, "model.safetensors")
        if run.settings.method != KEPT:
            path.unlink(missing_ok=True)
        else:
            save_tensors(path, {k: v.half() for k, v in load_file(path).items()})
    (run.folder / ".lock").unlink(missing_ok=True)
    if (run.folder / "resume").is_dir():
        (run.folder / "resume").rmdir()


def make_row(run):
    "Return the results of `run` as a line of the table."
    end = run.metrics()
    base = run.metrics(0)["scores"]["all"]
    scores = [end["scores"][group] for group in ("old", "new", "all")]
    numbers = [base, *scores, end["shift"]["old->background"]]
    return f"| `{run.settings.method}` | " + " | ".join(f"{100 * x:.1f}" for x in numbers) + " |"


if __name__ == "__main__":
    parameters = read_parameters(HERE / "settings.yaml")
    settings = [Settings.checked(**parameters | dict(name=method, method=method)) for method in METHODS]
    runs = [Experiment(s, HERE).run() for s in settings]
    for run in runs:
        slim(run)  # at the end: the base step is shared at its full precision
    text = RECEIPT.format(rows="\n".join(map(make_row, runs)), parameters=runs[0].card.parameters, kept=KEPT)
    (HERE / "README.md").write_text("# Trained runs\n\n" + text, encoding="utf-8")
    print(text)
