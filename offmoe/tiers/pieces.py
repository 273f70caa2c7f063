"""Sizes in which a drive is read, and threads that read it. No torch: plans count with them."""

from __future__ import annotations

from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES

NUM_THREADS = 8
# A single demand miss is split so that the drive sees several requests at once.
PIECE_BYTES = 2 << 20
# Memory of each thread through which what is not kept as it is stored passes, with what direct reads add at both ends.
THROUGH_BYTES = PIECE_BYTES + 2 * DIRECT_ALIGN_BYTES
ALL_THROUGH_BYTES = NUM_THREADS * THROUGH_BYTES
