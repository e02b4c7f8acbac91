"""A figure as a page says it: a value with its unit and interval, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from labs.harness.analysis.text import number, ratio_ends, ratio_number, with_ends
from labs.harness.analysis.verdicts import Interval

RATIO, CHANGE = "x", "+%"  # 1.05x; and as a change, +5%
POINTS = "points"  # a difference of two shares, as -12.5 (-20 to -4.2) points


@dataclass(frozen=True)
class Quantity:
    """A value with its unit (as `text.number` has it, or RATIO, or CHANGE) and 95% interval.

    A quantity that was not measured, or not validly, has no value but says `why`, and so has
    whatever is computed from it. The interval is kept by factors and summands that are plain
    numbers; what two quantities give has none, since how their errors go together is not known.
    """

    value: float | None
    unit: str = "1"
    low: float | None = None
    high: float | None = None
    why: str = ""

    @classmethod
    def of(cls, interval: Interval | None, unit: str = "1", why: str = "not measured") -> Quantity:
        """Take over a measured interval; None gives a missing quantity."""
        if interval is None:
            return cls.missing(why, unit)
        return cls(interval.value, unit, interval.low, interval.high)

    @classmethod
    def missing(cls, why: str, unit: str = "1") -> Quantity:
        return cls(None, unit, why=why)

    @classmethod
    def given(cls, value: float | None, unit: str = "1", why: str = "not measured") -> Quantity:
        """Take over a value; None gives a missing quantity."""
        return cls.missing(why, unit) if value is None else cls(value, unit)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def __str__(self) -> str:
        """Write `2.12x (1.87 to 2.40)`, `+5%`, `50 (43.3 to 55) ms`; a dash where it is missing."""
        value, low, high = self.value, self.low, self.high
        if value is None:
            return "–"
        if self.unit == CHANGE:
            return f"{_signed(value, 1 if abs(value) < 0.0995 else 0)}%"
        if self.unit == POINTS:
            reach = "" if low is None or high is None else f" ({_signed(low)} to {_signed(high)})"
            return f"{_signed(value)}{reach} points"
        if self.unit == RATIO:
            ends = Interval(value=value, low=low, high=high, n=2)
            return f"{ratio_number(value)}x" + (f" ({ratio_ends(ends)})" if low is not None else "")
        if low is None or high is None:
            return number(value, self.unit)
        return with_ends(value, low, high, self.unit)

    @property
    def brief(self) -> Quantity:
        """Leave the interval out."""
        return replace(self, low=None, high=None)

    @property
    def change(self) -> Quantity:
        """Write a ratio as a change: +5% for 1.05."""
        return replace(self.brief - 1, unit=CHANGE)

    def in_unit(self, unit: str) -> Quantity:
        """Name the unit, after arithmetic that changed it."""
        return replace(self, unit=unit)

    def __add__(self, other: Quantity | float) -> Quantity:
        if isinstance(other, Quantity):
            return self._with(other, lambda a, b: a + b, self.unit)
        return self._mapped(lambda value: value + other)

    def __sub__(self, other: Quantity | float) -> Quantity:
        return self + -1 * other

    def __mul__(self, other: Quantity | float) -> Quantity:
        if isinstance(other, Quantity):
            unit = other.unit if self.unit in ("1", RATIO) else self.unit
            return self._with(other, lambda a, b: a * b, unit)
        return self._mapped(lambda value: value * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Quantity | float) -> Quantity:
        """Divide; two quantities of one unit give a ratio, and by nothing there is none."""
        if not isinstance(other, Quantity):
            return self * (1 / other) if other else self.missing("it would be divided by 0")
        if other.value == 0:
            return self.missing("it would be divided by 0")
        unit = RATIO if self.unit == other.unit else self.unit
        return self._with(other, lambda a, b: a / b, unit)

    def _mapped(self, by: Callable[[float], float]) -> Quantity:
        """Apply a monotonic function to the value and both ends."""
        if self.value is None:
            return self
        ends = sorted(by(end) for end in (self.low, self.high) if end is not None)
        low, high = ends if len(ends) == 2 else (None, None)
        return replace(self, value=by(self.value), low=low, high=high)

    def _with(
        self, other: Quantity, operation: Callable[[float, float], float], unit: str
    ) -> Quantity:
        if self.value is None or other.value is None:
            return self.missing(self.why or other.why, unit)
        return Quantity(operation(self.value, other.value), unit)


def _signed(share: float, decimals: int = 1) -> str:
    """Write a hundred times a share with its sign, and no more decimals than it needs."""
    return f"{round(100 * share, decimals) + 0.0:+g}"
