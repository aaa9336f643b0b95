"""The artifact and its file: torch and safetensors only, so that engines can read it without transformers."""

from intactkv.artifact.data import IntactKV

__all__ = ["IntactKV"]
