"""A long curve in fewer points that hide nothing: of each bucket the lowest and highest stay."""

from dataclasses import dataclass

import numpy as np

from pretrain_cli.engine.report.history import Curves, Floats, Mark

BUCKETS = 1500
"""About as many as a screen has columns; a run of a million steps is then half a megabyte."""

MARKS = 300
"""Of a kind and run: more on a chart are a wall. The card of a run counts all."""


@dataclass(frozen=True)
class Thinned:
    """Curves as drawn. Where rows were put together, values are means, and `low` and `high` the
    bounds between which they lie."""

    curves: Curves
    rows_together: int
    low: dict[str, Floats]
    high: dict[str, Floats]


def thin(curves: Curves, buckets: int = BUCKETS) -> Thinned:
    """At most so many points; the curves themselves where they have no more."""
    rows = len(curves)
    if rows <= buckets:
        return Thinned(curves, 1, {}, {})
    starts = np.arange(buckets) * rows // buckets
    values = curves.values
    return Thinned(
        Curves(
            {name: _means(column, starts) for name, column in curves.axes.items()},
            {name: _means(column, starts) for name, column in values.items()},
        ),
        -(-rows // buckets),
        {name: np.fmin.reduceat(column, starts) for name, column in values.items()},
        {name: np.fmax.reduceat(column, starts) for name, column in values.items()},
    )


def _means(column: Floats, starts: np.ndarray) -> Floats:
    """The mean of the numbers in each bucket; NaN in one that has none."""
    known = np.isfinite(column)
    sums = np.add.reduceat(np.where(known, column, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def some(marks: list[Mark]) -> list[Mark]:
    """At most so many of them, evenly from the first to the last."""
    if len(marks) <= MARKS:
        return marks
    return [marks[int(place)] for place in np.linspace(0, len(marks) - 1, MARKS)]
