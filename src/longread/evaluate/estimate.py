"""Means with 95 % confidence intervals; the document is the unit of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_SMALL_SAMPLE_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student t, 1 to 9 df


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` documents with its 95 % interval; `low` and `high` are None where n < 2 says nothing."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} ± {self.half_width:.3f}"

    @property
    def half_width(self) -> float:
        return 0.0 if self.high is None else self.high - self.mean

    def scaled(self, factor: float) -> Estimate:
        """The same estimate in another unit; `factor` must be positive."""
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Estimate(self.mean * factor, low, high, self.n)


def ratio(amounts: np.ndarray, sizes: np.ndarray) -> Estimate | None:
    """Estimates sum(amounts) / sum(sizes) from one pair per document (nats and tokens, say).

    Documents may differ in length: the variance is that of the ratio estimator (Cochran, Sampling Techniques,
    section 6.4), the quantile Student's t. For equal sizes this is the plain t interval of the documents' means.
    Documents of size 0 are left out; None if no document is left.
    """
    present = sizes > 0
    amounts, sizes = amounts[present].astype(float), sizes[present].astype(float)
    n = len(sizes)
    if not n:
        return None
    mean = float(amounts.sum() / sizes.sum())
    if n == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, n)
    residuals = amounts - mean * sizes
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(sizes.sum())
    reach = student_quantile(n - 1) * error
    return Estimate(mean, mean - reach, mean + reach, n)


def wilson(successes: int, n: int) -> Estimate | None:
    """A share with Wilson's interval (E. B. Wilson, 1927), which holds for few trials and near 0 and 1; None if n is 0.

    The interval is not symmetric, and never empty: 0 of 20 is 0 with an upper end of 0.16.
    """
    if not n:
        return None
    z, p = NormalDist().inv_cdf(0.975), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, max(0.0, min(p, centre - reach)), min(1.0, max(p, centre + reach)), n)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The p-value, two-sided and exact, that two readers of the same prompts are right equally often (McNemar, 1947).

    Only prompts on which they differ count: under the null hypothesis either is right on half of those.

    Raises `ValueError` unless the trials are pairs.
    """
    pairs = list(zip(first, second, strict=True))
    ahead = sum(a and not b for a, b in pairs)
    n = sum(bool(a) != bool(b) for a, b in pairs)
    tail = sum(math.comb(n, k) for k in range(min(ahead, n - ahead) + 1))
    return min(1.0, 2 * tail / 2**n)


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: tabulated below 10 degrees of freedom, else a Cornish-Fisher expansion."""
    if freedom <= len(_SMALL_SAMPLE_QUANTILES):
        return _SMALL_SAMPLE_QUANTILES[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
