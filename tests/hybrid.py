"""A small model with a recurrent memory: ``qwen35``, gated delta nets and every fourth layer attention, random weights.

Its NextN block passes the last token's embedding on to the output layer, and every other block adds a little to it: so
that drafts are right about as often as what was read before the last token does not matter.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tracekit.model import weights
from tracekit.model.build import REFERENCE

N_LAYER, N_EMBD, N_FF, N_HEAD, HEAD = 4, 64, 128, 2, 32
STATE, GROUPS, RANK, CONV = 64, 2, 4, 4


def write(path: Path, scale: float = 0.3, seed: int = 0, split: int = 0) -> Path:
    """Write it to ``path`` in float32, with the reference model's vocabulary; ``scale``: of what the blocks add.

    ``split``: tensors of a shard, the files being named as llama.cpp names them.
    """
    rng, vocabulary = np.random.default_rng(seed), weights.read(REFERENCE)
    n_vocab, inner = len(vocabulary.tokens), STATE * RANK
    qkv = 2 * STATE * GROUPS + inner

    def matrix(rows: int, columns: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def ones(n: int) -> np.ndarray:
        return np.ones(n, np.float32)

    def attention(b: str, size: float) -> dict[str, np.ndarray]:
        return {
            f"{b}.attn_q.weight": matrix(2 * HEAD * N_HEAD, N_EMBD),  # and a gate
            f"{b}.attn_k.weight": matrix(HEAD, N_EMBD),
            f"{b}.attn_v.weight": matrix(HEAD, N_EMBD),
            f"{b}.attn_output.weight": matrix(N_EMBD, HEAD * N_HEAD, size),
            f"{b}.attn_q_norm.weight": ones(HEAD),
            f"{b}.attn_k_norm.weight": ones(HEAD),
        }

    def delta_net(b: str) -> dict[str, np.ndarray]:
        return {
            f"{b}.attn_qkv.weight": matrix(qkv, N_EMBD),
            f"{b}.attn_gate.weight": matrix(inner, N_EMBD),
            f"{b}.ssm_conv1d.weight": matrix(qkv, CONV),
            f"{b}.ssm_dt.bias": rng.uniform(-2, 0, RANK).astype(np.float32),
            f"{b}.ssm_a": -rng.uniform(0.1, 1, RANK).astype(np.float32),
            f"{b}.ssm_beta.weight": matrix(RANK, N_EMBD),
            f"{b}.ssm_alpha.weight": matrix(RANK, N_EMBD),
            f"{b}.ssm_norm.weight": ones(STATE),
            f"{b}.ssm_out.weight": matrix(N_EMBD, inner, scale),
        }

    def rest(b: str, size: float) -> dict[str, np.ndarray]:
        return {
            f"{b}.attn_norm.weight": ones(N_EMBD),
            f"{b}.post_attention_norm.weight": ones(N_EMBD),
            f"{b}.ffn_gate.weight": matrix(N_FF, N_EMBD),
            f"{b}.ffn_up.weight": matrix(N_FF, N_EMBD),
            f"{b}.ffn_down.weight": matrix(N_EMBD, N_FF, size),
        }

    tensors = {
        "token_embd.weight": rng.standard_normal((n_vocab, N_EMBD)).astype(np.float32),
        "output_norm.weight": ones(N_EMBD),
        "output.weight": matrix(n_vocab, N_EMBD),
    }
    for i in range(N_LAYER):
        b = f"blk.{i}"
        tensors |= (delta_net(b) if (i + 1) % 4 else attention(b, scale)) | rest(b, scale)
    b = f"blk.{N_LAYER}"
    tensors |= attention(b, 0.1) | rest(b, 0.1)
    tensors[f"{b}.nextn.eh_proj.weight"] = np.eye(N_EMBD, 2 * N_EMBD, dtype=np.float32)
    tensors |= {f"{b}.nextn.{name}.weight": ones(N_EMBD) for name in ("enorm", "hnorm", "shared_head_norm")}

    out = gguf.GGUFWriter(path, "qwen35", split_max_tensors=split)
    out.add_block_count(N_LAYER + 1)
    out.add_nextn_predict_layers(1)
    out.add_context_length(4096)
    out.add_embedding_length(N_EMBD)
    out.add_feed_forward_length(N_FF)
    out.add_head_count(N_HEAD)
    out.add_head_count_kv(1)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(HEAD)
    out.add_rope_dimension_sections([HEAD // 4] * 2 + [0, 0])
    out.add_rope_freq_base(10_000.0)
    out.add_ssm_conv_kernel(CONV)
    out.add_ssm_inner_size(inner)
    out.add_ssm_state_size(STATE)
    out.add_ssm_time_step_rank(RANK)
    out.add_ssm_group_count(GROUPS)
    out.add_uint32("qwen35.full_attention_interval", 4)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(list(vocabulary.tokens))
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    out.add_token_types([control if t.startswith("<|") else normal for t in vocabulary.tokens])
    out.add_token_merges(list(vocabulary.merges))
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    for name, values in tensors.items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
