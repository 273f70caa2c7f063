"""The error tree. A message says what is wrong, gives the numbers, and says what to do, in one line.

OffmoeError                     a user can mend it: one line and exit code 2 in the command line
|-- UsageError                  a wrong option or value
|-- ModelNotFoundError          no such folder, not a model folder, no such model on the hub
|   `-- HubUnreachableError     the hub is out of reach, and the local cache has not all of the model
|-- UnsupportedModelError       a model that offmoe does not run (dense, unknown, pickled)
|-- BudgetError                 the model does not fit the memory allowed
|-- ResourceError               the operating system refuses threads
|-- DeviceError                 the GPU cannot be used, or was lost
|-- ContextLengthError          the prompt is longer than the context
|-- OutputError                 a file cannot be written (no space, no permission)
|-- TraceError                  a routing trace is empty, damaged, or of another model
|-- NonFiniteError              the model computes NaN or infinite numbers
|-- EngineBusyError             a second call while one is running
|-- EngineClosedError           a call on an engine that was closed
`-- CheckpointError             the files are damaged or contradict each other
    |-- DiskReadError           the operating system failed a read
    `-- CheckpointChangedError  a file changed under a running engine
"""

from __future__ import annotations

# Of a message. What a hostile file says of itself may have megabytes.
_MOST_LETTERS = 1500


class OffmoeError(Exception):
    """Base of everything that a user can mend."""

    def __str__(self) -> str:
        """The message as one printable line, whatever a file put into it, and cut in the middle where it is long."""
        text = super().__str__()
        if len(text) > _MOST_LETTERS:
            half = _MOST_LETTERS // 2
            text = f"{text[:half]} ... ({len(text) - 2 * half} letters) ... {text[-half:]}"
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UsageError(OffmoeError):
    """An option or a value that offmoe does not know."""


class ModelNotFoundError(OffmoeError):
    """There is no model where the user pointed."""


class HubUnreachableError(ModelNotFoundError):
    """The hub is out of reach, and the local cache does not have all of the model."""


class UnsupportedModelError(OffmoeError):
    """A model that offmoe does not run; the message names the nearest that it does."""


class BudgetError(OffmoeError):
    """The model does not fit the memory allowed, or memory ran out; the message says which setting to lower."""


class ResourceError(OffmoeError):
    """The operating system refuses a thread; the message says which limit to raise."""


class DeviceError(OffmoeError):
    """There is no such device, its driver does not work, or it failed while it was used."""


class ContextLengthError(OffmoeError):
    """The prompt, or prompt plus reply, is longer than the context that memory was set aside for."""


class OutputError(OffmoeError):
    """The operating system refused to write a file; the message says which folder and why."""


class TraceError(OffmoeError):
    """A trace file cannot be used: damaged from the beginning, empty, or of another model."""


class NonFiniteError(OffmoeError):
    """The model's logits are NaN or infinite; the message names the layer in which that begins."""


class EngineBusyError(OffmoeError):
    """The engine is generating already, or was loaded by the process that this one is a fork of."""


class EngineClosedError(OffmoeError):
    """The engine was closed before the call, or during it."""


class CheckpointError(OffmoeError):
    """A checkpoint file is damaged, missing, or contradicts the others."""


class DiskReadError(CheckpointError):
    """The operating system failed a read; the message names the file and the range."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint file was replaced or rewritten while the engine was using it."""
