"""What may be registered as a collective of another library, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rfcompile as rf
from rfcompile.errors import OptionError
from rfcompile.wire.foreign import registered
from tests import foreign

vllm, sglang = foreign.vllm, foreign.sglang
VALID: dict[str, Any] = {
    "op": vllm.all_gather,
    "kind": "all_gather",
    "group": "group_name",
    "dim": "dim",
    "process_group": foreign.group_of,
}


def test_facts_of_a_registered_operator() -> None:
    foreign.register()
    facts = registered(vllm.reduce_scatter.default)
    assert facts is not None
    assert (facts.kind, facts.reduce, facts.sent, facts.group, facts.dim, facts.mutates) == (
        *("reduce_scatter", "sum", "tensor", "group_name", "dim", None),
    )
    by_position = registered(sglang.outplace_all_reduce.default)
    assert by_position is not None
    assert by_position.group == "group_name"
    in_place = registered(sglang.inplace_all_reduce.default)
    assert in_place is not None
    assert in_place.mutates == "tensor"
    assert registered(torch.ops.aten.add.Tensor) is None


def test_registering_twice_is_the_same_or_an_error() -> None:
    foreign.register()
    foreign.register()
    with pytest.raises(OptionError, match=r"registered already, otherwise .*dim=dim.*: register"):
        rf.register_collective(**VALID | {"dim": 0})
    with pytest.raises(OptionError, match="registered already"):
        rf.register_collective(**VALID | {"process_group": None})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "all_sum"}, r"kind='all_sum' .* 'all_reduce', 'reduce_scatter', 'all_gather'"),
        ({"kind": ["all_reduce"]}, r"kind=\['all_reduce'\] is not supported"),
        ({"op": "like_vllm::all_sum"}, r"op='like_vllm::all_sum' .* import the module"),
        ({"op": "all_gather"}, "import the module that defines it first"),
        ({"op": foreign.all_gather}, "give an operator"),
        ({"op": torch.ops.aten.add}, r"it has the overloads Tensor, .*: name one"),
        ({"op": torch.ops.aten.scalar_tensor.default}, "has an argument of type Tensor"),
        ({"group": "group"}, r"group='group' .* arguments tensor, dim, world_size, group_name"),
        ({"group": 4}, r"group=4 is not supported: like_vllm::all_gather has the arguments"),
        ({"group": True}, "group=True is not supported"),
        ({"dim": "axis"}, r"dim='axis' is not supported: .* name one of them"),
        ({"reduce": "sum"}, "an all_gather reduces nothing"),
        ({"kind": "reduce_scatter", "reduce": "max"}, "reduce='max' .* 'sum' and 'avg' only"),
        ({"kind": "all_reduce", "dim": 1}, "an all_reduce has no dimension"),
        ({"mutates": "tensor"}, "changes no argument in place"),
        (
            {"op": sglang.inplace_all_reduce, "kind": "all_reduce", "dim": 0},
            "changes tensor in place, as its schema says",
        ),
        (
            {"op": sglang.inplace_all_reduce, "dim": 0, "mutates": "tensor"},
            "in place is only an all_reduce",
        ),
        ({"op": torch.ops.aten.topk.default, "group": "k", "dim": 0}, "returns one Tensor"),
        ({"process_group": "tp"}, "process_group='tp' .* give a function"),
    ],
)
def test_what_is_no_collective_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rf.register_collective(**VALID | wrong)
