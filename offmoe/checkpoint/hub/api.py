"""One model on the Hugging Face hub, over HTTP: its list of files, small files, headers, and bytes from anywhere.

Addresses are those of the hub's public API: `/api/models/NAME/revision/main` lists files, `/NAME/resolve/REVISION/FILE`
is a file. HF_ENDPOINT names another server with the same API. Nothing is written here but headers.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import quote, urlsplit

from offmoe.checkpoint.gguf.file import SUFFIX as GGUF_SUFFIX
from offmoe.checkpoint.gguf.header import read_gguf_header
from offmoe.checkpoint.header import MAX_HEADER_BYTES
from offmoe.checkpoint.json_file import MAX_JSON_BYTES
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointError, HubUnreachableError, ModelNotFoundError

MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 30
# Most headers are within this; a longer one takes more requests.
_FIRST_BYTES = 1 << 20
# A GGUF header has the tokenizer in it and does not say its length.
_MOST_GGUF_HEADER_BYTES = 256 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_BLOB = re.compile(r"[\w.-]{1,200}")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a model. `blob` names its content in the local cache."""

    name: str
    num_bytes: int
    blob: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All files of a model at one commit. `hub_id` is the name that the hub has for it now."""

    hub_id: str
    commit: str
    names: tuple[str, ...]
    entries: dict[str, dict[str, Any]]


class Hub:
    """Requests about the model `hub_id` at `revision`: a branch, tag or commit. The user's token goes to the hub's own
    host and to no other; `token` is used in its place, False is none.

    Every method raises ModelNotFoundError in one line where the hub refuses, HubUnreachableError where it is not heard.
    """

    def __init__(self, hub_id: str, revision: str = MAIN, *, token: str | bool | None = None) -> None:
        self.hub_id, self.revision, self.token = hub_id, revision, token
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._opener = urllib.request.build_opener(_OneHostOnly)
        self._no_redirects = urllib.request.build_opener(_NoRedirects)

    @cached_property
    def _token(self) -> str | None:
        if isinstance(self.token, str):
            return self.token
        if self.token is False or os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in TRUE:
            return None
        from huggingface_hub import get_token

        return get_token()

    def listing(self) -> Listing:
        """The model's files, its commit and its present name."""
        url = f"{self.endpoint}/api/models/{quote(self.hub_id)}/revision/{quote(self.revision, safe='')}?blobs=true"
        try:
            with self._open(url, {}, "") as answer:
                found = json.loads(self._read_whole(answer, MAX_JSON_BYTES))
            entries = {entry["rfilename"]: entry for entry in found["siblings"]}
            hub_id, commit = found.get("id") or self.hub_id, found["sha"]
            if not COMMIT.fullmatch(commit) or not all(_is_plain(name) for name in entries):
                raise ValueError("an odd commit or file name")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.endpoint} answers about {self.hub_id} in another way: {error}") from None
        return Listing(hub_id=str(hub_id), commit=commit, names=tuple(sorted(entries)), entries=entries)

    def identify(self, listing: Listing, name: str) -> RemoteFile:
        """Size and content name of a file: from the listing, or asked for where a mirror leaves them out of it."""
        entry = listing.entries[name]
        large = entry.get("lfs") or {}
        size, blob = large.get("size", entry.get("size")), large.get("sha256") or entry.get("blobId")
        if not isinstance(size, int) or not isinstance(blob, str):
            size, blob = self._ask_identity(name)
        if not _BLOB.fullmatch(blob):
            raise CheckpointError(f"the hub names the content of {name} of {self.hub_id} {blob!r}, which is no name")
        return RemoteFile(name=name, num_bytes=size, blob=blob)

    def _ask_identity(self, name: str) -> tuple[int, str]:
        """Size and blob name of a file by the hub's own answer; the store it sends on to has other names."""
        with self._open(self._url(name), {}, name, method="HEAD") as answer:
            size = answer.headers.get("X-Linked-Size") or answer.headers.get("Content-Length") or ""
            blob = answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or ""
        if not size.isdigit():
            raise CheckpointError(f"the hub says no size of {name} of {self.hub_id}; download it by other means")
        return int(size), blob.removeprefix("W/").strip('"')

    def small_file(self, name: str) -> bytes:
        """A whole file."""
        with self._open(self._url(name), {}, name) as answer:
            return self._read_whole(answer, MAX_JSON_BYTES)

    def open_from(self, name: str, begin: int) -> Any:
        """An answer whose `read` gives the file's bytes from `begin` on; to be closed. Its `status` is 206, or 200 for
        a server that sends the whole file whatever was asked.
        """
        return self._open(self._url(name), {"Range": f"bytes={begin}-"} if begin else {}, name)

    def header(self, name: str, path: Path) -> None:
        """Put the header of `name` at the begin of `path`, and a hole as long as the rest behind it."""
        if name.endswith(GGUF_SUFFIX):
            self._gguf_header(name, path)
            return
        data, total = self._range(name, 0, _FIRST_BYTES)
        if len(data) < 8 or (size := int.from_bytes(data[:8], "little")) > min(MAX_HEADER_BYTES, total - 8):
            raise CheckpointError(f"{name} of {self.hub_id} has {total} bytes and no safetensors header")
        if 8 + size > len(data):
            more, _ = self._range(name, len(data), 8 + size - len(data))
            data += more
        _write_with_hole(path, data[: 8 + size], total)

    def _gguf_header(self, name: str, path: Path) -> None:
        """Twice as many bytes as before, until they are a header."""
        data, total = self._range(name, 0, _FIRST_BYTES)
        while True:
            _write_with_hole(path, data, total)
            file = ShardFile(path)
            try:
                read_gguf_header(file, file_idx=0)
                return
            except CheckpointError:
                if len(data) >= min(total, _MOST_GGUF_HEADER_BYTES):
                    raise
            finally:
                file.close()
            more, _ = self._range(name, len(data), min(len(data), total - len(data)))
            data += more

    def _url(self, name: str) -> str:
        return f"{self.endpoint}/{quote(self.hub_id)}/resolve/{quote(self.revision, safe='')}/{quote(name)}"

    def _range(self, name: str, begin: int, num_bytes: int) -> tuple[bytes, int]:
        """Bytes from `begin`, at most `num_bytes`, and how many the whole file has."""
        with self._open(self._url(name), {"Range": f"bytes={begin}-{begin + num_bytes - 1}"}, name) as answer:
            data = self._read_whole(answer, num_bytes)
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 206 and found and int(found.group(1)) == begin:
                return data, int(found.group(3))
            length = answer.headers.get("Content-Length", "")
            if answer.status == 200 and begin == 0 and length.isdigit() and int(length) <= num_bytes:
                return data, int(length)  # a file that is smaller than the range, sent whole
        raise CheckpointError(f"the hub does not send ranges of {name} of {self.hub_id}; download the model instead")

    def _open(self, url: str, extra: dict[str, str], name: str, *, method: str = "GET") -> Any:
        headers = {"User-Agent": "offmoe"} | ({"Authorization": f"Bearer {self._token}"} if self._token else {})
        opener = self._opener if method == "GET" else self._no_redirects
        try:
            request = urllib.request.Request(url, headers=headers | extra, method=method)
            return opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if method == "HEAD" and 300 <= error.code < 400:
                return error  # an answer with headers, as any other
            error.close()
            raise self._refusal(error, name) from None
        except (OSError, HTTPException, ValueError) as error:
            raise self._unreachable(error) from None

    def read(self, answer: Any, most_bytes: int) -> bytes:
        """Bytes of an answer, at most `most_bytes`."""
        try:
            data: bytes = answer.read(most_bytes)
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from None
        return data

    def _read_whole(self, answer: Any, most_bytes: int) -> bytes:
        """Read an answer to its end; one that ends before its announced length is a failure."""
        data = self.read(answer, most_bytes)
        if len(data) < most_bytes and answer.length:
            raise self._unreachable(ConnectionError("the connection was closed amid an answer"))
        return data

    def _unreachable(self, error: Exception) -> HubUnreachableError:
        reason = getattr(error, "reason", error)
        return HubUnreachableError(
            f"no folder {self.hub_id}, and the hub is out of reach: {reason}; check the network, or give a folder"
        )

    def _refusal(self, error: urllib.error.HTTPError, name: str) -> ModelNotFoundError:
        """One line for what the hub refuses; X-Error-Code tells a gated model from one that is not there."""
        code, kind = error.code, error.headers.get("X-Error-Code", "")
        if code >= 500 or code == 429:
            return HubUnreachableError(f"the hub answers HTTP {code} about {self.hub_id}; try again later")
        if kind == "GatedRepo" or (code == 403 and not kind):
            how = (
                "the token that was sent has no access" if self._token else "run `hf auth login`, or set HF_TOKEN"
            )  # fmt: skip
            return ModelNotFoundError(
                f"{self.hub_id} is gated (HTTP {code}): accept its terms on {self.endpoint}/{self.hub_id}; {how}"
            )
        if kind == "EntryNotFound" or (code == 404 and name and not kind):
            return ModelNotFoundError(f"{name} of {self.hub_id} is not on the hub: HTTP {code}")
        login = "" if self._token else "; a private one needs `hf auth login`, or HF_TOKEN"
        if kind == "RevisionNotFound":
            return ModelNotFoundError(f"{self.hub_id} has no revision {self.revision!r} on the hub (HTTP {code})")
        return ModelNotFoundError(
            f"no folder {self.hub_id}, and no such model on the hub (HTTP {code}); check the name{login}"
        )


# How the hub's own library reads switches in the environment.
TRUE = frozenset({"1", "ON", "YES", "TRUE"})


def _is_plain(name: object) -> bool:
    """True for a path that stays in the folder it is put into."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or ":" in name:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def _write_with_hole(path: Path, data: bytes, total: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(total)


class _OneHostOnly(urllib.request.HTTPRedirectHandler):
    """The hub sends on to other hosts, which must not see the token."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if following is not None and (before.scheme, before.netloc) != (after.scheme, after.netloc):
            following.remove_header("Authorization")
        return following


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An answer that sends on is the answer."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """None: nothing follows."""
        return None
