"""The OLMoE decoder as plain modules, for training: same function as transformers' ``OlmoeForCausalLM``.

Muennighoff et al., OLMoE (arXiv 2409.02060): pre-norm, full-width query/key norms, no biases, softmax over all
experts before the choice of the top k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .balance import RouterStats, router_stats
from .config import ModelShape
from .experts import experts
from .functions import rms_norm, rotary_turns, rotate
from .tokens import VOCAB


class Output(NamedTuple):
    """Logits (T, V) for every position, row by row, and the routers' statistics, layer by layer."""

    logits_TV: Tensor
    routers: list[RouterStats]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; query, key and value projections are one matrix."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.kv_width = shape.kv_heads * shape.head_dim
        self.qkv_proj = nn.Linear(shape.hidden, shape.hidden + 2 * self.kv_width, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.k_norm = RMSNorm(self.kv_width, shape.rms_eps)

    def forward(self, x_BLD: Tensor, turns_L1c: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        q, k, v = self.qkv_proj(x_BLD).split((width, self.kv_width, self.kv_width), dim=-1)
        q_BLHd = rotate(self.q_norm(q).view(batch, length, self.heads, -1), turns_L1c)
        k_BLJd = rotate(self.k_norm(k).view(batch, length, self.kv_heads, -1), turns_L1c)
        v_BLJd = v.view(batch, length, self.kv_heads, -1)
        y_BHLd = nn.functional.scaled_dot_product_attention(
            q_BLHd.transpose(1, 2),
            k_BLJd.transpose(1, 2),
            v_BLJd.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )
        out: Tensor = self.o_proj(y_BHLd.transpose(1, 2).reshape(batch, length, width))
        return out


class MoE(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.top_k, self.norm_topk = shape.top_k, shape.norm_topk
        self.router = nn.Parameter(torch.empty(shape.experts, shape.hidden))
        self.gate_up = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert_hidden, shape.hidden))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_hidden))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, RouterStats]:
        logits_TE = nn.functional.linear(x_TD, self.router)
        probabilities_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probabilities_TE.topk(self.top_k, dim=-1)
        if self.norm_topk:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        y_TD = experts(x_TD, ids_TK, weights_TK, self.gate_up, self.down)
        return y_TD, router_stats(logits_TE, probabilities_TE, ids_TK)


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.attention = Attention(shape)
        self.post_norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.moe = MoE(shape)

    def forward(self, x_BLD: Tensor, turns_L1c: Tensor) -> tuple[Tensor, RouterStats]:
        x_BLD = x_BLD + self.attention(self.input_norm(x_BLD), turns_L1c)
        y_TD, stats = self.moe(self.post_norm(x_BLD).view(-1, x_BLD.shape[-1]))
        return x_BLD + y_TD.view_as(x_BLD), stats


class Decoder(nn.Module):
    """Byte-level language model; weights come from ``generator``, so equal seeds give equal models."""

    def __init__(self, shape: ModelShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCAB, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.rms_eps)
        self.lm_head = nn.Linear(shape.hidden, VOCAB, bias=False)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Matrices that write to the residual stream begin at 0, so every layer begins as the identity."""
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "moe.down")):
                p.zero_()
            elif name == "embedding.weight":
                p.normal_(0, 0.4, generator=generator)
            elif p.dim() > 1:
                scale = 0.5 if name.endswith("moe.router") else 1.0
                p.normal_(0, scale * self.shape.hidden**-0.5, generator=generator)
        self.lm_head.weight.mul_(0.1)

    def forward(self, ids_BL: Tensor) -> Output:
        turns_L1c = rotary_turns(ids_BL.shape[1], self.shape.head_dim, self.shape.rope_theta)
        x_BLD, routers = self.embedding(ids_BL), []
        for layer in self.layers:
            x_BLD, stats = layer(x_BLD, turns_L1c)
            routers.append(stats)
        logits_TV = self.lm_head(self.norm(x_BLD).view(-1, self.shape.hidden))
        return Output(logits_TV, routers)

    def parameter_count(self) -> tuple[int, int]:
        """All parameters, and those that one token uses."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for n, p in self.named_parameters() if n.endswith(("moe.gate_up", "moe.down")))
        return total, total - routed + routed * self.shape.top_k // self.shape.experts
