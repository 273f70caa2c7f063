"""Pages of a slab that are taken before they are written."""

from __future__ import annotations

import sys

import pytest

from offmoe.machine.memory import rss_bytes
from offmoe.tiers.host import HostPool
from offmoe.tiers.huge_pages import fault_in


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")
def test_a_fresh_slab_is_in_memory_and_empty() -> None:
    pool = HostPool(num_slots=3, slot_bytes=50 << 20)
    before = rss_bytes()
    seen: list[tuple[int, int]] = []
    fault_in(pool.slab, lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [pool.slab.nbytes] * 3
    assert [done for done, _ in seen] == [64 << 20, 128 << 20, pool.slab.nbytes]
    grown = rss_bytes() - before
    if grown < pool.slab.nbytes // 2:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    assert abs(grown - pool.slab.nbytes) < 8 << 20
    assert not pool.slab.any()
    pool.slab[-1] = 7
    fault_in(pool.slab)
    assert pool.slab[-1] == 7 and int(pool.slab.sum()) == 7
    pool.close()
