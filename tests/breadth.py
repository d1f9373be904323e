"""``make test-zoo``: rewrites small models of many architectures, one JSON line each.

A line says how many residual adds an oracle saw (``oracle.py``), whether ``rf.find_residuals``
finds them on the same lines of source, how many were rewritten, whether the model with gains of 1
computes the same bits, and what else happened. Stopped, it goes on where it was: lines of the same
sources are not made again. Names after the path: only these, in this order. Several processes may
share a file: each leaves out what another has written. The exit code is 1 if fewer than 97 % of the
models that can be captured and have skips are rewritten exactly.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rfcompile as rf
from rfcompile.codec.fingerprint import source_digest
from rfcompile.errors import CaptureError
from rfcompile.rewrites.residual.report import residual_report
from tests.breadth_models import NAMES, inputs_of, model_of
from tests.oracle import differences, residual_adds
from tests.zoo import BERT, GROUPED, VIT, ZOO, Entry, pictures, pretrained, texts, tokens

SHARE = 0.97

TEXT = {key: value for key, value in GROUPED.items() if key != "use_cache"}
IMAGE = GROUPED["vocab_size"] - 1  # the token that stands for a part of a picture
SIGLIP = {"model_type": "siglip_vision_model", **VIT}


def with_pictures(parts: int) -> Callable[[], dict[str, Tensor]]:
    """A text that starts with a picture."""

    def make() -> dict[str, Tensor]:
        image = torch.full((2, parts), IMAGE)
        ids = torch.cat([image, tokens()["input_ids"].clamp(3, IMAGE - 3)], 1)
        return pictures() | {"input_ids": ids}

    return make


def model(
    name: str, config: Mapping[str, Any], inputs: Callable[[], dict[str, Tensor]], kind: str
) -> Entry:
    return Entry(pretrained(name, config, kind), inputs)


GENERATES = "ForConditionalGeneration"
MORE: dict[str, Entry] = {
    "nanochat": model("NanoChat", TEXT, tokens, "ForCausalLM"),
    "gemma3-text": Entry(pretrained("Gemma3Text", TEXT, "Model"), tokens),
    "beit": model("Beit", VIT, pictures, "Model"),
    "data2vec-vision": model("Data2VecVision", VIT, pictures, "Model"),
    "squeezebert": model("SqueezeBert", BERT | {"embedding_size": 32}, tokens, "Model"),
    "t5gemma": model("T5Gemma", {"encoder": TEXT, "decoder": TEXT}, texts, GENERATES),
    "llava": model(
        "Llava",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VIT},
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_index": IMAGE,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        with_pictures(16),
        GENERATES,
    ),
    "idefics3": model(
        "Idefics3",
        {
            "vision_config": VIT,
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        lambda: {k: v[:, None] if v.dim() == 4 else v for k, v in with_pictures(4)().items()},
        GENERATES,
    ),
}


def called(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the model returns, with the same random numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**inputs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


Inputs = Callable[[nn.Module], dict[str, Tensor]]


def models() -> dict[str, tuple[Callable[[], nn.Module], Inputs]]:
    """By name: how to build a model, and its inputs."""
    by_hand = {
        name: (entry.build, lambda _, entry=entry: entry.inputs())
        for name, entry in {**ZOO, **MORE}.items()
    }
    return by_hand | {name: (partial(model_of, name), inputs_of) for name in NAMES}


def row(name: str, build: Callable[[], nn.Module], inputs_for: Inputs) -> dict[str, Any]:
    """What became of a model."""
    torch.manual_seed(0)
    built = build().eval()
    inputs = inputs_for(built)
    facts: dict[str, Any] = {"name": name, "sources": source_digest()}
    expected = called(built, inputs)
    seen = residual_adds(built, inputs)
    facts["seen"] = len(seen)
    try:
        found = rf.find_residuals(built, example_inputs=((), inputs))
        copied = [add.source for add in found if add.kind != "projection"]
        missed, more = differences(seen, copied)
        facts |= {"found": len(found), "as seen": not (missed or more)}
        facts |= {key: lines for key, lines in (("missed", missed), ("more", more)) if lines}
        new = rf.transform(built, residual="anneal", example_inputs=((), inputs)).eval()
    except Exception as error:  # one that is not of this package is a bug: the line says so
        return facts | {"error": type(error).__name__, "message": str(error)[:300]}
    report = residual_report(new)
    got = called(new, inputs)
    same = all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return facts | {"rewritten": len(report.sites), "left": len(report.left), "exact": same}


def done_in(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of these sources in a file, by name."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["name"]: r for r in rows if r["sources"] == source_digest()}


def main(path: Path, names: Sequence[str]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    every = models()
    for name in names or every:
        if name not in done_in(path):
            line = json.dumps(row(name, *every[name]))
            with path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    done = {name: r for name, r in done_in(path).items() if name in (names or every)}
    captured = [r for r in done.values() if r.get("error") != CaptureError.__name__]
    agree = sum(bool(r.get("as seen")) for r in captured)
    skipping = [r for r in captured if r["seen"] or r.get("found")]
    exact = sum(bool(r.get("exact")) for r in skipping)
    print(f"{len(done)} models, {len(captured)} captured; of these:")
    print(f"  residual adds on the lines that the oracle saw: {agree} of {len(captured)}")
    print(f"  rewritten exactly at gain 1: {exact} of {len(skipping)} that have skips")
    return int(exact < SHARE * len(skipping))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
