"""The order of a run's windows: a pure function of seed and step."""

import math

import numpy as np
import pytest
from helpers import make_dataset, rows_of

from lab.console import UserError
from lab.data import Batches, Dataset


@pytest.mark.parametrize("tokens, batch_size", [(16 * 8, 4), (16 * 8 + 5, 3), (16 * 3, 7)])
def test_an_epoch_takes_every_token_once(tokens, batch_size):
    batches = Batches(np.arange(tokens, dtype=np.uint16), 16, batch_size, seed=3)
    steps = batches.epoch_end(5)
    targets = np.concatenate([rows_of(batches, i) for i in range(steps)])[:, 1:]
    assert steps == math.ceil(5 * (tokens // 16) / batch_size)
    for epoch in range(5):
        mine = targets[epoch * batches.windows : (epoch + 1) * batches.windows].flatten()
        assert len(set(mine.tolist())) == len(mine) == tokens - tokens % 16
    assert (targets[: batches.windows] != targets[batches.windows : 2 * batches.windows]).any()
    phases = {int(batches.order(epoch)[0]) % 16 for epoch in range(5)}
    assert len(phases) > 1  # each epoch is cut at another one


def test_a_batch_follows_from_seed_and_step_and_ranks_only_slice_it():
    tokens = np.arange(500, dtype=np.uint16) * 131  # past 2**15, too
    whole = [rows_of(Batches(tokens, 16, 6, seed=1), i) for i in range(12)]
    fresh = Batches(tokens, 16, 6, seed=1)
    for i in (11, 0, 5):  # in any order
        assert np.array_equal(rows_of(fresh, i), whole[i])
        for world in (2, 4):
            assert np.array_equal(
                np.concatenate([rows_of(fresh, i, rank, world) for rank in range(world)]), whole[i]
            )
    assert not np.array_equal(rows_of(Batches(tokens, 16, 6, seed=2), 0), whole[0])
    for row in whole[7]:
        first = row[0] // 131
        assert np.array_equal(row, tokens.take(first + np.arange(17), mode="wrap"))


def test_a_name_that_is_not_prepared_is_told_those_that_are(tmp_path):
    make_dataset(tmp_path, "mine")
    with pytest.raises(UserError, match="mien is not prepared.*mine.*prepare.py"):
        Dataset("mien", tmp_path)
