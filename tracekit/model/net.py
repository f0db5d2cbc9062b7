"""The reference model in PyTorch: what :mod:`tracekit.model.train` trains, operation for operation llama.cpp's
``hy_v3`` graph.

Source of the graph: llama.cpp, ``src/models/hy-v3.cpp`` (dense blocks: QK norm, NeoX rotary, SwiGLU; the NextN block
takes ``eh_proj [enorm(embedding), hnorm(hidden)]`` and shares the output matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, under llama.cpp's names."""

    n_vocab: int = 2048
    n_embd: int = 256
    n_layer: int = 5
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 64
    n_ff: int = 768
    n_ctx_train: int = 512
    rope_freq_base: float = 10000.0
    # so small that it never changes a bit of an RMS norm: this is what makes exact width expansion possible
    norm_rms_eps: float = 1e-12


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, in float32, as llama.cpp's ``ggml_rms_norm`` followed by a product."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Block(nn.Module):
    """One pre-norm decoder block: grouped-query attention with QK norm and NeoX rotary, then SwiGLU."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        q, kv = s.n_head * s.n_embd_head, s.n_head_kv * s.n_embd_head
        self.attn_q = nn.Linear(s.n_embd, q, bias=False)
        self.attn_k = nn.Linear(s.n_embd, kv, bias=False)
        self.attn_v = nn.Linear(s.n_embd, kv, bias=False)
        self.attn_output = nn.Linear(q, s.n_embd, bias=False)
        self.ffn_gate = nn.Linear(s.n_embd, s.n_ff, bias=False)
        self.ffn_up = nn.Linear(s.n_embd, s.n_ff, bias=False)
        self.ffn_down = nn.Linear(s.n_ff, s.n_embd, bias=False)
        for name, size in (
            ("attn_norm", s.n_embd),
            ("ffn_norm", s.n_embd),
            ("attn_q_norm", s.n_embd_head),
            ("attn_k_norm", s.n_embd_head),
        ):
            self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, n_head, T, d]`` and keys, values ``[B, n_head_kv, T, d]`` of inputs ``[B, T, n_embd]``."""
        s, (b, t, _) = self.s, x.shape
        x = rms_norm(x, self.attn_norm, s.norm_rms_eps)
        q = self.attn_q(x).view(b, t, s.n_head, s.n_embd_head)
        k = self.attn_k(x).view(b, t, s.n_head_kv, s.n_embd_head)
        v = self.attn_v(x).view(b, t, s.n_head_kv, s.n_embd_head)
        q = rotate(rms_norm(q, self.attn_q_norm, s.norm_rms_eps).transpose(1, 2), *rope)
        k = rotate(rms_norm(k, self.attn_k_norm, s.norm_rms_eps).transpose(1, 2), *rope)
        return q, k, v.transpose(1, 2).float()

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual and feed-forward, given the attention's result ``[B, n_head, T, d]``."""
        b, _, t, _ = attended.shape
        x = x + self.attn_output(attended.transpose(1, 2).reshape(b, t, -1))
        y = rms_norm(x, self.ffn_norm, self.s.norm_rms_eps)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The whole block, causal, on ``[B, T, n_embd]``."""
        q, k, v = self.qkv(x, rope)
        return self.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def rotary(s: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, d/2]`` of NeoX-style rotary embedding (pairs ``i`` and ``i + d/2``)."""
    freq = s.rope_freq_base ** (-torch.arange(0, s.n_embd_head, 2).float() / s.n_embd_head)
    angle = torch.arange(length).float()[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply :func:`rotary` to ``[B, heads, T, d]``."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Model(nn.Module):
    """Trunk, NextN block, and the embedding that serves as output matrix too."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.token_embd = nn.Parameter(torch.randn(s.n_vocab, s.n_embd) * 0.02)
        self.blk = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.output_norm = nn.Parameter(torch.ones(s.n_embd))
        self.nextn = Block(s)
        self.eh_proj = nn.Linear(2 * s.n_embd, s.n_embd, bias=False)
        self.enorm, self.hnorm, self.shared_head_norm = (nn.Parameter(torch.ones(s.n_embd)) for _ in range(3))
        for name, p in self.named_parameters():
            if p.ndim == 2 and name != "token_embd":
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * 0.6)
                if "attn_output" in name or "ffn_down" in name:
                    p.data.mul_((2 * s.n_layer) ** -0.5)

    def hidden(self, tokens: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states ``[B, T, n_embd]`` after the final norm: what the output matrix and the NextN block both
        take.
        """
        x = self.token_embd[tokens]
        for block in self.blk:
            x = block(x, rope)
        return rms_norm(x, self.output_norm, self.s.norm_rms_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, T, n_vocab]`` of hidden states; the embedding is the output matrix too."""
        return F.linear(hidden, self.token_embd)

    def draft_hidden(self, tokens: Tensor, hidden: Tensor, depth: int, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The NextN block unrolled ``depth`` times along the true tokens.

        ``tokens [B, T]`` and ``hidden [B, T, n_embd]`` (the target's). Element ``d`` of the result has at row ``t``
        the state that predicts ``tokens[t + 1]`` after ``d`` drafts of its own: its input is the embedding of
        ``tokens[t]`` and, for ``d = 0``, the target's state at ``t - 1``, else the block's own at ``t - 1``
        and depth ``d - 1``. Rows ``t <= d`` have no such past and hold nothing useful.
        """
        s, eps = self.s, self.s.norm_rms_eps
        t = tokens.shape[1]
        e = rms_norm(self.token_embd[tokens], self.enorm, eps)
        previous, out, keys, values = hidden, [], [], []
        index = torch.arange(t, device=tokens.device)
        groups = s.n_head // s.n_head_kv
        for d in range(depth):
            shifted = F.pad(previous, (0, 0, 1, 0))[:, :-1]
            x = self.eh_proj(torch.cat((e, rms_norm(shifted, self.hnorm, eps)), -1))
            q, k, v = self.nextn.qkv(x, rope)
            keys.append(k.repeat_interleave(groups, 1))
            values.append(v.repeat_interleave(groups, 1))
            if d == 0:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                # rows up to t - d come from the target's states, row t - d + i from this chain's depth i
                scale = s.n_embd_head**-0.5
                scores = (q @ keys[0].transpose(-1, -2)) * scale
                scores = scores.masked_fill(index[None, :] > index[:, None] - d, float("-inf"))
                own_k = [F.pad(keys[i], (0, 0, d - i, 0))[:, :, :t] for i in range(1, d + 1)]
                own_v = [F.pad(values[i], (0, 0, d - i, 0))[:, :, :t] for i in range(1, d + 1)]
                own = torch.stack([(q * k_i).sum(-1) * scale for k_i in own_k], -1)
                weights = torch.cat((scores, own), -1).softmax(-1)
                attended = weights[..., :t] @ values[0]
                for i, v_i in enumerate(own_v):
                    attended = attended + weights[..., t + i, None] * v_i
            previous = rms_norm(self.nextn.rest(x, attended), self.shared_head_norm, eps)
            out.append(previous)
        return out
