"Golden values: inputs and outputs of the released program, found at ../shared/golden or where MBS_GOLDEN points."

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("MBS_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
needs_golden = pytest.mark.skipif(
    not (FOLDER / "golden.npz").is_file(), reason=f"golden values are not at {FOLDER}; set MBS_GOLDEN to their folder"
)


def load() -> dict[str, np.ndarray]:
    "Every golden array by name; empty where the file is absent (the tests are skipped then)."
    return dict(np.load(FOLDER / "golden.npz", allow_pickle=False)) if (FOLDER / "golden.npz").is_file() else {}


def tensors(golden: dict, prefix: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    "Arrays under `prefix` as tensors; floats in `dtype`."
    return {
        k.removeprefix(prefix): torch.from_numpy(v).to(dtype)
        if v.dtype.kind == "f"
        else torch.from_numpy(v.astype(np.int64))
        for k, v in golden.items()
        if k.startswith(prefix) and v.dtype.kind in "fiu"
    }


def close(mine: torch.Tensor | float, theirs: torch.Tensor, dtype=torch.float64, rtol: float | None = None):
    "Equal to 1e-9 in float64 and 1e-5 in float32, relative to the largest value."
    mine, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (mine, theirs))  # never by way of float32
    tolerance = rtol or (1e-9 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))
