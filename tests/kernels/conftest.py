"""What tests of steps on a stand-in for a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """One rank, which holds all of the vocabulary, and talks to itself as ranks do."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
