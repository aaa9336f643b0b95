"""The safetensors of a repository on the Hub, of which only the bytes that are asked for are fetched, and none kept."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from torch import Tensor

from intactkv.checkpoint.shards import INDEX, LINE, SINGLE, Entry, add, aligned, check_index, weight_map
from intactkv.error import IntactKVError, first_line
from intactkv.lines import from_json

_PIECE = 2**24  # bytes a request
_AT_ONCE = 8  # requests
_RETRIES = 5  # times that a piece may be cut off without a byte more
_HEADER = 10**8  # bytes that safetensors allows a header
_told: dict[str, ModelInfo] = {}  # what the Hub said when it was asked for sizes, until the same model is read


class Repository:
    """A model's safetensors on the Hub, at the commit that its branch has now. See `Shards`.

    Raises `IntactKVError` where there are none, and where the Hub is not reached.
    """

    def __init__(self, name: str) -> None:
        self._name, self._tags = name, dict[str, str]()
        self._pool = ThreadPoolExecutor(_AT_ONCE, "hub")
        try:
            info = _told.pop(name, None) or HfApi().model_info(name, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            self.revision = str(info.sha)
            there = {each.rfilename for each in info.siblings or []}
            said = None
            if INDEX in there:
                index = hf_hub_download(name, INDEX, revision=self.revision)
                said = weight_map(Path(index).read_bytes(), f"{name}/{INDEX}")
            elif SINGLE not in there:
                raise IntactKVError(f"{name} holds no {SINGLE}; give a folder or Hub name of safetensors")
        except (OSError, ValueError, HfHubHTTPError, HTTPError) as error:
            if isinstance(error, IntactKVError):
                raise
            raise IntactKVError(f"the Hub does not show {name} ({first_line(error)}); try again") from error
        self.entries: dict[str, Entry] = {}
        self._begin: dict[str, int] = {}
        files = [SINGLE] if said is None else sorted(set(said.values()))
        for file, header in zip(files, map(self._header, files), strict=True):
            for tensor, (dtype, shape, begin) in header.items():
                add(self.entries, tensor, file, dtype, shape)
                self._begin[tensor] = begin
        check_index(said, self.entries, name)

    @property
    def identity(self) -> str:
        """The commit."""
        return f"{self._name}@{self.revision}"

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See `Shards.read`."""
        entry = self.entries[name]
        shape = list(entry.shape)
        begin, row = self._begin[name], math.prod(shape[1:]) * entry.dtype.itemsize
        if rows is not None:
            begin, shape[0] = begin + rows.start * row, rows.stop - rows.start
        size = math.prod(shape) * entry.dtype.itemsize
        # a mapped tensor lies as in its file, and a product's last bits depend on how its operands are aligned
        content = aligned(torch.empty(size + LINE, dtype=torch.uint8), size, begin if rows is None else 0)
        self._fill(entry.file, begin, content.numpy().data)
        return content.view(entry.dtype).view(shape)

    def _header(self, file: str) -> dict[str, tuple[str, list[int], int]]:
        """A file's tensors: type, shape and where each begins."""
        size = int.from_bytes(self._bytes(file, 0, 8), "little")
        try:
            if size > _HEADER:
                raise ValueError(f"a header of {size} bytes")
            found: dict[str, Any] = from_json(self._bytes(file, 8, 8 + size))
            found.pop("__metadata__", None)
            return {
                name: (str(each["dtype"]), [int(n) for n in each["shape"]], 8 + size + int(each["data_offsets"][0]))
                for name, each in found.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, IntactKVError):
                raise
            raise IntactKVError(f"{self._name}/{file} is no file of safetensors ({first_line(error)})") from error

    def _bytes(self, file: str, begin: int, end: int) -> bytes:
        content = bytearray(end - begin)
        self._fill(file, begin, memoryview(content))
        return bytes(content)

    def _fill(self, file: str, begin: int, into: memoryview) -> None:
        """Bytes from `begin` on, by several requests at once. Raises `IntactKVError` where the Hub gives others."""
        pieces = [(at, into[at : at + _PIECE]) for at in range(0, len(into), _PIECE)]
        list(self._pool.map(lambda piece: self._fetch(file, begin + piece[0], piece[1]), pieces))  # or what they raise

    def _fetch(self, file: str, begin: int, into: memoryview) -> None:
        """Bytes from `begin` on; a connection that is cut is taken up where it ended."""
        url, done, cuts = hf_hub_url(self._name, file, revision=self.revision), 0, 0
        while done < len(into):
            before, asked = done, f"bytes={begin + done}-{begin + len(into) - 1}"
            headers = {**build_hf_headers(), "Range": asked, "Accept-Encoding": "identity"}
            try:
                with http_stream_backoff(
                    "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
                ) as answer:
                    hf_raise_for_status(answer)
                    self._check(file, asked, answer)
                    for chunk in answer.iter_bytes():
                        if done + len(chunk) > len(into):
                            raise IntactKVError(f"the Hub gives more of {self._name}/{file} than was asked for")
                        into[done : done + len(chunk)] = chunk
                        done += len(chunk)
            except (OSError, HfHubHTTPError, HTTPError) as error:
                cuts = 0 if done > before else cuts + 1
                if cuts > _RETRIES or isinstance(error, HfHubHTTPError):
                    raise IntactKVError(
                        f"the Hub does not give {self._name}/{file} ({first_line(error)}); try again"
                    ) from error

    def _check(self, file: str, asked: str, answer: Any) -> None:
        """Raise `IntactKVError` for an answer that is not this part of this file: a mirror may send the whole."""
        told = answer.headers.get("Content-Range", "")
        if answer.status_code != 206 or told.rpartition("/")[0] != asked.replace("=", " "):
            raise IntactKVError(
                f"the Hub's answer to a part of {self._name}/{file} is another part or the whole (status "
                f"{answer.status_code}, {told or 'no Content-Range'}); use an endpoint that serves ranges, or download "
                f"{self._name} and give the folder"
            )
        linked = [each.headers["X-Linked-Etag"] for each in answer.history if "X-Linked-Etag" in each.headers]
        tag = linked[0] if linked else answer.headers.get("ETag", "")
        if self._tags.setdefault(file, tag) != tag:
            raise IntactKVError(f"{self._name}/{file} changed on the Hub while it was read (ETag {tag}); begin again")


def in_cache(name: str) -> Path | None:
    """The Hub's cache of a model, if all its safetensors are there; None also for what is no name."""
    try:
        index, single = (try_to_load_from_cache(name, each) for each in (INDEX, SINGLE))
        files = set(weight_map(Path(index).read_bytes(), index).values()) if isinstance(index, str) else {SINGLE}
        whole = all(isinstance(try_to_load_from_cache(name, each), str) for each in files)
    except HFValidationError:
        return None
    found = index if isinstance(index, str) else single
    return Path(found).parent if isinstance(found, str) and whole else None


def bytes_on_the_hub(name: str) -> int:
    """The size of a Hub model's safetensors; 0 where the Hub does not say."""
    try:
        info = _told[name] = HfApi().model_info(name, files_metadata=True, timeout=5)
    except (OSError, ValueError, HfHubHTTPError, HTTPError):
        return 0
    return sum(each.size or 0 for each in info.siblings or [] if each.rfilename.endswith(".safetensors"))
