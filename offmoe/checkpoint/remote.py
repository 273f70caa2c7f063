"""The headers of a model on the hub, without its weights: some megabytes instead of hundreds of gigabytes.

A shard's header is fetched by an HTTP range and put at the begin of a file as long as the shard, the rest of which is a
hole: whatever reads headers reads it like a downloaded model. Nothing may read weights from it.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.parse import quote, urlsplit

from offmoe.base.errors import CheckpointError, ModelNotFoundError
from offmoe.checkpoint.header import MAX_HEADER_BYTES
from offmoe.checkpoint.index import INDEX_NAME, MAX_JSON_BYTES, SINGLE_NAME, is_shard_name, read_json
from offmoe.checkpoint.locate import is_hub_id, locate_model

_TIMEOUT_S = 30
_NUM_THREADS = 8
# Most headers are within this; a longer one takes a second request.
_FIRST_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
Progress = Callable[[str, int, int], None]


@contextmanager
def locate_headers(
    model: str | os.PathLike[str] | None, progress: Progress = lambda stage, done, total: None
) -> Iterator[Path]:
    """The folder or file of `model`; for a hub id one with its config and headers, which is gone afterwards.

    Raises ModelNotFoundError or CheckpointError.
    """
    if model is None or not is_hub_id(os.fspath(model)):
        yield locate_model(model)
        return
    name = os.fspath(model)
    with TemporaryDirectory(prefix="offmoe-headers-") as root:
        folder = Path(root) / name.rpartition("/")[2]
        folder.mkdir()
        fetch_headers(name, folder, progress)
        yield folder


def fetch_headers(hub_id: str, folder: Path, progress: Progress = lambda stage, done, total: None) -> None:
    """config.json and the safetensors headers of `hub_id` to `folder`; from HF_ENDPOINT where that is set."""
    hub = _Hub(hub_id)
    (folder / "config.json").write_bytes(hub.small_file("config.json"))
    try:
        (folder / INDEX_NAME).write_bytes(hub.small_file(INDEX_NAME))
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not names or not all(is_shard_name(name) for name in names):
            raise CheckpointError(f"{INDEX_NAME} of {hub_id} names no shards, or odd ones; the model is damaged")
    except ModelNotFoundError:
        names = [SINGLE_NAME]
    done = 0
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for _ in threads.map(lambda name: hub.header(name, folder / name), names):
            done += 1
            progress("headers", done, len(names))


class _Hub:
    """One model on the hub, over HTTP."""

    def __init__(self, hub_id: str) -> None:
        self._id = hub_id
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._url = f"{endpoint}/{quote(hub_id)}/resolve/main/"
        token = os.environ.get("HF_TOKEN")
        self._headers = {"User-Agent": "offmoe"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._opener = urllib.request.build_opener(_OneHostOnly)

    def small_file(self, name: str) -> bytes:
        """A whole file. Raises ModelNotFoundError where there is none."""
        data, _ = self._get(name, {}, MAX_JSON_BYTES)
        return data

    def header(self, name: str, path: Path) -> None:
        """Put the header of shard `name` at the begin of `path`, and a hole behind it."""
        data, total = self._range(name, 0, _FIRST_BYTES)
        if len(data) < 8 or (size := int.from_bytes(data[:8], "little")) > min(MAX_HEADER_BYTES, total - 8):
            raise CheckpointError(f"{name} of {self._id} has {total} bytes and no safetensors header")
        if 8 + size > len(data):
            more, _ = self._range(name, len(data), 8 + size - len(data))
            data += more
        with path.open("wb") as file:
            file.write(data[: 8 + size])
            file.truncate(total)

    def _range(self, name: str, begin: int, num_bytes: int) -> tuple[bytes, int]:
        """Bytes from `begin`, at most `num_bytes`, and how many the whole file has."""
        data, answer = self._get(name, {"Range": f"bytes={begin}-{begin + num_bytes - 1}"}, num_bytes)
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status == 206 and found and int(found.group(1)) == begin:
            return data, int(found.group(3))
        length = answer.headers.get("Content-Length", "")
        if answer.status == 200 and begin == 0 and length.isdigit() and int(length) <= num_bytes:
            return data, int(length)  # a file that is smaller than the range, sent whole
        raise CheckpointError(f"the hub does not send ranges of {name} of {self._id}; download the model instead")

    def _get(self, name: str, extra: dict[str, str], most_bytes: int) -> tuple[bytes, Any]:
        request = urllib.request.Request(self._url + quote(name), headers=self._headers | extra)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.read(most_bytes), answer
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code}" + ("; it may need an account: set HF_TOKEN" if error.code in (401, 403) else "")
            raise ModelNotFoundError(f"{name} of {self._id} is not on the hub: {why}") from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ModelNotFoundError(f"no folder {self._id}, and the hub is out of reach: {reason}") from None


class _OneHostOnly(urllib.request.HTTPRedirectHandler):
    """The hub sends on to other hosts, which must not see the token."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The next request."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            following.remove_header("Authorization")
        return following
