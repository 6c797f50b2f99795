"""The cheapest one-to-one assignment (Jonker and Volgenant, 1987)."""

from typing import Any

import numpy as np


def cheapest_assignment(cost: np.ndarray) -> np.ndarray:
    """column [n] of every row of cost [n,n], so that the sum of cost[row, column[row]] is least.

    Rows come in one after another, each by the shortest path (Dijkstra on costs less potentials)
    from it to a free column: n steps of n each, O(n³) in all.
    """
    size = len(cost)
    of_row, of_column = np.zeros(size + 1), np.zeros(size + 1)  # potentials; the last is a start
    row_at = np.full(size + 1, -1)  # by column
    for row in range(size):
        row_at[size] = row
        column: Any = size
        shortest = np.full(size, np.inf)
        before = np.full(size, size)
        done = np.zeros(size + 1, dtype=bool)
        while row_at[column] >= 0:
            done[column] = True
            here = row_at[column]
            reduced = cost[here] - of_row[here] - of_column[:size]
            closer = ~done[:size] & (reduced < shortest)
            shortest[closer], before[closer] = reduced[closer], column
            nearest = np.where(done[:size], np.inf, shortest).argmin()
            step = shortest[nearest]
            of_row[row_at[done]] += step
            of_column[done] -= step
            shortest[~done[:size]] -= step
            column = nearest
        while column != size:  # shift rows along the path
            row_at[column] = row_at[before[column]]
            column = before[column]
    columns = np.empty(size, dtype=np.int64)
    columns[row_at[:size]] = np.arange(size)
    return columns
