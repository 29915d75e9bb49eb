"Golden values: inputs and outputs of the released program, from ../shared/golden or the folder in MBS_GOLDEN."

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
    "Load every golden array by name; return {} if the file is absent (the tests are skipped then)."
    file = FOLDER / "golden.npz"
    return dict(np.load(file, allow_pickle=False)) if file.is_file() else {}


def tensors(golden: dict, prefix: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    "Return the arrays under `prefix` as tensors: floats in `dtype`, integers as int64; others are left out."
    arrays = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    floats = {k: torch.from_numpy(v).to(dtype) for k, v in arrays.items() if v.dtype.kind == "f"}
    integers = {k: torch.from_numpy(v.astype(np.int64)) for k, v in arrays.items() if v.dtype.kind in "iu"}
    return floats | integers


def close(mine: torch.Tensor | float, theirs: torch.Tensor, dtype=torch.float64, rtol: float | None = None):
    "Assert that both are equal to 1e-9 in float64 or 1e-5 in float32, relative to the largest value."
    mine, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (mine, theirs))  # never by way of float32
    tolerance = rtol or (1e-9 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))
