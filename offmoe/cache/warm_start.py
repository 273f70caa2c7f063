"""Counts of experts' uses, kept from run to run in a small file of the model's own. No torch.

Only counts are kept: at load no expert is fetched for them. A file that is damaged or of another model is ignored, and
a folder that cannot be written to does without, each with one warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offmoe.cache.usage import Usage
from offmoe.core.folders import cache_folder
from offmoe.core.keys import ExpertKey

_log = logging.getLogger(__name__)

VERSION = 1
MAX_FILE_BYTES, MAX_COUNT = 16 << 20, 1 << 20


class WarmStart:
    """The file of one model; `experts_per_layer` says what keys there are."""

    def __init__(self, model_hash: str, experts_per_layer: Sequence[int], *, folder: Path | None = None) -> None:
        self.path = (folder or cache_folder()) / "usage" / f"{model_hash[:32]}.json"
        self._model_hash, self._experts_per_layer = model_hash, experts_per_layer

    def load(self) -> dict[ExpertKey, int]:
        """Counts of earlier runs; nothing where there is no file, or none that can be used."""
        try:
            with self.path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            return self._parse(raw)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self._warn(f"cannot be read ({error.strerror or error})")
        except (ValueError, RecursionError) as error:
            self._warn(f"is damaged ({error}); delete it")
        return {}

    def _parse(self, raw: bytes) -> dict[ExpertKey, int]:
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        found: Any = json.loads(raw)
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        if found.get("model_hash") != self._model_hash:
            raise ValueError("it is of another model")
        layers = found.get("counts")
        if not isinstance(layers, list) or len(layers) != len(self._experts_per_layer):
            raise ValueError(f"it should have counts of {len(self._experts_per_layer)} layers")
        counts = {}
        for layer_idx, (layer, num_experts) in enumerate(zip(layers, self._experts_per_layer, strict=True)):
            if not isinstance(layer, list) or len(layer) != num_experts:
                raise ValueError(f"layer {layer_idx} should have counts of {num_experts} experts")
            for expert_idx, count in enumerate(layer):
                if type(count) is not int or not 0 <= count <= MAX_COUNT:
                    raise ValueError(f"layer {layer_idx} has a count that is none")
                if count:
                    counts[ExpertKey(layer_idx, expert_idx)] = count
        return counts

    def save(self, *usages: Usage) -> None:
        """Write what the tiers counted, the larger count of each expert; nothing when nothing was used."""
        if not any(usage.now for usage in usages):
            return
        counts = [
            [
                min(MAX_COUNT, max(usage.counts.get(ExpertKey(layer_idx, idx), 0) for usage in usages))
                for idx in range(num_experts)
            ]
            for layer_idx, num_experts in enumerate(self._experts_per_layer)
        ]
        text = json.dumps({"version": VERSION, "model_hash": self._model_hash, "counts": counts})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._replace(text)
        except OSError as error:
            self._warn(f"cannot be written ({error.strerror or error}); use --no-warm-start")

    def _replace(self, text: str) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".partial")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(name).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise

    def _warn(self, what: str) -> None:
        _log.warning("counts of earlier runs are not used: %s %s", self.path, what)
