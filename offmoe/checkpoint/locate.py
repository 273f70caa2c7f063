"""Search for a model folder or GGUF file by what the user typed: a path, or a hub id that is cached or fetched."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from offmoe.checkpoint.gguf.file import is_gguf, no_model, only_model, why_not_gguf
from offmoe.checkpoint.hub.api import MAIN, Hub
from offmoe.checkpoint.hub.cache import CachedModel, cache_root, is_offline, missing_weights
from offmoe.checkpoint.hub.download import Download
from offmoe.checkpoint.hub.files import gguf_parts, is_tagged
from offmoe.core.errors import HubUnreachableError, ModelNotFoundError, UsageError
from offmoe.core.folders import expand
from offmoe.core.progress import Progress

_log = logging.getLogger(__name__)

# A model, or a GGUF file of one: by its path there, or by a part of its name.
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:/([\w./-]+\.gguf)|(:[\w.-]+))?")
# A page of the hub, as browsers copy it.
_LINK = re.compile(r"(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/([^?#]+?)/?(?:[?#].*)?")
_PAGE = re.compile(r"/(?:tree|blob|resolve)/(?P<revision>[^/]+)")
# Given a model's folder or GGUF file before its weights are fetched; False: with config.json alone, True: with headers.
Check = Callable[[Path, bool], None]


def plain_name(name: str) -> str:
    """The name on the hub that a link of it means; any other name as it is. Raises UsageError for another revision."""
    link = _LINK.fullmatch(name.strip())
    if link is None:
        return name
    page = _PAGE.search(link[1])
    if page is not None and page["revision"] != MAIN:
        hub_id = link[1][: page.start()]
        raise UsageError(f"the link is of revision {page['revision']}; use {hub_id} with --revision {page['revision']}")
    return _PAGE.sub("", link[1])


def is_hub_id(name: str) -> bool:
    """True for what is no path here and looks like a name on the hub, or a link of it."""
    name = plain_name(name)
    path = expand(name)
    return bool(_HUB_ID.fullmatch(name)) and not path.is_absolute() and not path.exists()


def demo_model_folder() -> Path:
    """The bundled demo model."""
    return Path(str(resources.files("offmoe"))) / "demo_model"


def locate_model(
    model: str | os.PathLike[str] | None, *, code: bool = False, check: Check = lambda model, has_headers: None,
    progress: Progress = lambda stage, done, total: None, revision: str | None = None, token: str | bool | None = None,
) -> Path:  # fmt: skip
    """The folder of `model`, or its GGUF file; the demo model for None. A hub id that is not here whole is fetched, at
    `revision` (None: its main branch) and with `token` (as of `Hub`).

    `check` is asked before any weight is fetched and refuses by raising; `code`: the model's Python files are wanted.
    Raises ModelNotFoundError saying what was tried, and OutputError where the disk has no room.
    """
    if model is not None and is_hub_id(name := os.fspath(model)):
        return _fetch(name, code=code, check=check, progress=progress, revision=revision, token=token)
    if revision is not None:
        where = "the bundled model" if model is None else f"{os.fspath(model)}, which is no name on the hub"
        raise UsageError(f"revision is {revision!r} and the model is {where}; leave revision out")
    return demo_model_folder() if model is None else _local(os.fspath(model))


def locate_cached(model: str | os.PathLike[str], revision: str | None = None) -> Path | None:
    """A model that is here: `locate_model` without requests; None for a hub id that is not in the cache whole."""
    name = os.fspath(model)
    if not is_hub_id(name):
        return _local(name)
    hub_id, gguf = hub_name(name)
    cached = CachedModel(hub_id, revision or MAIN)
    if gguf is not None and gguf.startswith(":"):
        found = [path.name for path in cached.snapshot(cached.commit or "").glob("*.gguf")]
        names = [name for name in found if is_tagged(name, gguf)]
        return cached.find(min(names)) if names else None
    return cached.find(gguf)


def hub_name(name: str) -> tuple[str, str | None]:
    """A hub id's model, and the GGUF file that it names, if any: its path, or a colon and a part of its name."""
    match = _HUB_ID.fullmatch(plain_name(name))
    assert match is not None, f"{name=}"
    return match[1], match[2] or match[3]


def begin_download(
    name: str, *, code: bool, revision: str | None = None, token: str | bool | None = None
) -> Download:  # fmt: skip
    """Ask the hub for the files of `name`. Warns of a model that has another name now."""
    hub_id, gguf = hub_name(name)
    hub = Hub(hub_id, revision or MAIN, token=token)
    listing = hub.listing()
    if listing.hub_id != hub_id:
        _log.warning("%s is called %s on the hub now", hub_id, listing.hub_id)
    if gguf is not None and gguf.startswith(":"):
        gguf = gguf_parts(hub_id, listing.names, gguf)[0]
    return Download(hub, listing, code=code, gguf=gguf)


def refuse_offline(name: str, revision: str | None = None) -> None:
    """Raise HubUnreachableError, with how much of `name` is here, where the user forbids requests."""
    if not is_offline():
        return
    hub_id, gguf = hub_name(name)
    cached = CachedModel(hub_id, revision or MAIN)
    folder = None if cached.commit is None else cached.snapshot(cached.commit)
    how_much = f"{name} is not in the local cache {cache_root()}"
    if gguf is None and folder is not None and (folder / "config.json").is_file():
        missing = missing_weights(folder)
        how_much = f"the local cache lacks {len(missing)} of its files, first {missing[0]}"
    raise HubUnreachableError(f"HF_HUB_OFFLINE is set and {how_much}; unset it, or give a folder")


def _fetch(
    name: str, *, code: bool, check: Check, progress: Progress, revision: str | None, token: str | bool | None
) -> Path:
    if is_offline() and (cached := locate_cached(name, revision)) is not None:
        return cached
    refuse_offline(name, revision)
    try:
        download = begin_download(name, code=code, revision=revision, token=token)
    except HubUnreachableError:
        cached = locate_cached(name, revision)
        if cached is None:
            raise
        return cached
    if download.is_complete():
        download.keep_commit()
        return download.model
    if download.has_config:
        check(download.fetch_config(), False)
    download.refuse_full_disk()
    download.fetch_small()
    with TemporaryDirectory(prefix="offmoe-headers-") as folder:
        check(download.fetch_headers(Path(folder), progress), True)
    return download.fetch_all(progress)


def _local(name: str) -> Path:
    path = expand(name)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if not is_gguf(path):
            raise ModelNotFoundError(f"{path} is a file and no GGUF: {why_not_gguf(path)}")
        if (what := no_model(path)) is not None:
            raise ModelNotFoundError(f"{path} is {what} and no language model; name the model's own file")
        return path
    raise ModelNotFoundError(f"{name} does not exist; give a model folder, or a hub id like Qwen/Qwen3-30B-A3B")


def _in_folder(path: Path) -> Path:
    """A model folder itself, or the one GGUF file in it; of an entry of the hub's cache the newest snapshot's."""
    snapshots = sorted((path / "snapshots").glob("*/"), key=lambda folder: folder.stat().st_mtime)
    if snapshots and not (path / "config.json").is_file():
        return _in_folder(snapshots[-1])
    has_config, has_weights = (path / "config.json").is_file(), any(path.glob("*.safetensors"))
    found = None if has_config and has_weights else only_model(path)
    if found is None and not has_config:
        raise ModelNotFoundError(f"{path} has no config.json; point at a Hugging Face model folder")
    return found or path
