"""Subclasses of torch's own attention, with a temperature or with polynomial weights.

The forward of ``nn.MultiheadAttention`` is one function, and neither hooks nor modes can change a
part of it. So each variant is a subclass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfcompile.errors import AttentionError, ShapeError
from rfcompile.nn.attention_operators import GAIN, polynomial_attention, polynomial_weights

TEMPERATURE = "temperature"
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


class PolynomialMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with ``s^p`` in place of the softmax, with the same parameters.

    A ``temperature`` that it was given divides the queries. The average of the returned weights
    over heads is that of polynomial weights.
    """

    polynomial: dict[str, Any]

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
        if is_causal and attn_mask is None:
            raise AttentionError("is_causal=True is a hint about attn_mask: give that as well.")
        is_batched = query.dim() == 3
        inputs = [query, key, value]
        if not is_batched:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(inputs)
        )
        if hasattr(self, TEMPERATURE):
            q = q / getattr(self, TEMPERATURE).to(q.dtype)
        mask = self._mask(q, k.shape[-2], attn_mask, key_padding_mask, is_batched)
        dropout = self.dropout if self.training else 0.0
        gain = getattr(self, GAIN, None)
        power, rows, form = (self.polynomial[name] for name in ("power", "scale", "form"))
        weights = None
        if need_weights:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            scores = scores if mask is None else scores + mask
            weights = F.dropout(polynomial_weights(scores, power, rows, gain), dropout)
            attended = weights @ v
        else:
            options = {"power": power, "rows": rows, "gain": gain, "form": form}
            attended = polynomial_attention(q, k, v, mask, dropout, **options)
        y = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.in_proj_weight is not None:
            matrices = list(self.in_proj_weight.chunk(3))
        else:
            matrices = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        return [F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True)]

    def _mask(
        self,
        q: Tensor,
        keys: int,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        is_batched: bool,
    ) -> Tensor | None:
        """Both masks of torch, where True hides, as one that is added to the scores."""
        batch, heads, rows, _ = q.shape
        total = None
        if attn_mask is not None:
            total = _added(
                "attn_mask", attn_mask, q.dtype, (rows, keys), (batch * heads, rows, keys)
            )
            if total.dim() == 3:  # a matrix for each head of each sample
                total = total.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            shape = (batch, keys) if is_batched else (keys,)
            hidden = _added("key_padding_mask", padding, q.dtype, shape)
            hidden = hidden.reshape(-1, 1, 1, keys)
            total = hidden if total is None else total + hidden
        return total


def _added(name: str, mask: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AttentionError(
            f"{name} is {mask.dtype}: give bool, True where a key is hidden, or a floating-point "
            "mask that is added to the scores."
        )
    if mask.shape not in shapes:
        rule = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ShapeError(name, mask.shape, f"give {rule}.")
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def become_polynomial(module: nn.MultiheadAttention, power: int, scale: str, form: str) -> None:
    """Change the module in place, and keep torch from its kernel for whole layers.

    Raises:
        AttentionError: it adds keys of its own (``add_bias_kv``, ``add_zero_attn``).
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise AttentionError(
            "nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be polynomial: leave "
            "both out."
        )
    module.__class__ = PolynomialMultiheadAttention
    module.polynomial = {"power": power, "scale": scale, "form": form}  # type: ignore[assignment]
    module.register_forward_hook(_no_fast_path)


def _no_fast_path(*_: object) -> None:
    """A hook that does nothing: a layer with hooks is computed as it is written."""
