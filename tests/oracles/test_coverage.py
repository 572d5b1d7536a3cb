"""Every loss and every statistic has an oracle: a new one without fails here by name."""

from __future__ import annotations

import pytest

from fastpref.losses import LOSS_TYPES, RLHF, TABLE, Entry, Loss
from fastpref_kernels.contract import LINEAR_STATISTICS, STATISTICS
from tests.oracles import preference, statistics, table


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_loss_type_has_an_oracle_of_its_options(name: str) -> None:
    assert name in preference.LOSS_TYPES, f"define the loss type {name!r} in tests/oracles/preference.py"
    oracle, row = preference.LOSS_TYPES[name], LOSS_TYPES[name]
    assert oracle.takes == row.takes
    assert (oracle.reference, oracle.normalized) == (row.reference, row.normalized)
    assert oracle.mixes == (row.mixes_pairs or row.likelihood)


@pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)
def test_a_loss_has_an_oracle(loss: Loss) -> None:
    assert loss.name in table.LOSSES, f"define {loss.name!r} in tests/oracles and add it to tests/oracles/table.py"


@pytest.mark.parametrize("entry", RLHF, ids=lambda entry: entry.name)
def test_a_part_of_ppo_has_an_oracle(entry: Entry) -> None:
    assert entry.name in table.RLHF, f"define {entry.name!r} in tests/oracles/rlhf.py and add it to table.py"


@pytest.mark.parametrize("name", LINEAR_STATISTICS)
def test_a_statistic_has_an_oracle(name: str) -> None:
    assert name in statistics.STATISTICS, f"define the statistic {name!r} in tests/oracles/statistics.py"


def test_no_oracle_is_left_over() -> None:
    assert preference.LOSS_TYPES.keys() == LOSS_TYPES.keys()
    assert table.LOSSES.keys() == {loss.name for loss in TABLE}
    assert table.RLHF.keys() == {entry.name for entry in RLHF}
    assert statistics.STATISTICS.keys() == LINEAR_STATISTICS.keys() >= STATISTICS.keys()
