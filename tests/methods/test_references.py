"""Every method against its float64 reference, on random tensors and settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.methods.contract import Method
from evomerge.methods.plain_statistics import merge_tensors
from evomerge.methods.random_field import field_key, uniform16
from evomerge.methods.registry import METHODS
from evomerge.testing.methods import declared, family, fit, modes
from tests.methods.helpers import mode_id, of_all, of_sources
from tests.methods.references import REFERENCES

CASES = [
    pytest.param(METHODS[name], mode, id=mode_id(METHODS[name], mode))
    for name in REFERENCES
    for mode in modes(METHODS[name])
]


@pytest.mark.parametrize(("method", "mode"), CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_agrees_with_the_reference(method: Method, mode: dict[str, Any], data: st.DataObject) -> None:
    count = len(fit(method, [None] * data.draw(st.integers(1, 4), "sources")))
    seed = data.draw(st.integers(0, 10**6), "seed")
    base, sources = family(seed, count, (6, 10), spread=data.draw(st.sampled_from([0.01, 1.0]), "spread"))
    weights = st.floats(0.1, 1.5)
    weight = method.parameter("weight")
    if weight is not None and weight.low is None and not mode and data.draw(st.booleans(), "signed"):
        weights = weights | st.floats(-0.09, -0.01)
    chance = st.sampled_from([1.0, 0.75, 0.3, 0.05])
    drop = st.none() if method.name != "dare_ties" else st.none() | st.sampled_from([0.0, 0.4, 0.9])
    epsilon = st.sampled_from([0.0, 0.15, 0.4])
    own = [
        declared(method, {"weight": data.draw(weights), "drop_rate": data.draw(drop)})
        | ({} if method.name == "dfs" else declared(method, {"density": data.draw(chance)}))
        | of_sources(method, {"epsilon": data.draw(epsilon)})
        | (declared(method, {"gamma": data.draw(st.sampled_from([0.0, 0.04, 0.5]))}) if method.name != "dfs" else {})
        for _ in range(count)
    ]
    shared = mode | declared(
        method,
        {
            "lambda": data.draw(st.sampled_from([1.0, 0.6])),
            "select_topk": data.draw(st.sampled_from([0.0, 0.01, 0.4, 1.0])),
            "tau": data.draw(st.sampled_from([0.0, 1.0, 4.0])),
            "r": data.draw(st.sampled_from([0.1, 0.8])),
            "alpha": data.draw(st.sampled_from([0.2, 1.0])),
        },
    )
    shared |= of_all(method, {"epsilon": data.draw(epsilon)})
    if method.name == "nearswap":
        shared["t"] = data.draw(st.sampled_from([0.0, 0.003, 0.3, 10.0]), "t")
    for flag in ("normalize", "rescale", "normalize_weights"):
        shared |= declared(method, {flag: data.draw(st.booleans(), flag)})
    if method.name == "dfs":
        shared |= {"density": data.draw(chance), "gamma": data.draw(st.sampled_from([0.0, 1.0, 1.7]))}
    chosen = method.settings(own, shared)
    if method.check(chosen):
        return
    merged = merge_tensors(method, base, sources, chosen, seed=seed, name="x", fingerprints="abcd"[:count])

    def keep(i: int, density: float | np.ndarray) -> np.ndarray:
        field = uniform16(field_key(seed, "x", "abcd"[i]), 0, base.numel()).astype(np.int64)
        return field.reshape(base.shape) < np.rint(np.multiply(density, 65536))

    exact = [tensor.double().numpy() for tensor in (base, *sources)]
    deltas32 = [(s - base).double().numpy() for s in sources]  # the trim sees deltas rounded to float32
    if mode.get("on") != "weights" and method.name != "linear":
        exact = [exact[0], *(exact[0] + d for d in deltas32)]
    expected = REFERENCES[method.name](exact[0], exact[1:], list(chosen.sources), dict(chosen.shared), keep)
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=2e-5, atol=1e-5)
