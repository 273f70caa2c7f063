"""The headers of a model on the hub, without its weights: some megabytes instead of hundreds of gigabytes.

A shard's header is fetched by an HTTP range and put at the begin of a file as long as the shard, the rest of which is a
hole: whatever reads headers reads it like a downloaded model. Nothing may read weights from it. What is in the local
cache of the hub is read there, without a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from offmoe.checkpoint.hub.api import MAIN, Hub
from offmoe.checkpoint.hub.download import fetch_headers
from offmoe.checkpoint.hub.files import gguf_parts, weight_names
from offmoe.checkpoint.index import (
    INDEX_NAME,
    QUANT_CONFIG_NAME,
    SINGLE_NAME,
    is_shard_name,
    read_config,
)
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.locate import hub_name, is_hub_id, locate_cached, locate_model, refuse_offline
from offmoe.checkpoint.quant_config import read_quantisation
from offmoe.core.errors import CheckpointError, HubUnreachableError, ModelNotFoundError
from offmoe.core.progress import Progress


@contextmanager
def locate_headers(
    model: str | os.PathLike[str] | None, progress: Progress = lambda stage, done, total: None,
    revision: str | None = None,
) -> Iterator[Path]:  # fmt: skip
    """The folder or file of `model` at `revision`; for a hub id that is not in the cache one with its config
    and headers, which is gone afterwards.

    Raises ModelNotFoundError or CheckpointError.
    """
    if model is None or not is_hub_id(os.fspath(model)):
        yield locate_model(model, revision=revision)
        return
    name = os.fspath(model)
    if (cached := locate_cached(name, revision)) is not None:
        yield cached
        return
    refuse_offline(name, revision)
    hub_id, gguf = hub_name(name)
    with TemporaryDirectory(prefix="offmoe-headers-") as root:
        folder = Path(root) / hub_id.rpartition("/")[2]
        folder.mkdir()
        yield _fetch_model(Hub(hub_id, revision or MAIN), folder, gguf, progress)


def _fetch_model(hub: Hub, folder: Path, gguf: str | None, progress: Progress) -> Path:
    """Config and headers to `folder`; returns what to read. Three small files, then the headers, without a listing.

    Raises what `read_quantisation` says of the config before a header is fetched.
    """
    config = None
    if gguf is None:
        try:
            config = hub.small_file("config.json")
        except HubUnreachableError:
            raise
        except ModelNotFoundError:
            listing = hub.listing()  # says it better if there is no such model
            if "config.json" in listing.names:
                raise
            names = gguf_parts(hub.hub_id, listing.names, None)
    else:
        names = gguf_parts(hub.hub_id, hub.listing().names, gguf)
    if config is None:
        fetch_headers(hub, names, folder, progress)
        return folder / Path(names[0]).name
    (folder / "config.json").write_bytes(config)
    _fetch_quantisation(hub, folder)
    read_quantisation(read_config(folder))
    names = _weights(hub, folder)
    try:
        fetch_headers(hub, names, folder, progress)
    except HubUnreachableError:
        raise
    except ModelNotFoundError:
        weight_names(hub.hub_id, hub.listing().names, [] if names == [SINGLE_NAME] else names)  # says what there is
        raise
    return folder


def _fetch_quantisation(hub: Hub, folder: Path) -> None:
    """ModelOpt's own file of how the weights are quantised, where config.json does not say it."""
    if isinstance(read_json(folder / "config.json").get("quantization_config"), dict):
        return
    try:
        (folder / QUANT_CONFIG_NAME).write_bytes(hub.small_file(QUANT_CONFIG_NAME))
    except HubUnreachableError:
        raise
    except ModelNotFoundError:
        return


def _weights(hub: Hub, folder: Path) -> list[str]:
    try:
        (folder / INDEX_NAME).write_bytes(hub.small_file(INDEX_NAME))
    except HubUnreachableError:
        raise
    except ModelNotFoundError:
        return [SINGLE_NAME]
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or not all(is_shard_name(name) for name in names):
        raise CheckpointError(f"{INDEX_NAME} of {hub.hub_id} names no shards, or odd ones; the model is damaged")
    return names
