"""Length of a prompt's chunks, when the device turns out to have less memory than planned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from offmoe.core.errors import BudgetError
from offmoe.core.units import format_bytes
from offmoe.hf.device_failures import release_unused

if TYPE_CHECKING:
    from offmoe.tiers.device import Device

_log = logging.getLogger(__name__)


class PrefillChunk:
    """`size` tokens at once, for all prompts of an engine. Halved once, and then for good.

    Once, because the plan counts memory before it is taken: to fail twice means that other programs take it, and then
    smaller and smaller chunks would only make every prompt slower until the last one fails too.
    """

    def __init__(self, size: int, device: Device, *, divisible: bool) -> None:
        """`divisible`: the model gives the same result when a prompt comes in pieces."""
        self.size = size
        self._device, self._divisible, self._halved = device, divisible, False

    def halve(self, failed_size: int) -> int:
        """The size to go on with after `failed_size` tokens found no memory, with a warning. Or BudgetError."""
        release_unused(self._device)
        name, free = self._device.name, format_bytes(self._device.free_bytes())
        if self._halved or not self._divisible or failed_size < 2:
            why = ", after the chunk was halved" if self._halved else ""
            raise BudgetError(
                f"{name} has no memory for {failed_size} prompt tokens at once{why}: {free} are free; close other "
                "programs that use it, or load with a lower --vram, --context-length or --prefill-chunk"
            )
        self._halved, self.size = True, failed_size // 2
        _log.warning(
            "%s has no memory for %d prompt tokens at once (%s free); going on with %d", name, failed_size, free,
            self.size,
        )  # fmt: skip
        return self.size
