"""The colours of variants and bounds, for dashboards, the live page and reports alike.

The first five are Okabe and Ito's. All differ from one another, and from a bound, for readers with
any of the three colour blindnesses, and can be read on a light page and on a dark one.
"""

from __future__ import annotations

BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#E69F00"
VARIANTS = (BLUE, ORANGE, "#009E73", "#CC79A7", SKY, "#9966FF", "#984C6C", "#99BB88")
BOUND = "#D55E00"
"""The colour of what a measurement is compared with: a prediction, a limit, an SLO."""
