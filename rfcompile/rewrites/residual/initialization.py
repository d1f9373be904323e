"""Initialization: the orthogonal start of the linears in residual-free blocks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from rfcompile.errors import ResidualError
from rfcompile.find.linears import Linear
from rfcompile.rewrites.attention.anatomy import Anatomy, Attention, Heads
from rfcompile.rewrites.residual.report import Initialized


@dataclass(frozen=True)
class Initialization:
    """The rule of a residual-free start; every random number comes from ``seed``.

    - Query and key of a head, ``W_Q, W_K`` [head, width]: ``W_Q^T W_K`` is the best approximation
      of that rank to ``alpha Z + beta I`` with ``Z_ij ~ N(0, 1/width)``, its singular values shared
      between both. Tokens attend to themselves, and a little at random. With grouped queries the
      first query of a group gets this, the others the best fit to a ``Z`` of their own.
    - Value and output: orthogonal, times ``gain``; independent factors of one Gaussian's singular
      value decomposition are just that.
    - Every other linear of a block ("mlp"): orthogonal, times ``max(sqrt(out / in), 1)``, and
      ``down`` times more where it is narrower than its input.
    - Biases: zero. What scales a linear's output by itself (LayerScale, ReZero): one, because it
      would hold back all that is left of a block.

    Source: arXiv:2510.00345 (Cutting the Skip), as its authors' code has it, alpha 1.8 and beta 1
    as for DINO ViT-S; the scale of the MLP from arXiv:2110.01765 (DKS). Grouped queries, ``down``
    and the gain of 1 (the paper: 3) are ours.
    """

    alpha: float = 1.8
    beta: float = 1.0
    gain: float = 1.0
    down: float = 1.5
    seed: int = 0


def initialize(
    model: nn.Module,
    parts: Anatomy,
    modules: Collection[str],
    rule: Initialization = Initialization(),
) -> tuple[Initialized, ...]:
    """Initialize, in place, the linears that the branches of residual adds are made of.

    Args:
        parts: of the model, from :func:`~rfcompile.rewrites.attention.anatomy.anatomy`.
        modules: paths of the modules whose linears are in a branch; others stay as they are.

    Returns:
        What each parameter got, in order of use.

    Raises:
        ResidualError: a parameter of them is frozen or sharded.
    """
    linears = _in_branches(parts, modules)
    _check_trainable(model, linears.values())
    generator = torch.Generator().manual_seed(rule.seed)
    roles: dict[str, dict[str, None]] = {weight: {} for weight in linears}
    for linear in linears.values():
        for matrix in _matrices(model, linear):
            _start_mlp(matrix, rule, generator)
        if linear.bias:
            model.get_parameter(linear.bias).data.zero_()
        if linear.scale:
            model.get_parameter(linear.scale).data.fill_(1)
    covered = dict.fromkeys(linears, 0)
    for attention in parts.attentions:
        for role, heads in _start_attention(model, attention, linears, rule, generator):
            roles[heads.linear.weight][role] = None
            covered[heads.linear.weight] += sum(map(len, heads.features))
    for weight, linear in linears.items():
        if covered[weight] < _num_features(model, linear, roles[weight]):
            roles[weight]["mlp"] = None
    weights = [Initialized(weight, ", ".join(names)) for weight, names in roles.items()]
    biases = dict.fromkeys(linear.bias for linear in linears.values() if linear.bias)
    scales = dict.fromkeys(linear.scale for linear in linears.values() if linear.scale)
    return (
        *weights,
        *(Initialized(bias, "zero") for bias in biases),
        *(Initialized(scale, "one") for scale in scales),
    )


def _in_branches(parts: Anatomy, modules: Collection[str]) -> dict[str, Linear]:
    """The linears in these modules, and those that give an attention there keys and values."""
    linears = {linear.weight: linear for linear in parts.linears if linear.module in modules}
    linears = {name: linear for name, linear in linears.items() if not linear.is_computed}
    for attention in parts.attentions:
        read = [side for side in (attention.query, attention.output) if side is not None]
        if any(side.linear.weight in linears for side in read):
            given = [side for side in (attention.key, attention.value) if side is not None]
            given = [side for side in given if not side.linear.is_computed]
            linears |= {side.linear.weight: side.linear for side in given}
    return linears


def _check_trainable(model: nn.Module, linears: Iterable[Linear]) -> None:
    names = [n for one in linears for n in (one.weight, one.bias, one.scale) if n]
    for name in names:
        parameter = model.get_parameter(name)
        if not parameter.requires_grad:
            raise ResidualError(
                f"{name} is frozen, and a model without residual connections must be "
                "trained anew: set requires_grad, or use residual='anneal' on a trained model."
            )
        if type(parameter) is not nn.Parameter:
            raise ResidualError(
                f"{name} is a {type(parameter).__name__}: initialize the model first, "
                "then distribute it."
            )


def _matrices(model: nn.Module, linear: Linear) -> list[Tensor]:
    """The weight as matrices [out, in] that share its memory; one for each expert."""
    weight = model.get_parameter(linear.weight).data
    weight = weight.transpose(-1, -2) if linear.is_transposed else weight
    return [weight] if weight.dim() == 2 else list(weight.flatten(0, -3))


def _num_features(model: nn.Module, linear: Linear, roles: Collection[str]) -> int:
    """How many features of a linear its attention may use: inputs of an output linear."""
    return _matrices(model, linear)[0].shape[1 if "output" in roles else 0]


# ---- each part ---------------------------------------------------------------------------------


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with orthonormal rows or columns, whichever are fewer, float32."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()  # else not uniform
    result: Tensor = q if rows >= columns else q.T
    return result


def _start_mlp(matrix: Tensor, rule: Initialization, generator: torch.Generator) -> None:
    out, width = matrix.shape
    scale = max(math.sqrt(out / width), 1.0) * (rule.down if out < width else 1.0)
    matrix.copy_(scale * orthogonal(out, width, generator))


def _start_attention(
    model: nn.Module,
    attention: Attention,
    linears: Mapping[str, Linear],
    rule: Initialization,
    generator: torch.Generator,
) -> Iterator[tuple[str, Heads]]:
    """Start an attention's linears; the roles that it had."""

    def ours(heads: Heads | None) -> TypeGuard[Heads]:
        return heads is not None and heads.linear.weight in linears

    query, key, value, output = (
        attention.query,
        attention.key,
        attention.value,
        attention.output,
    )
    # Heads of another size have parts from elsewhere, such as a rotary key that all heads share.
    if ours(query) and ours(key) and {*_sizes(query)} == {*_sizes(key)}:
        _start_scores(_rows(model, query), _rows(model, key), query, key, rule, generator)
        yield from (("query", query), ("key", key))
    if ours(value):
        rows = _rows(model, value)
        total = sum(map(len, value.features))
        matrix = rule.gain * orthogonal(total, rows.shape[1], generator)
        for features, part in zip(value.features, matrix.split(_sizes(value)), strict=True):
            rows[list(features)] = part.to(rows)
        yield "value", value
    if ours(output):
        columns = _rows(model, output).T  # [in, out]
        total = sum(map(len, output.features))
        matrix = rule.gain * orthogonal(total, columns.shape[1], generator)
        for features, part in zip(output.features, matrix.split(_sizes(output)), strict=True):
            columns[list(features)] = part.to(columns)
        yield "output", output


def _rows(model: nn.Module, heads: Heads) -> Tensor:
    return _matrices(model, heads.linear)[0]


def _sizes(heads: Heads) -> list[int]:
    return [len(features) for features in heads.features]


def _start_scores(
    queries: Tensor,
    keys: Tensor,
    query: Heads,
    key: Heads,
    rule: Initialization,
    generator: torch.Generator,
) -> None:
    """The rows of each head's query and key, so that their product is ``alpha Z + beta I``."""
    from_width, to_width = queries.shape[1], keys.shape[1]
    group = max(1, len(query.features) // len(key.features))

    def target() -> Tensor:
        noise = torch.randn(from_width, to_width, generator=generator) / math.sqrt(to_width)
        return rule.alpha * noise + rule.beta * torch.eye(from_width, to_width)

    for number, features in enumerate(key.features):
        size = len(features)
        first = target()
        u, s, vh = torch.linalg.svd(first, full_matrices=False)
        left, right = u[:, :size] * s[:size].sqrt(), vh[:size] * s[:size, None].sqrt()
        keys[list(features)] = right.to(keys)
        inverse = vh[:size].T / s[:size].sqrt()  # of the key: right @ inverse = I
        for nth, rows in enumerate(query.features[number * group : (number + 1) * group]):
            best = left if nth == 0 else target() @ inverse
            queries[list(rows)] = best.T.to(queries)
