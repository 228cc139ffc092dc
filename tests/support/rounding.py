"""Bounds of what rounding to bfloat16 does to an operation's outputs."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
U = 2.0**-8  # |round(x) − x| ≤ U·|x|
# Relative error of a tensor with elements rounded once: ulp/√12 against numbers anywhere between two powers of 2,
# U/√3 at most and 0.42–0.44·U measured. Truncation would give 0.85·U.
ROUNDED = 0.47 * U
# With operands rounded too; measured 0.468, 0.62 and 0.71 (dinp; dwte 0.56).
ROUNDED_INSIDE = {"attention_forward": 0.5 * U, "attention_backward": 0.68 * U, "classifier": 0.78 * U}
