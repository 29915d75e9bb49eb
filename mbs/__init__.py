"""A notebook-driven workbench for class-incremental semantic segmentation

Modules:

- `mbs.archives`: Download the archives of VOC 2012, SBD and ADE20K, resume, verify and read them safely.
- `mbs.augment`: Transform a picture together with its labels, and normalise batches of pictures.
- `mbs.bands`: Compute the pixel losses of a step from patch logits, in bands of rows.
- `mbs.bounds`: Compute what the score would be without mixed-up classes, or with a perfect background.
- `mbs.coco`: Read objects in COCO's format, draw them as masks of class ids, and count what became of each one.
- `mbs.cvat`: Find the masks, photos, labels and colours in CVAT's export "Segmentation mask 1.1".
- `mbs.diagnosis`: Say in plain words why a run learnt little, from what its folder holds.
- `mbs.explore.app`: All explorers of a run on one page without code, for its test pictures or your own.
- `mbs.explore.test_set`: All test pictures of a run as thumbnails: sorted by what went wrong, filtered, opened.
- `mbs.explore.tour`: Write a notebook that shows a run, serve it on this machine, and open it executed and live.
- `mbs.feature_distillation`: Hold the student's features to the teacher's, but only where the teacher can be trusted.
- `mbs.identity`: Decide which class a foreground pixel is by a regression on frozen features, which forgets nothing.
- `mbs.identity_learning`: Add the classes of a step to an identity, from the step's own training pictures.
- `mbs.inspect`: Show what each step of a protocol will see, hide and cost, before anything is trained.
- `mbs.label_studio`: Translate the JSON export of Label Studio into objects in COCO's terms.
- `mbs.layouts`: Find the photos, masks, lists and class names of a data set on disk.
- `mbs.locks`: Let one process at a time work on a folder, on any machine that sees it.
- `mbs.memory`: Keep a few pictures of earlier steps to train on again, without teaching a hidden class as background.
- `mbs.methods`: A method is a choice of parts: MBS, its ablations and its rivals, all through one harness.
- `mbs.metrics`: Derive every number of the field from one confusion matrix a step: counts first, convention second.
- `mbs.objective`: The training loss of a step, composed from named parts, each of which can be switched on its own.
- `mbs.orders`: Make orders of arrival: at random from a seed, or from how similar the classes look to a frozen encoder.
- `mbs.orthogonality`: Push the tokens of new classes away from all others, the background's included.
- `mbs.output_distillation`: Pass on what the teacher knows, and correct it where a new class is labelled.
- `mbs.parts`: Which parts of a method are on: one frozen set of switches that every loss reads.
- `mbs.prepare`: Make a data set from archives or annotations: VOC 2012 with SBD, ADE20K, COCO-style polygons.
- `mbs.pseudo_labels`: Restore old labels where the old model is sure, and ignore background that it doubts.
- `mbs.recipe`: Describe how a step is trained and tested: crops, learning rate, precision, selection, test.
- `mbs.scenes`: Draw seeded pictures of eight kinds of objects on cluttered ground, a data set made in seconds.
- `mbs.segmenter`: An encoder from timm and a mask transformer whose class tokens grow with the classes.
- `mbs.slurm`: Execute the runs of a batch as jobs of a Slurm cluster, which outlive the terminal that submitted them.
- `mbs.studies`: Find out what a batch varies – memory, class order, encoder – and show what it changes.
- `mbs.viz`: Draw static figures: labels over photos, pseudo-labels, the background shift, forgetting.
- `mbs.weights`: Load weights of any origin into an encoder from timm, with their normalisation and a receipt."""

__version__ = "0.1.0"

import ast
from importlib import import_module
from pathlib import Path

# Public names and their modules, imported at first use: `import mbs` loads neither torch nor numpy. The stub lists
# them once, for this module as for editors and type checkers. `output_distillation` and `orthogonality` are modules
# here; their functions of the same name are imported from them.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        known = ", ".join(__all__)
        raise AttributeError(f"module 'mbs' has no attribute {name!r}: expected one of {known}, or a submodule")
    return getattr(import_module(f"mbs.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
