"""Where an artifact lies in a folder or a repository on the Hub, and how it gets there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from intactkv.error import IntactKVError, first_line

if TYPE_CHECKING:
    from intactkv.artifact.data import IntactKV

FILE = "prefix.intactkv"  # no *.safetensors: engines take every file of that name in a folder for weights

_CARD = """---
library_name: intactkv
tags: [intactkv, quantization, kv-cache]
{base}---

# Intact KV of {model}

The full-precision keys and values of {count} prefix tokens (ids `{ids}`), for quantized forms of `{model}`: basis
`{basis}`, captured in {dtype}, {bytes:,} bytes in {layers} layers. Made with
[intactkv](https://pypi.org/project/intactkv/); the method is IntactKV (Liu et al., Findings of ACL 2024,
arXiv 2403.01241).

```python
import intactkv as ik

with ik.attach(model, "{repo}"):  # a quantized form of {model}
    model.generate(**inputs)  # of prompts that begin with these tokens
```
"""


def artifact_file(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The artifact's file of a folder, a Hub repository, or the file itself."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / FILE).is_file():
            raise IntactKVError(f"{path} holds no {FILE}; write one with `intactkv capture` or `save_pretrained`")
        return path / FILE
    name = os.fspath(source)
    if name.count("/") != 1 or path.suffix in (".safetensors", ".intactkv") or path.parent.is_dir():
        raise IntactKVError(
            f"{name} is not a file or folder; write one with `intactkv capture`, or give OWNER/NAME of a repository"
        )
    try:
        return Path(hf_hub_download(name, FILE, revision=revision))
    except LocalEntryNotFoundError as error:  # the Hub is not reached, or not to be
        raise IntactKVError(
            f"{name} is no folder here, is not in the Hub's cache, and the Hub was not reached "
            f"({first_line(error)}); give a file, a folder, or a name when online"
        ) from error
    except EntryNotFoundError as error:
        raise IntactKVError(f"{name} on the Hub holds no {FILE}; push one with `push_to_hub`") from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise IntactKVError(
            f"{name} is no folder here, and the Hub gives no intact KV of that name ({first_line(error)}); check it"
        ) from error


def push(kv: IntactKV, repo_id: str, *, private: bool | None, revision: str | None, token: str | None) -> str:
    """See `IntactKV.push_to_hub`."""
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            kv.save_pretrained(scratch)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                ModelCard(card(kv, repo_id)).save(Path(scratch) / "README.md")
            done = api.upload_folder(
                repo_id=repo_id, folder_path=scratch, revision=revision, commit_message="Intact KV"
            )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise IntactKVError(
            f"the Hub does not take the intact KV as {repo_id} ({first_line(error)}); check the name, and that you are "
            "logged in with a token that may write (hf auth login)"
        ) from error
    return str(done.commit_url)


def card(kv: IntactKV, repo_id: str) -> str:
    """A repository's page: what is in the artifact, and how it is used."""
    model = str(kv.provenance.get("model") or "an unnamed model")
    on_the_hub = model.count("/") == 1 and not Path(model).exists()
    return _CARD.format(
        base=f"base_model: {model}\n" if on_the_hub else "", model=model, count=len(kv), ids=kv.ids.tolist(),
        basis=kv.provenance.get("basis", "full"), dtype=kv.provenance.get("dtype", "unknown"), bytes=kv.nbytes,
        layers=len(kv.layers), repo=repo_id,
    )  # fmt: skip
