"""The methods once more, in float64 numpy and whole tensors, written from the formulas and not from the code.

Each takes (base, sources, settings) with float64 arrays, and a function keep(source, density) for DARE's masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Keep = Callable[[int, float], NDArray[np.bool_]]


def linear(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    w = np.array([o["weight"] for o in own])
    total = np.tensordot(w, np.stack(sources), 1)
    return total / w.sum() if shared["normalize"] else total


def task_arithmetic(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    w = np.array([o["weight"] for o in own])
    update = np.tensordot(w, np.stack(sources) - base, 1)
    return base + shared["lambda"] * (update / w.sum() if shared["normalize"] else update)


def largest(values: Array, density: float) -> NDArray[np.bool_]:
    """The top floor(density n) by a stable sort: of equals the first."""
    flat = np.abs(values).ravel()
    count = 0 if density == 0 else max(1, math.floor(density * flat.size))
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(values.shape)


def elect(base: Array, deltas: list[Array], own: list[dict[str, Any]], shared: dict[str, Any]) -> Array:
    w = np.array([o["weight"] for o in own]).reshape(-1, *[1] * base.ndim)
    v = w * np.stack(deltas)
    if shared["consensus"] == "mass":
        sign = np.sign(v.sum(0))
    else:
        sign = np.sign(np.sign(v).sum(0))
        sign = np.where(sign == 0, np.sign(v[0]), sign)
    sign = np.where(sign == 0, 1.0, sign)
    agrees = (v != 0) & (np.sign(v) == sign)
    update = (v * agrees).sum(0)
    if shared["normalize"]:
        counted = agrees if shared["average"] == "agreeing" else np.ones_like(agrees)
        divisor = (np.abs(w) * counted).sum(0)
        update = np.divide(update, divisor, out=np.zeros_like(update), where=divisor > 0)
    return base + shared["lambda"] * update


def kept(delta: Array, mask: NDArray[np.bool_], shared: dict[str, Any]) -> Array:
    """What the mask leaves, under `rescale` with the mass of the whole."""
    mass = np.abs(delta * mask).sum()
    scale = np.abs(delta).sum() / mass if shared["rescale"] and mass >= 1e-7 else 1.0
    return np.asarray(delta * mask * scale)


def wudi(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = [s - base for s in sources]
    if not shared["spectral"]:
        return np.asarray(base + shared["lambda"] * sum(deltas) / len(deltas))
    grams = [d.T @ d / (d * d).sum() for d in deltas]
    update = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ np.linalg.pinv(sum(grams), rcond=1e-12)
    return np.asarray(base + shared["lambda"] * update)


def ram(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = np.stack(sources) - base
    moved = np.abs(deltas) > shared["epsilon"]
    count = moved.sum(0)
    share = 1 / np.maximum(count, 1)
    update = np.zeros_like(base)
    for delta, mask in zip(deltas, moved, strict=True):
        ratio = (mask & (count > 1)).sum() / max((mask & (count == 1)).sum(), 1)
        factor = 1 + shared.get("r", 0.0) * min(ratio, shared.get("alpha", 0.0))
        update += delta * mask * np.where(count == 1, factor, share)
    return np.asarray(base + shared["lambda"] * update)


def ties(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = [s - base for s in sources]
    trimmed = [kept(d, largest(d, o["density"]), shared) for d, o in zip(deltas, own, strict=True)]
    return elect(base, trimmed, own, shared)


def drop(delta: Array, i: int, own: dict[str, Any], shared: dict[str, Any], keep: Keep) -> Array:
    density = own["density"] if own["drop_rate"] is None else 1 - own["drop_rate"]
    if density == 0:
        return np.zeros_like(delta)
    return delta * keep(i, density) / (density if shared["rescale"] else 1.0)


def dare(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    update = sum(
        o["weight"] * drop(s - base, i, o, shared, keep) for i, (s, o) in enumerate(zip(sources, own, strict=True))
    )
    total = sum(o["weight"] for o in own) if shared["normalize"] else 1.0
    return np.asarray(base + shared["lambda"] * update / total)


def dare_ties(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    deltas = []
    for i, (s, o) in enumerate(zip(sources, own, strict=True)):
        delta = drop(s - base, i, o, shared, keep)
        if o["drop_rate"] is not None:
            alive = np.flatnonzero(keep(i, 1 - o["drop_rate"]))
            trimmed = np.zeros(delta.size)
            trimmed[alive] = delta.ravel()[alive] * largest(delta.ravel()[alive], o["density"])
            delta = trimmed.reshape(delta.shape)
        deltas.append(delta)
    return elect(base, deltas, own, shared)


def arc(a: Array, b: Array, t: float, on: str) -> Array:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    if on == "weights" and norm == 0 and (a.any() or b.any()):
        return np.asarray(np.sin((1 - t) * np.pi / 2) * a + np.sin(t * np.pi / 2) * b)
    cosine = float((a * b).sum() / norm) if norm > 0 else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def slerp(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    origin = base if shared["on"] == "deltas" else np.zeros_like(base)
    if shared["t"] is not None:
        first, second = [base, *sources][-2:] if len(sources) == 1 else sources
        return origin + arc(first - origin, second - origin, shared["t"], shared["on"])
    point, total = sources[0] - origin, own[0]["weight"]
    for source, o in list(zip(sources, own, strict=True))[1:]:
        total += o["weight"]
        point = arc(point, source - origin, o["weight"] / total, shared["on"])
    return origin + point


def dfs(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = np.stack(sources) - base
    w = np.array([o["weight"] for o in own])
    if shared["mode"] == "position":
        mean = np.tensordot(w / w.sum(), deltas, 1)
        noise = shared["tau"] * deltas.var(axis=0) / len(sources)
        s = np.divide(mean**2, mean**2 + noise, out=np.zeros_like(mean), where=mean**2 + noise > 0)
        return np.asarray(base + shared["lambda"] * s * mean * largest(s, shared["density"]))
    rows = deltas.reshape(len(sources), -1, base.shape[-1] if shared["scope"] == "row" else base.size)
    v = rows.var(axis=2, keepdims=True)
    if (v == 0).all():
        v = np.ones_like(v)
    v = np.maximum(v, 0.1 * v.mean(axis=0))
    alpha = w.reshape(-1, 1, 1) * v ** -shared["gamma"]
    alpha = alpha / alpha.sum(axis=0)
    return np.asarray(base + shared["lambda"] * (alpha * rows).sum(axis=0).reshape(base.shape))


def nuslerp(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = [s - base for s in sources]
    if shared["nuslerp_flatten"] or base.ndim < 2:
        vectors = [d.reshape(1, -1) for d in deltas]
    elif shared["nuslerp_row_wise"]:
        vectors = [d.reshape(len(d), -1).T for d in deltas]
    else:
        vectors = [d.reshape(-1, d.shape[-1]) for d in deltas]
    folded = np.stack([_fold([v[k] for v in vectors], own) for k in range(len(vectors[0]))])
    if not shared["nuslerp_flatten"] and base.ndim > 1 and shared["nuslerp_row_wise"]:
        folded = folded.T
    return base + folded.reshape(base.shape)


def _fold(vectors: list[Array], own: list[dict[str, Any]]) -> Array:
    point, total = vectors[0], own[0]["weight"]
    for vector, o in list(zip(vectors, own, strict=True))[1:]:
        total += o["weight"]
        t = o["weight"] / total
        norm = np.linalg.norm(point) * np.linalg.norm(vector)
        cosine = float((point * vector).sum() / norm) if norm > 0 else 1.0
        if cosine > 1 - 1e-9 or cosine < -0.9995:
            point = (1 - t) * point + t * vector
        else:
            angle = np.arccos(cosine)
            point = np.asarray((np.sin((1 - t) * angle) * point + np.sin(t * angle) * vector) / np.sin(angle))
    return point


def multislerp(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    w = np.array([o["weight"] for o in own])
    w = w / w.sum() if shared["normalize_weights"] else w
    deltas = np.stack(sources).reshape(len(sources), -1) - base.ravel()
    lengths = np.linalg.norm(deltas, axis=1)
    units = deltas / lengths[:, None]
    mean = w @ units
    m = mean / np.linalg.norm(mean)
    tangent = w @ (units - np.outer(units @ m, m))  # as the blog has it: the plane at m, and back to the sphere
    angle = np.linalg.norm(tangent)
    point = np.cos(angle) * m + np.sinc(angle / np.pi) * tangent
    return base + (point * (w @ lengths)).reshape(base.shape)


def karcher(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    w = np.array([o["weight"] for o in own])
    w = w / w.sum()
    flat = np.stack(sources).reshape(len(sources), -1)
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    m = w @ units / np.linalg.norm(w @ units)
    for _ in range(shared["max_iter"]):
        tangent = np.zeros_like(m)
        for weight, u in zip(w, units, strict=True):
            away = u - (u @ m) * m
            sine = np.linalg.norm(away)
            tangent += weight * (np.arctan2(sine, u @ m) / sine if sine > 0 else 1.0) * away
        step = np.linalg.norm(tangent)
        if step < shared["tol"]:
            break
        m = np.cos(step) * m + np.sin(step) / step * tangent
    return np.asarray((w @ lengths) * m).reshape(base.shape)


def nearswap(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    w = np.array([o["weight"] for o in own])
    other = np.tensordot(w / w.sum(), np.stack(sources), 1)
    apart = np.abs(other - base)
    share = np.minimum(1.0, np.divide(shared["t"], apart, out=np.ones_like(apart), where=apart > 0))
    return np.asarray(share * other + (1 - share) * base)


def iso_c(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    w = np.array([o["weight"] for o in own])
    mean = np.tensordot(w / w.sum(), np.stack(sources) - base, 1)
    if base.ndim != 2 or not shared["spectral"]:
        return np.asarray(base + shared["lambda"] * mean)
    u, s, vt = np.linalg.svd(len(sources) * mean, full_matrices=False)
    return np.asarray(base + shared["lambda"] * s.mean() * u @ vt)


def tsv_merge(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    w = np.array([o["weight"] for o in own])
    deltas = np.stack(sources) - base
    if base.ndim != 2 or not shared["spectral"]:
        return np.asarray(base + shared["lambda"] * np.tensordot(w / w.sum(), deltas, 1))
    count = min(base.shape) // len(sources)
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    left, right = (
        np.linalg.svd(x, full_matrices=False)
        for x in (
            np.concatenate([u[:, :count] for u, _, _ in parts], 1),
            np.concatenate([vt[:count] for _, _, vt in parts], 0),
        )
    )
    scaled = [weight / w.mean() * s[:count] for weight, (_, s, _) in zip(w, parts, strict=True)]
    update = left[0] @ left[2] @ np.diag(np.concatenate(scaled)) @ right[0] @ right[2]
    return np.asarray(base + shared["lambda"] * update)


def banded(values: Array, density: float, gamma: float) -> NDArray[np.bool_]:
    """As `largest`, after the floor(gamma n) largest were left out (fewer where too few would stay)."""
    flat = np.abs(values).ravel()
    count = math.floor(density * flat.size)
    first = min(math.floor(gamma * flat.size), flat.size - count)
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[first : first + count]] = True
    return mask.reshape(values.shape)


def breadcrumbs(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    parts = [
        kept(s - base, banded(s - base, o["density"], o["gamma"]), shared) for s, o in zip(sources, own, strict=True)
    ]
    return task_arithmetic(base, [base + k for k in parts], own, shared, keep)


def breadcrumbs_ties(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    parts = [
        kept(s - base, banded(s - base, o["density"], o["gamma"]), shared) for s, o in zip(sources, own, strict=True)
    ]
    return elect(base, parts, own, shared)


def prune(delta: Array, i: int, own: dict[str, Any], shared: dict[str, Any], keep: Any) -> Array:
    """MAGPRUNE with mean ranks, in 255 levels; the probabilities are multiples of 1/65536."""
    density = own["density"]
    width = min(own["epsilon"], density, 1 - density)
    rows = np.abs(delta).reshape(delta.shape[0], -1)
    ranks = np.array([[((row < x).sum() + (row <= x).sum() - 1) / 2 for x in row] for row in rows])
    levels = np.ceil(254 * ranks / (rows.shape[1] - 1) - 0.5).astype(np.float32).reshape(delta.shape)
    first, step = np.float32((density - width) * 65536 + 0.5), np.float32(2 * width * 65536 / 254)
    chance = np.floor(first + step * levels).astype(np.float64) / 65536
    divisor = np.where((chance > 0) & shared["rescale"], chance, 1.0)
    return np.asarray(delta * keep(i, chance) / divisor)


def della(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    pruned = [prune(s - base, i, o, shared, keep) for i, (s, o) in enumerate(zip(sources, own, strict=True))]
    return elect(base, pruned, own, shared)


def della_linear(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    pruned = [prune(s - base, i, o, shared, keep) for i, (s, o) in enumerate(zip(sources, own, strict=True))]
    return task_arithmetic(base, [base + p for p in pruned], own, shared, keep)


def model_stock(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    count = len(sources)
    deltas = [(s - base).reshape(-1, base.shape[-1] if shared["filter_wise"] else base.size) for s in sources]
    units = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in deltas]
    pairs = [(a * b).sum(1, keepdims=True) for k, a in enumerate(units) for b in units[k + 1 :]]
    cosine = np.maximum(np.mean(pairs, axis=0), 0.0)
    t = count * cosine / (1 + (count - 1) * cosine)
    return np.asarray(base + (t * np.mean(deltas, axis=0)).reshape(base.shape))


def sce(base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep) -> Array:
    deltas = np.stack(sources) - base
    if shared["select_topk"] < 1:
        variance = deltas.var(axis=0)
        chosen = largest(variance, 0.0)
        count = 0 if shared["select_topk"] == 0 else math.floor(shared["select_topk"] * (variance > 0).sum())
        if shared["select_topk"] > 0 and (variance > 0).any():
            chosen.ravel()[np.argsort(-variance.ravel(), kind="stable")[: max(1, count)]] = True
        deltas = deltas * chosen
    weights = (deltas**2).reshape(len(sources), -1).sum(1)
    sign = np.where(deltas.sum(0) >= 0, 1.0, -1.0)
    w = weights.reshape(-1, *[1] * base.ndim) * (np.sign(deltas) == sign)
    return np.asarray(base + np.divide((w * deltas).sum(0), w.sum(0), out=np.zeros_like(base), where=w.sum(0) > 0))


def arcee_fusion(
    base: Array, sources: list[Array], own: list[dict[str, Any]], shared: dict[str, Any], keep: Keep
) -> Array:
    def softmax(x: Array) -> Array:
        powers = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True) + 1e-8)

    (source,) = sources
    p, q = softmax(source), softmax(base)
    importance = np.abs(source - base) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[k * (ordered.size - 1) // 4] for k in (1, 2, 3))
    return np.where(importance >= median + 1.5 * (third - first), source, base)


REFERENCES: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare_linear": dare,
    "dare_ties": dare_ties,
    "dfs": dfs,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "nearswap": nearswap,
    "tsv_merge": tsv_merge,
    "iso_c": iso_c,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "della": della,
    "della_linear": della_linear,
    "model_stock": model_stock,
    "sce": sce,
    "arcee_fusion": arcee_fusion,
    "ram": ram,
    "wudi": wudi,
    "ramplus_tl": ram,
}
