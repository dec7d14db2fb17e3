from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evomerge.evaluation.backends.native.prefix_trees import Batch, build_tree, pack_trees

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)


def visible(batch: Batch, row: int, column: int) -> list[int]:
    """The columns that a position may attend to, in order."""
    return [k for k in range(column + 1) if column < batch.ends[row, k]]


def test_a_tree_by_hand() -> None:
    # 5 6 7 and 5 6 8 9 share 5 6; in depth-first order: 5 6 7 8 9.
    tree = build_tree([[5, 6, 7], [5, 6, 8, 9]], [[1], [2, 3]], [0, 1])
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 2, 3]
    assert tree.ends.tolist() == [5, 5, 3, 5, 5]
    assert tree.positions.tolist() == [2, 3, 4]
    assert tree.targets.tolist() == [1, 2, 3]
    assert tree.requests.tolist() == [0, 1, 1]


@given(st.lists(sequences, min_size=1, max_size=6), st.booleans(), st.integers(1, 60), st.integers(1, 30))
def test_every_request_sees_its_own_sequence_and_nothing_else(
    items: list[list[list[int]]], share_rows: bool, batch_tokens: int, max_scored: int
) -> None:
    trees, inputs, start = [], [], 0
    for group in items:
        trees.append(
            build_tree(group, [[1000 + start + k] for k in range(len(group))], range(start, start + len(group)))
        )
        inputs += group
        start += len(group)
    packed = pack_trees(trees, share_rows=share_rows, batch_tokens=batch_tokens, max_scored=max_scored)
    seen = {}
    for batch in packed.batches:
        length = batch.input_ids.shape[1]
        assert np.all(np.diff(batch.rows) >= 0)
        assert batch.input_ids.size <= batch_tokens or len(batch.input_ids) == 1
        assert len(batch.scored) <= max_scored or len(batch.input_ids) == 1
        for index, target, request in zip(batch.rows, batch.targets, batch.requests, strict=True):
            row, column = divmod(int(batch.scored[index]), length)
            columns = visible(batch, row, column)
            seen[int(request)] = (batch.input_ids[row, columns].tolist(), int(target))
            assert batch.position_ids[row, columns].tolist() == list(range(len(columns)))
    assert seen == {k: (tokens, 1000 + k) for k, tokens in enumerate(inputs)}
    assert packed.unshared == sum(map(len, inputs))
    prefixes = sum(len({tuple(s[:n]) for s in group for n in range(1, len(s) + 1)}) for group in items)
    assert packed.tokens == prefixes <= packed.padded


@given(sequences)
def test_only_rows_with_one_plain_sequence_are_causal(items: list[list[int]]) -> None:
    packed = pack_trees(
        [build_tree([s], [[0]], [k]) for k, s in enumerate(items)], share_rows=False, batch_tokens=50, max_scored=50
    )
    assert all(batch.causal for batch in packed.batches)
    pair = pack_trees(
        [build_tree([[1, 2], [1, 3]], [[0], [0]], [0, 1])], share_rows=False, batch_tokens=50, max_scored=50
    )
    assert not pair.batches[0].causal


def test_padding_attends_to_itself_so_that_no_softmax_is_empty() -> None:
    trees = [build_tree([[1, 2, 3]], [[0]], [0]), build_tree([[4]], [[0]], [1])]
    packed = pack_trees(trees, share_rows=False, batch_tokens=6, max_scored=9)
    for batch in packed.batches:
        for row in range(len(batch.input_ids)):
            assert all(visible(batch, row, k)[-1] == k for k in range(batch.input_ids.shape[1]))


def test_short_texts_share_rows_with_hardly_any_padding() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 30, size=400)
    trees = [build_tree([list(range(size))], [[0]], [k]) for k, size in enumerate(sizes)]
    packed = pack_trees(trees, share_rows=True, batch_tokens=1024, max_scored=10**6)
    assert packed.padded < 1.05 * packed.tokens


def test_the_digest_names_the_batches() -> None:
    def digest(last: int) -> str:
        tree = build_tree([[1, 2, 3], [1, 2, last]], [[7], [8]], [0, 1])
        return pack_trees([tree], share_rows=True, batch_tokens=64, max_scored=64).digest

    assert digest(4) == digest(4)
    assert digest(4) != digest(5)
