"""A model by its name: found, or fetched from the hub after everything that config and headers tell was checked.

A model that cannot run is refused after kilobytes, with the loader's own words, instead of after its weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from offmoe.checkpoint.locate import locate_model
from offmoe.core.config import EngineConfig
from offmoe.core.progress import Progress


def fetch_model(
    model: str | os.PathLike[str] | None, config: EngineConfig, progress: Progress = lambda stage, done, total: None,
    *, token: str | bool | None = None,
) -> Path:  # fmt: skip
    """The folder of `model`, or its GGUF file, as `locate_model`. Imports torch only where weights must be fetched.

    Raises OffmoeError subclasses: those of `locate_model`, and what the loader refuses before it reads weights.
    """

    def check(found: Path, has_headers: bool) -> None:
        if has_headers:
            from offmoe.loader.headers import check_headers

            check_headers(found, config)
        else:
            from offmoe.loader.build import read_model_config

            read_model_config(found, trust_remote_code=config.trust_remote_code)

    return locate_model(
        model, code=config.trust_remote_code, check=check, progress=progress, revision=config.revision, token=token
    )
