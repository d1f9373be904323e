"""Small models with random weights and the residual adds each one has, counted by reading them.

Those of transformers are built from its configs, without a download; import it with
``pytest.importorskip`` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 4, 64
Kinds = Mapping[str, int]


@dataclass(frozen=True)
class Entry:
    """A model, its inputs, and its residual adds by kind."""

    build: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    kinds: Kinds = field(default_factory=lambda: {"block": 2 * LAYERS})


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 12))}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


# ---- written here ------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm_2, self.mlp = nn.LayerNorm(width), MLP(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class NanoGPT(nn.Module):
    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Bottleneck(nn.Module):
    """A ResNet block; the first of a stage projects its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        plan = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*(Bottleneck(*row) for row in plan))
        self.head = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.mlp(y)).permute(0, 3, 1, 2)
        if self.training:
            keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.9)
            y = y * keep.div_(0.9)
        return x + y


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, 16, 4, 4)]
        stages += [ConvNeXtBlock(16), ConvNeXtBlock(16), nn.Conv2d(16, 32, 2, 2)]
        self.stages = nn.Sequential(*stages, ConvNeXtBlock(32), ConvNeXtBlock(32))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.stages(pixel_values)


# ---- transformers ------------------------------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}
GROUPED = DECODER | {"num_key_value_heads": 2, "head_dim": 8}


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def pretrained(
    name: str, config: Mapping[str, Any], kind: str = "Model"
) -> Callable[..., nn.Module]:
    """``<name><kind>`` with random weights, and so many layers where a number is given."""

    def build(layers: int | None = None) -> nn.Module:
        import transformers

        depths = {key: layers for key in DEPTHS if key in config} if layers else {}
        made = getattr(transformers, f"{name}Config")(**{**config, **depths})
        model: nn.Module = getattr(transformers, f"{name}{kind}")(made)
        return model

    return build


def decoder(name: str, **config: Any) -> Entry:
    return Entry(pretrained(name, GROUPED | config, "ForCausalLM"), tokens)


def speech() -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(1, 8, 32),
        "decoder_input_ids": torch.randint(0, VOCABULARY, (1, 6)),
    }


def texts() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": torch.randint(0, VOCABULARY, (2, 6))}


PARALLEL = {"block": LAYERS}  # attention and MLP side by side: one add a layer
ENCODER_DECODER = {"block": 5 * LAYERS}  # the decoder has a third one, for cross-attention
BERT = {key: DECODER[key] for key in list(DECODER)[:6]}
VIT = {key: BERT[key] for key in list(BERT)[1:5]} | {"image_size": 32, "patch_size": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}

ZOO: dict[str, Entry] = {
    "nanogpt": Entry(NanoGPT, tokens),
    "resnet": Entry(ResNet, pictures, {"block": 4, "projection": 2}),
    "convnext": Entry(ConvNeXt, pictures),
}
TRANSFORMERS: dict[str, Entry] = {
    "gpt2": Entry(pretrained("GPT2", GPT2 | {"use_cache": False}, "LMHeadModel"), tokens),
    "llama": decoder("Llama"),
    "qwen3": decoder("Qwen3"),
    "mistral": decoder("Mistral", sliding_window=8),
    "gemma": decoder("Gemma"),
    "phi": Entry(pretrained("Phi", DECODER, "ForCausalLM"), tokens, PARALLEL),
    "gpt-neox": Entry(pretrained("GPTNeoX", DECODER, "ForCausalLM"), tokens, PARALLEL),
    "bert": Entry(pretrained("Bert", BERT), tokens),
    "modernbert": Entry(pretrained("ModernBert", DECODER), tokens),
    "vit": Entry(pretrained("ViT", VIT), pictures),
    "swin": Entry(
        pretrained(
            "Swin",
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        pictures,
        {"block": 8},
    ),
    "t5": Entry(
        pretrained(
            "T5",
            {
                "vocab_size": VOCABULARY,
                "d_model": WIDTH,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "decoder_start_token_id": 0,
                "use_cache": False,
            },
        ),
        texts,
        ENCODER_DECODER,
    ),
    "whisper": Entry(
        pretrained(
            "Whisper",
            {
                "vocab_size": VOCABULARY,
                "num_mel_bins": 8,
                "d_model": WIDTH,
                "encoder_layers": LAYERS,
                "decoder_layers": LAYERS,
                "encoder_attention_heads": HEADS,
                "decoder_attention_heads": HEADS,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_source_positions": 16,
                "max_target_positions": 16,
                "use_cache": False,
                "pad_token_id": 0,
                "decoder_start_token_id": 1,
            },
        ),
        speech,
        ENCODER_DECODER,
    ),
    "mixtral": decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "deepseek-v3": Entry(
        pretrained(
            "DeepseekV3",
            DECODER
            | {
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
            "ForCausalLM",
        ),
        tokens,
    ),
    "mamba": Entry(
        pretrained(
            "Mamba",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": WIDTH,
                "state_size": 4,
                "num_hidden_layers": LAYERS,
                "use_cache": False,
            },
        ),
        tokens,
        {"block": LAYERS, "local": LAYERS},  # the D term skips the scan
    ),
    "falcon": Entry(
        pretrained("Falcon", {**BERT, "use_cache": False}, "ForCausalLM"), tokens, PARALLEL
    ),
    "bloom": Entry(pretrained("Bloom", BLOOM | {"use_cache": False}, "ForCausalLM"), tokens),
}
ZOO |= TRANSFORMERS
