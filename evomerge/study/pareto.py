"""Several objectives at once: fronts, their spread, their volume and their knee. Arrays only; higher is better.

Non-dominated sorting and crowding distance are NSGA-II's (Deb et al., 2002, https://doi.org/10.1109/4235.996017); the
hypervolume is exact, by WFG (While, Bradstreet and Barone, 2012, https://doi.org/10.1109/TEVC.2010.2077298); the knee
is the point farthest outside the hyperplane through the best points of each objective (Das, 1999,
https://doi.org/10.1007/s001580050111).

Everywhere, `values` has shape [points, objectives] and finite entries. A point dominates another that it equals or
exceeds in every objective and exceeds in one; so equal points do not dominate each other.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from evomerge.system.arrays import FloatArray, IntArray, Mask

_TOLERANCE = 1e-9  # distances to the hyperplane, of a front scaled to the unit cube, that count as one
_MARGIN = 0.1  # of the range: how far the reference point lies below the worst values
_MARGIN_WITHOUT_RANGE = 0.5  # of the value: the same where there is no range


def ranks(values: FloatArray, enough: int | None = None) -> IntArray:
    """Numbers the front that each point is in, 0 for those that nothing dominates.

    Args:
        values: The points.
        enough: Stop when this many points have their front; the rest get the next number, whatever they are.

    Returns:
        Shape [points].
    """
    points, inverse = np.unique(-values, axis=0, return_inverse=True)  # sorted: a point is dominated by earlier ones
    inverse = inverse.reshape(-1)  # numpy 2.0 gives it a second axis
    copies = np.bincount(inverse, minlength=len(points))
    fronts = np.zeros(len(points), dtype=np.int64)
    waiting = np.arange(len(points))
    front = ranked = 0
    while len(waiting) and (enough is None or ranked < enough):
        best = _first_front(points[waiting])
        fronts[waiting[best]] = front
        ranked += int(copies[waiting[best]].sum())
        waiting = waiting[~best]
        front += 1
    fronts[waiting] = front
    return fronts[inverse]


def _first_front(losses: FloatArray) -> Mask:
    """Which rows none dominates, of rows to be minimised that are distinct and sorted by the columns in their order."""
    if losses.shape[1] == 2:
        lowest = np.minimum.accumulate(losses[:, 1])
        return np.append(True, lowest[1:] < lowest[:-1])[: len(losses)]
    front = np.zeros(len(losses), dtype=np.bool_)
    waiting = np.arange(len(losses))
    while len(waiting):
        first = waiting[0]
        front[first] = True
        waiting = waiting[(losses[waiting] < losses[first]).any(axis=1)]
    return front


def crowding(values: FloatArray) -> FloatArray:
    """Computes how far apart a front's neighbours of each point are: the sum over objectives, as shares of ranges.

    The ends are infinitely far out. Points that are equal count once: the first has the distance, the others 0.

    Returns:
        Shape [points].
    """
    points, first = np.unique(values, axis=0, return_index=True)
    distances = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        sorted_column = column[order]
        span = sorted_column[-1] - sorted_column[0] if len(order) else 0.0
        if span > 0:
            distances[order[[0, -1]]] = np.inf
            distances[order[1:-1]] += (sorted_column[2:] - sorted_column[:-2]) / span
    if len(points) == 1:
        distances[:] = np.inf
    spread = np.zeros(len(values))
    spread[first] = distances
    return spread


def thin_front(values: FloatArray, count: int, keep: Collection[int] = ()) -> list[int]:
    """Keeps at most `count` points of a front, spread over it: the most crowded goes first, again and again.

    Args:
        values: The front.
        count: How many to leave.
        keep: Positions of points that stay, however crowded; of more than `count` the first ones do.

    Returns:
        Their positions, ascending.
    """
    kept = list(dict.fromkeys(keep))[:count]
    left = list(range(len(values)))
    while len(left) > count:
        distances = crowding(values[left])
        goes = min((k for k in range(len(left)) if left[k] not in kept), key=lambda k: (distances[k], -left[k]))
        del left[goes]
    return left


def hypervolume(values: FloatArray, reference: FloatArray) -> float:
    """Computes the volume of what the points dominate above a reference point; those not above it add nothing.

    Args:
        values: The points.
        reference: Shape [objectives].
    """
    gains = values - reference
    return _volume(gains[(gains > 0).all(axis=1)])


def growing_hypervolume(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Computes the hypervolume of the first point, of the first two, and so on; for the price of one, not of as many.

    Returns:
        Shape [points], ascending.
    """
    gains = values - reference
    front = gains[:0]
    volume = 0.0
    volumes = np.zeros(len(gains))
    for k, gain in enumerate(gains):
        if (gain > 0).all() and not (front >= gain).all(axis=1).any():
            volume += float(gain.prod()) - _volume(np.minimum(front, gain))
            front = np.vstack([front[~(front <= gain).all(axis=1)], gain])
        volumes[k] = volume
    return volumes


def _volume(gains: FloatArray) -> float:
    """The volume of a union of boxes that begin at 0: what each has that the earlier ones have not, added up."""
    if not len(gains):
        return 0.0
    losses = np.unique(-gains, axis=0)
    boxes = -losses[_first_front(losses)]
    if boxes.shape[1] == 1:
        return float(boxes[0, 0])
    if boxes.shape[1] == 2:  # the widest first, each taller than the one before
        return float(boxes[:, 0] @ np.diff(boxes[:, 1], prepend=0.0))
    # The earlier ones are wider in the first objective, so what a box shares with them has the box's own width.
    return sum(
        float(box[0] * (box[1:].prod() - _volume(np.minimum(boxes[:k, 1:], box[1:])))) for k, box in enumerate(boxes)
    )


def reference_point(values: FloatArray) -> FloatArray:
    """Computes where volumes are measured from: below the worst value of each objective, by a tenth of its range.

    A little below, so that the ends of a front count too; by half the value where all are equal, which says nothing of
    how far down is bad.

    Returns:
        Shape [objectives].
    """
    worst = values.min(axis=0)
    span = values.max(axis=0) - worst
    flat = _MARGIN_WITHOUT_RANGE * np.where(worst == 0, 1.0, np.abs(worst))
    below: FloatArray = worst - np.where(span > 0, _MARGIN * span, flat)
    return below


def knee(values: FloatArray, otherwise: FloatArray) -> int:
    """Finds the point of a front where giving up a little of one objective costs the others most.

    It lies farthest outside the hyperplane through the best points of each objective, which a front that is nowhere
    convex has no point outside of: then it is one of those. Equally far points are decided by `otherwise`, so that of
    two points, which are both such ends, the one with the higher value is taken, and of equal ones the first.

    Args:
        values: The front.
        otherwise: What decides between equals, higher is better, shape [points].
    """
    span = values.max(axis=0) - values.min(axis=0)
    varied = values[:, span > 0]
    scaled = (varied - varied.min(axis=0)) / span[span > 0]
    outside = scaled @ _normal(scaled)
    near = np.flatnonzero(outside >= outside.max() - _TOLERANCE)
    return int(near[np.argmax(otherwise[near])])


def by_knee(values: FloatArray, otherwise: FloatArray) -> list[int]:
    """Ranks the points, best first, as positions: the knee of the front, the knee of the front of the rest, and so on.

    Args:
        values: The points, of which some may dominate others.
        otherwise: As for `knee`.
    """
    left = np.arange(len(values))
    order: list[int] = []
    while len(left):
        front = left[ranks(values[left], 1) == 0]
        order.append(int(front[knee(values[front], otherwise[front])]))
        left = left[left != order[-1]]
    return order


def _normal(scaled: FloatArray) -> FloatArray:
    """The direction across the hyperplane through each objective's best point: of length 1, no entry below 0.

    The diagonal where these points do not span a hyperplane, or span one that is no trade-off.
    """
    count = scaled.shape[1]
    points = np.unique(scaled, axis=0)  # so that of several best points it is the same one in any order
    ends = points[np.argmax(points, axis=0)] if count else np.zeros((0, 0))
    normal = np.ones(count)
    if count and np.linalg.matrix_rank(ends) == count:
        solution = np.linalg.solve(ends, np.ones(count))
        normal = solution if (solution > 0).all() else normal
    length = float(np.linalg.norm(normal))
    return normal / length if length else normal
