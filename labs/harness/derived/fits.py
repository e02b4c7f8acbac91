"""Fit sums of columns to measured figures by least squares, with the errors of what is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.verdicts import CONFIDENCE, Interval


@dataclass(frozen=True)
class Estimate:
    """Holds a fitted figure with its standard error; the error is None where none is left over."""

    value: float
    error: float | None
    freedom: int

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        n = max(1, self.freedom)
        if self.error is None:
            return Interval(value=self.value, low=None, high=None, n=n)
        half = float(scipy.stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.error
        return Interval(value=self.value, low=self.value - half, high=self.value + half, n=n)

    def times(self, factor: float) -> Estimate:
        """Multiplies the figure, and its error, by a positive factor."""
        error = None if self.error is None else factor * self.error
        return Estimate(factor * self.value, error, self.freedom)

    def quantity(self, unit: str = "1") -> Quantity:
        return Quantity.of(self.interval(), unit)


def least_squares(
    columns: Sequence[Sequence[float]], values: Sequence[float]
) -> list[Estimate] | None:
    """Fits values as a sum of columns, each times a coefficient, by their relative errors.

    None where fewer different rows than coefficients are given.
    """
    given, y = np.array(columns).T, np.array(values)
    if len(y) == 0 or np.linalg.matrix_rank(given) < len(columns):
        return None
    x, ones = given / y[:, None], np.ones(len(y))
    scale = np.abs(x).max(axis=0)  # columns of very different sizes
    coefficients, *_ = np.linalg.lstsq(x / scale, ones, rcond=None)
    freedom = len(y) - len(columns)
    errors: Sequence[float | None] = [None] * len(columns)
    if freedom:
        variance = float(np.sum((ones - x / scale @ coefficients) ** 2)) / freedom
        errors = np.sqrt(variance * np.diag(np.linalg.inv((x / scale).T @ (x / scale)))).tolist()
    return [
        Estimate(float(c / s), None if e is None else e / float(s), freedom)
        for c, e, s in zip(coefficients, errors, scale, strict=True)
    ]


def polynomial(at: Sequence[tuple[float, float]], degree: int) -> list[Estimate] | None:
    """Fits (x, y) by a polynomial; returns its coefficients, the constant first."""
    powers = [[x**power for x, _ in at] for power in range(degree + 1)]
    return least_squares(powers, [y for _, y in at])
