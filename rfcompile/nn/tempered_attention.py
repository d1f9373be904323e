"""torch's own attention with a temperature: its queries are made within, where no hook reaches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "temperature"
"""Name of the parameter (learnable) or buffer (fixed), shape (1,), of the module it scales."""


class TemperedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that divides its queries by ``temperature``, of shape (1,)."""

    temperature: Tensor

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        is_turned = self.batch_first and query.dim() == 3
        if is_turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        attended, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self._scaled(self.in_proj_weight),
            self._scaled(self.in_proj_bias),
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self._scaled(self.q_proj_weight),
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return attended.transpose(0, 1) if is_turned else attended, weights

    def _scaled(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter with its first rows, those of the queries, divided."""
        if parameter is None:
            return None
        scale = self.temperature.reciprocal().to(parameter.dtype)
        queries, rest = parameter[: self.embed_dim], parameter[self.embed_dim :]
        return torch.cat([queries * scale, rest])
