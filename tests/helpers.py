"""What tests share: how near to each other two results in floating point must be."""

import math

import numpy as np
import torch

# Muon's five Newton-Schulz steps multiply the smallest singular values by this, and with them their rounding errors
MUON = 3.4445**5


def near(dtype, terms):
    """How far, relatively, a sum of so many terms may be off, or a chain of so many roundings.

    Each addition rounds by at most eps / 2 of the sum so far. Even and independent, all of these together have a
    standard deviation of eps * sqrt(terms) / 6: this is six of them. It holds for any processor, since a sum in another
    order, in lanes or in blocks, has less. Where terms have both signs it is relative to the sum of their sizes.
    """
    return torch.finfo(dtype).eps * math.sqrt(terms)


def assert_near(one, two, tolerance):
    """Every number of `one` is that of `two`, but for `tolerance` of the largest of `two`."""
    one, two = one.detach().double(), two.detach().double()
    assert one.shape == two.shape and two.abs().max() > 0
    error = ((one - two).abs().max() / two.abs().max()).item()
    assert error <= tolerance, f"off by {error:.2g} of the largest, where {tolerance:.2g} is allowed"


def assert_same_curve(one, two, terms, steps=None, moved=None, condition=1.0, dtype=torch.float32):
    """Two runs gave one curve, up to rounding: `one` and `two` (n,), taken over `steps` steps (n where none are given)
    whose sums have `terms` terms.

    Each value is such a sum, in float32. And the updates have moved it by `moved` (as far as the curve goes, where that
    is not given): where an update is off by some share of itself, the move is. Updates are made in dtype, and their
    errors are `condition` times those of the gradients. Behind the last value are the roundings of all steps.
    """
    one, two = np.array(one), np.array(two)
    moved = np.ptp(one) if moved is None else moved
    roundings = terms * (steps or len(one))
    tolerance = near(torch.float32, roundings) * np.abs(one) + near(dtype, roundings) * condition * moved
    assert (tolerance < moved / 2).all(), "with this tolerance a run that learns nothing would pass"
    np.testing.assert_array_less(np.abs(two - one), tolerance)
