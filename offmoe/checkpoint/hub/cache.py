"""The hub's local cache of models, in the layout that every program of the hub shares.

A model's folder is `models--OWNER--NAME`, with `blobs/` (a file for each content, named by its hash),
`snapshots/COMMIT/` (a model folder whose files are links to blobs) and `refs/main` (the commit that was fetched last;
another branch or tag has a file beside it).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from offmoe.checkpoint.gguf.file import split_paths
from offmoe.checkpoint.hub.api import COMMIT, MAIN, TRUE
from offmoe.checkpoint.index import INDEX_NAME, SINGLE_NAME
from offmoe.checkpoint.json_file import read_json
from offmoe.core.errors import OffmoeError
from offmoe.core.folders import expand


def cache_root() -> Path:
    """HF_HUB_CACHE, or hub in HF_HOME, or the user's own cache folder: as the hub's own library finds it."""
    own = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if own:
        return expand(own)
    home = os.environ.get("HF_HOME")
    if home:
        return expand(home) / "hub"
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def is_offline() -> bool:
    """True where the user forbids requests, with HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    return any(os.environ.get(name, "").upper() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


@dataclass(frozen=True)
class CachedModel:
    """The model `hub_id` at a revision in the local cache, or its place there."""

    hub_id: str
    revision: str = MAIN

    @property
    def root(self) -> Path:
        """The model's folder in the cache."""
        return cache_root() / f"models--{self.hub_id.replace('/', '--')}"

    @property
    def ref(self) -> Path:
        """The file that has the revision's commit."""
        return self.root / "refs" / self.revision

    @property
    def commit(self) -> str | None:
        """The commit that the revision is, or was when it was fetched last."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return self.ref.read_text(encoding="utf-8").strip() or None
        except (OSError, ValueError):
            return None

    def snapshot(self, commit: str) -> Path:
        """The model folder of a commit, whether it is there or not."""
        return self.root / "snapshots" / commit

    def find(self, gguf: str | None = None) -> Path | None:
        """The model folder, or the GGUF file `gguf`, if all of its weights are there; else None."""
        commit = self.commit
        if commit is None:
            return None
        folder = self.snapshot(commit)
        if gguf is not None:
            return folder / gguf if _has_all_parts(folder / gguf) else None
        return folder if (folder / "config.json").is_file() and not missing_weights(folder) else None


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A model in the cache: bytes on disk, and whether all of its weights are there, at its main branch."""

    hub_id: str
    root: Path
    num_bytes: int
    is_whole: bool


def cached_models() -> list[CacheEntry]:
    """Every model in the cache, by name."""
    found = []
    for root in sorted(cache_root().glob("models--*--*")):
        if not root.is_dir() or root.is_symlink():
            continue
        hub_id = root.name.removeprefix("models--").replace("--", "/", 1)
        cached = CachedModel(hub_id)
        files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        has_gguf = cached.commit is not None and any(cached.snapshot(cached.commit).glob("*.gguf"))
        found.append(
            CacheEntry(
                hub_id=hub_id, root=root, num_bytes=sum(path.stat().st_size for path in files),
                is_whole=cached.find() is not None or has_gguf,
            )
        )  # fmt: skip
    return found


def missing_weights(folder: Path) -> list[str]:
    """Weight files that `folder` lacks, by its own index."""
    if not (folder / INDEX_NAME).is_file():
        return [] if (folder / SINGLE_NAME).is_file() else [SINGLE_NAME]
    names = indexed_names(folder / INDEX_NAME)
    missing = [name for name in names if not (folder / name).is_file()]
    return [] if missing and (folder / SINGLE_NAME).is_file() else missing


def indexed_names(index: Path) -> list[str]:
    """The files that `model.safetensors.index.json` names; none where it is damaged, which its reader will say."""
    try:
        weight_map = read_json(index).get("weight_map")
    except OffmoeError:
        return []
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


def _has_all_parts(path: Path) -> bool:
    try:
        return all(part.is_file() for part in split_paths(path))
    except OffmoeError:
        return False
