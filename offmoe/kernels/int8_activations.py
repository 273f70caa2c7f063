"""Activations rounded to 8 bits as the CPU kernels do before they multiply with integer weights: the reference.

A lossy mode, off by default (`fast_activations`). Shapes: T rows, K columns, G groups of columns.
"""

from __future__ import annotations

import torch

from offmoe.checkpoint.quant_format import QuantFormat

# Columns that share a scale, and the largest code.
GROUP, LARGEST_CODE = 32, 127
# A group whose largest number is below this is zero: dividing by that number would overflow.
SMALLEST = 2.0**-100


def rounds(form: QuantFormat) -> bool:
    """Whether activations are rounded where the CPU kernels multiply them with weights of this format."""
    return form.kind in ("int4", "int8", "mxfp4")


def round_activations(x_TK: torch.Tensor) -> torch.Tensor:
    """What `x_TK` counts as, in float64: code * scale, with a scale for every 32 columns of a row.

    scale = largest / 127, code = x * (127 / largest) rounded to nearest even, both quotients in float32. A group with a
    number that is not finite becomes NaN.
    """
    num_rows, width = x_TK.shape
    groups_TGS = torch.nn.functional.pad(x_TK.float(), (0, -width % GROUP)).view(num_rows, -1, GROUP)
    largest_TG1 = groups_TGS.abs().amax(-1, keepdim=True)
    is_zero_TG1 = largest_TG1 < SMALLEST
    steps_TG1 = torch.tensor(float(LARGEST_CODE)) / largest_TG1.masked_fill(is_zero_TG1, 1.0)  # not by a reciprocal
    codes_TGS = (groups_TGS.double() * steps_TG1.double()).round()
    scales_TG1 = (largest_TG1 / LARGEST_CODE).masked_fill(is_zero_TG1, 0.0)
    scales_TG1 = scales_TG1.masked_fill(~largest_TG1.isfinite(), torch.nan)
    values_TGS = codes_TGS * scales_TG1.double()
    return values_TGS.flatten(1)[:, :width]
