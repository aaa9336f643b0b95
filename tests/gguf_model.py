"""A Llama in memory as a GGUF, by the gguf package: what llama.cpp's own converter does, less its tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel


def write_gguf(
    model: PreTrainedModel, path: Path, kind: str = "F32", *, vocabulary: bool = True, fused: bool = False
) -> Path:
    """Write `model` with its matrices as `kind`; llama.cpp wants a `vocabulary`, which is of numbers.

    `fused`, as a Phi 3, whose queries, keys and values are one product.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quants

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH.PHI3 if fused else MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = GGUFWriter(path, "phi3" if fused else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}".encode() for i in range(config.vocab_size)])
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([TokenType.NORMAL] * config.vocab_size)
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)
    for name, tensor in (_fused(model.state_dict()) if fused else model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two channels of a RoPE pair side by side
            pairs = tensor.view(-1, 2, config.head_dim // 2, config.hidden_size)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        dtype = GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = quants.quantize(tensor.float().numpy(), dtype)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for one, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if (part := next((each for each in parts if each in name), None)) is not None:
                name = name.replace(part, one)
        made[name] = torch.cat([made[name], tensor]) if name in made else tensor
    return made
