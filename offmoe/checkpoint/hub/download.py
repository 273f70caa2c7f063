"""A model from the hub into its local cache: only what is needed, resumed where it stopped, into a disk that has room.

Files go to the cache in the layout that all programs of the hub share (hub_cache.py), so that each finds what the other
has fetched. A file is written beside its place as `BLOB.incomplete`, under the lock that the hub's own library takes,
and goes on there after a break; it gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any

from offmoe.checkpoint.hub.api import Hub, Listing, RemoteFile
from offmoe.checkpoint.hub.cache import CachedModel, cache_root, indexed_names
from offmoe.checkpoint.hub.files import gguf_parts, small_names, weight_names
from offmoe.checkpoint.index import INDEX_NAME, QUANT_CONFIG_NAME
from offmoe.core.errors import CheckpointError, HubUnreachableError, OutputError
from offmoe.core.progress import Progress
from offmoe.core.units import format_bytes

_NUM_THREADS = 4
_PIECE_BYTES = 1 << 20
# Breaks of a connection in a row without a byte between them before the download is given up.
_MAX_BREAKS = 4
_WAIT_S = 1.0
_TELL_EVERY_S = 0.2


class Download:
    """One model on its way into the cache. Made when the hub has said which files there are; nothing is fetched yet.

    `gguf`: the file that is wanted of a model that is GGUF files. `code`: with the model's Python files.
    """

    def __init__(self, hub: Hub, listing: Listing, *, code: bool, gguf: str | None) -> None:
        self._hub = Hub(listing.hub_id, listing.commit, token=hub.token)
        self._listing, self._code, self._gguf = listing, code, gguf
        self.hub_id = listing.hub_id
        self._cached, self._asked = CachedModel(listing.hub_id, hub.revision), CachedModel(hub.hub_id, hub.revision)
        self.folder = self._cached.snapshot(listing.commit)
        self._stop = threading.Event()
        self._done_bytes, self._lock = 0, threading.Lock()

    @property
    def has_config(self) -> bool:
        """True for a model in Hugging Face's form; False for GGUF files."""
        return self._gguf is None and "config.json" in self._listing.names

    @cached_property
    def small(self) -> list[RemoteFile]:
        """All files but the weights."""
        names = small_names(self._listing.names, code=self._code) if self.has_config else []
        return [self._hub.identify(self._listing, name) for name in names]

    @cached_property
    def weights(self) -> list[RemoteFile]:
        """The files with the weights. Fetches the index of shards, which is small."""
        if not self.has_config:
            names = gguf_parts(self.hub_id, self._listing.names, self._gguf)
        else:
            indexed: list[str] = []
            if INDEX_NAME in self._listing.names:
                self._fetch([self._hub.identify(self._listing, INDEX_NAME)])
                indexed = indexed_names(self.folder / INDEX_NAME)
            names = weight_names(self.hub_id, self._listing.names, indexed)
        return [self._hub.identify(self._listing, name) for name in names]

    @property
    def model(self) -> Path:
        """The model's folder, or its GGUF file: whole after `fetch_all`."""
        return self.folder if self.has_config else self.folder / self.weights[0].name

    def is_complete(self) -> bool:
        """True where nothing has to be fetched."""
        small = all((self.folder / name).is_file() for name in small_names(self._listing.names, code=self._code))
        return (small or not self.has_config) and all((self.folder / file.name).is_file() for file in self.weights)

    def fetch_config(self) -> Path:
        """The folder, with config.json and ModelOpt's in it, and with the model's code where that is wanted."""
        configs = ("config.json", QUANT_CONFIG_NAME)
        first = [file for file in self.small if file.name in configs or file.name.endswith(".py")]
        self._fetch(first)
        return self.folder

    def fetch_small(self) -> Path:
        """The folder, with all but the weights in it."""
        self._fetch(self.small)
        return self.folder

    def refuse_full_disk(self) -> None:
        """Raise OutputError, with both numbers, where the cache's disk has no room for what is missing."""
        need = sum(self._missing_bytes(file) for file in [*self.small, *self.weights])
        root = cache_root()
        existing = next(folder for folder in (root, *root.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if need > free:
            raise OutputError(
                f"{self.hub_id} needs {format_bytes(need)} more in {root}, where {format_bytes(free)} are free; free "
                "some, or set HF_HOME to a folder on another disk"
            )

    def fetch_headers(self, folder: Path, progress: Progress) -> Path:
        """The model in `folder` with holes instead of weights: whatever reads headers reads it. Returns its path."""
        for file in self.small:
            target = folder / file.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / file.name, target)
        fetch_headers(self._hub, [file.name for file in self.weights], folder, progress)
        return folder if self.has_config else folder / Path(self.weights[0].name).name

    def fetch_all(self, progress: Progress) -> Path:
        """Fetch missing files, with `progress("download", bytes, of bytes)`. Returns the folder or GGUF file."""
        files = [*self.small, *self.weights]
        total = sum(file.num_bytes for file in files)
        self._done_bytes = total - sum(self._missing_bytes(file) for file in files)
        self._fetch(files, lambda: progress("download", min(self._done_bytes, total), total))
        self.keep_commit()
        return self.model

    def keep_commit(self) -> None:
        """Let what is whole be found without the hub. A cache that cannot be written stays as it is."""
        with contextlib.suppress(OSError):
            for cached in {self._cached, self._asked}:
                self._name_commit(cached)

    def _name_commit(self, cached: CachedModel) -> None:
        """`refs/REVISION`, last of all: until then an older commit that is whole can be loaded. A model that has
        another name now is found under the old one, too.
        """
        ref = cached.ref
        if cached.revision != self._listing.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self._listing.commit, encoding="utf-8")
        if cached != self._cached and not (snapshot := cached.snapshot(self._listing.commit)).exists():
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            try:
                snapshot.symlink_to(self.folder.resolve(), target_is_directory=True)
            except OSError:  # a file system without links: found under its new name alone
                ref.unlink(missing_ok=True)

    def _missing_bytes(self, file: RemoteFile) -> int:
        if (self.folder / file.name).is_file() or self._blob(file).is_file():
            return 0
        part = self._part(file)
        return file.num_bytes - (part.stat().st_size if part.is_file() else 0)

    def _blob(self, file: RemoteFile) -> Path:
        return self._cached.root / "blobs" / file.blob

    def _part(self, file: RemoteFile) -> Path:
        blob = self._blob(file)
        return blob.with_name(f"{blob.name}.incomplete")

    def _fetch(self, files: Iterable[RemoteFile], tell: Callable[[], None] = lambda: None) -> None:
        """Several files at once; the first failure, or Ctrl-C, ends all."""
        wanted = [file for file in files if not (self.folder / file.name).is_file()]
        if not wanted:
            return
        self._stop.clear()
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="offmoe-download") as threads:
            try:
                coming = [threads.submit(self._fetch_one, file) for file in wanted]
                while wait(coming, timeout=_TELL_EVERY_S, return_when=FIRST_EXCEPTION).not_done:
                    tell()
                    if any(future.done() and future.exception() for future in coming):
                        break
            finally:
                self._stop.set()
        tell()
        errors = [error for future in coming if (error := future.exception()) is not None]
        for error in errors:
            if isinstance(error, _StoppedError):
                continue
            if isinstance(error, OSError):
                raise OutputError(f"{self.hub_id} cannot be written to {self._cached.root}: {_why(error)}") from None
            raise error
        assert not errors, f"{errors=} without a cause"

    def _fetch_one(self, file: RemoteFile) -> None:
        from filelock import FileLock

        blob, pointer = self._blob(file), self.folder / file.name
        lock = cache_root() / ".locks" / self._cached.root.name / f"{file.blob}.lock"
        for path in (blob, pointer, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(lock)):
            if not blob.is_file():
                self._fill(file)
                self._part(file).replace(blob)
            if not pointer.is_file():
                _link(blob, pointer)

    def _fill(self, file: RemoteFile) -> None:
        """Append to the part that is there until it is whole. A connection that breaks is made again."""
        breaks = 0
        with self._part(file).open("ab") as part:
            if part.tell() > file.num_bytes:
                part.truncate(0)
            while (begin := part.tell()) < file.num_bytes:
                try:
                    with self._hub.open_from(file.name, begin) as answer:
                        if begin and answer.status != 206:  # a server without ranges sends all of it
                            part.truncate(0)
                        self._copy(answer, part)
                    reason = "the connection was closed"
                except HubUnreachableError as error:
                    reason = str(error)
                if (end := part.tell()) > file.num_bytes:
                    part.truncate(0)
                    raise CheckpointError(
                        f"the hub sends more than the {file.num_bytes} bytes of {file.name} of {self.hub_id} that it "
                        "lists; try again later"
                    )
                breaks = 0 if end > begin else breaks + 1
                if breaks >= _MAX_BREAKS:
                    raise HubUnreachableError(
                        f"the download of {file.name} of {self.hub_id} broke off at {end} of {file.num_bytes} bytes: "
                        f"{reason}; the same command goes on from there"
                    )
                if end < file.num_bytes and self._stop.wait(_WAIT_S * breaks):
                    raise _StoppedError

    def _copy(self, answer: Any, part: Any) -> None:
        while data := self._hub.read(answer, _PIECE_BYTES):
            part.write(data)
            with self._lock:
                self._done_bytes += len(data)
            if self._stop.is_set():
                raise _StoppedError


def fetch_headers(hub: Hub, names: list[str], folder: Path, progress: Progress) -> None:
    """The headers of weight files to `folder`, with holes as long as the rest."""
    done = 0
    with ThreadPoolExecutor(2 * _NUM_THREADS, thread_name_prefix="offmoe-headers") as threads:
        for _ in threads.map(lambda name: hub.header(name, folder / Path(name).name), names):
            done += 1
            progress("headers", done, len(names))


class _StoppedError(Exception):
    """End of a downloading thread because another one failed, or the user pressed Ctrl-C."""


def _why(error: OSError) -> str:
    return "no space left" if error.errno in {errno.ENOSPC, errno.EDQUOT} else error.strerror or str(error)


def _link(blob: Path, pointer: Path) -> None:
    """`pointer` shows `blob`: by a link relative to the cache, or by the file itself where links are not possible."""
    up = Path(*[".."] * (len(pointer.relative_to(blob.parent.parent).parts) - 1))
    try:
        pointer.symlink_to(up / "blobs" / blob.name)
    except FileExistsError:  # a link to nothing
        pointer.unlink()
        pointer.symlink_to(up / "blobs" / blob.name)
    except OSError:
        blob.replace(pointer)
