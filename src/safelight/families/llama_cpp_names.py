"""The names that llama.cpp gives to the tensors of language models, in GGUF files of text encoders.

Source: ``gguf.tensor_mapping``; ComfyUI-GGUF reads the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from safelight.errors import UnsupportedModelError
from safelight.files.header import Header

_DECODER = {
    r"token_embd\.": "model.embed_tokens.",
    r"output_norm\.": "model.norm.",
    r"output\.": "lm_head.",
    r"blk\.([0-9]+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"blk\.([0-9]+)\.attn_([qkv])\.": r"model.layers.\1.self_attn.\2_proj.",
    r"blk\.([0-9]+)\.attn_([qk])_norm\.": r"model.layers.\1.self_attn.\2_norm.",
    r"blk\.([0-9]+)\.attn_output\.": r"model.layers.\1.self_attn.o_proj.",
    r"blk\.([0-9]+)\.ffn_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"blk\.([0-9]+)\.ffn_(gate|up|down)\.": r"model.layers.\1.mlp.\2_proj.",
}
"""transformers' names of the tensors of Qwen2.5 and Qwen3."""

_T5 = {
    r"token_embd\.": "shared.",
    r"enc\.output_norm\.": "encoder.final_layer_norm.",
    r"enc\.blk\.([0-9]+)\.attn_norm\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"enc\.blk\.([0-9]+)\.attn_([qkvo])\.": r"encoder.block.\1.layer.0.SelfAttention.\2.",
    r"enc\.blk\.([0-9]+)\.attn_rel_b\.": r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    r"enc\.blk\.([0-9]+)\.ffn_norm\.": r"encoder.block.\1.layer.1.layer_norm.",
    r"enc\.blk\.([0-9]+)\.ffn_gate\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.",
    r"enc\.blk\.([0-9]+)\.ffn_up\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.",
    r"enc\.blk\.([0-9]+)\.ffn_down\.": r"encoder.block.\1.layer.1.DenseReluDense.wo.",
}
"""transformers' names of the tensors of T5's encoder."""


def with_library_names(header: Header) -> Header:
    """Return a header with transformers' names, if it has llama.cpp's; otherwise itself.

    Raises UnsupportedModelError for a language model that cannot be used from such a file.
    """
    if any(name.startswith("enc.blk.") for name in header.tensors):
        return _renamed(header, _T5)
    if not any(name.startswith("blk.") for name in header.tensors):
        return header
    if header.metadata.get("general.architecture", "").startswith("qwen3vl"):
        problem = "is the language model of a Qwen3-VL as llama.cpp stores it, which is not supported"
        raise UnsupportedModelError(header.path, f"{problem}; use a safetensors file of it")
    if not any(re.match(r"blk\.0\.attn_q(_norm\.|\.bias)", name) for name in header.tensors):
        # llama.cpp stores the queries and keys of Llama and Mistral in another order; those of Qwen are unchanged.
        problem = "is a language model without biases and norms of its queries, as llama.cpp stores Llama and Mistral"
        raise UnsupportedModelError(header.path, f"{problem}; its order of rows is not supported")
    return _renamed(header, _DECODER)


def _renamed(header: Header, patterns: Mapping[str, str]) -> Header:
    named = {_rename(name, patterns): info for name, info in header.tensors.items()}
    if len(named) != len(header.tensors):
        raise UnsupportedModelError(header.path, "has two tensors that are the same one by llama.cpp's names")
    return replace(header, tensors={name: replace(info, name=name) for name, info in named.items()})


def _rename(name: str, patterns: Mapping[str, str]) -> str:
    found: Iterable[str] = (
        re.sub(rf"^{pattern}", new, name) for pattern, new in patterns.items() if re.match(pattern, name)
    )
    return next(iter(found), name)
