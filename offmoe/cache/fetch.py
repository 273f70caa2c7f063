"""A move into a slot, as long as it is under way."""

from __future__ import annotations

from dataclasses import dataclass

from offmoe.core.keys import ExpertKey
from offmoe.tiers.copier import Ticket


@dataclass(slots=True)
class Fetch:
    """A move under way. `ahead`: nobody waits for it; `doomed`: it will not arrive.

    A fetch that is not ahead ends in ExpertCache's `finish` or `abandon`.
    """

    key: ExpertKey
    slot: int
    ticket: Ticket
    ahead: bool = False
    doomed: bool = False


def wait_out(fetch: Fetch) -> BaseException | None:
    """Wait until nothing writes to the slot any more, whatever becomes of the fetch. Returns an interrupt meanwhile."""
    interrupt: BaseException | None = None
    while not fetch.ticket.done():
        try:
            fetch.ticket.wait()
        except Exception:  # noqa: BLE001 - the cause is being raised by whoever abandons the fetch
            break
        except BaseException as error:  # noqa: BLE001 - for the caller to raise
            interrupt = error
    return interrupt
