"""Which layers of a model an intact KV does not speak for."""

from __future__ import annotations

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from intactkv.artifact import IntactKV


def uncovered_layers(kv: IntactKV, config: PreTrainedConfig) -> list[int]:
    """Layers that keep more than keys and values of their own from token to token: `kv` does not cover these.

    Recurrent and convolutional states, the keys of sparse-attention indexers, and whatever a layer keeps that has no
    entry in `kv` and does not share another layer's.
    """
    decoder = config.get_text_config(decoder=True)
    own = decoder.num_hidden_layers - (getattr(decoder, "num_kv_shared_layers", None) or 0)
    stateful = [
        i
        for i, layer in enumerate(DynamicCache(config=config).layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin) or hasattr(layer, "update_indexer")
    ]
    return sorted({*stateful, *(set(range(own)) - set(kv.layers))})
