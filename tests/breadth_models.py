"""Small models of the architectures of transformers, made from their own configs by one rule.

``SIZES`` has a small value for each field that says how large a model is. A config of an
architecture gets those of them that it has, and so do the configs inside it. Nothing is downloaded,
and weights are random.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import HEADS, LAYERS, VOCABULARY, WIDTH

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "hidden_dim"),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim"),
            *("decoder_ffn_dim", "ffn_hidden_size", "ff_expansion", "d_inner"),
        ),
        48,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
            *("decoder_layers", "num_decoder_layers", "num_encoder_layers"),
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "num_key_value_heads", "num_kv_heads"),
        ),
        HEADS,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("pad_token_id", "mask_token_id"), 0),
    "eos_token_id": 2,
    "use_cache": False,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
    "state_size": 4,
    "sliding_window": 8,
}


def small(kind: Any) -> Any:
    """A config of a class with the sizes that it has a field for."""
    import transformers

    usual = kind()
    fields = usual.to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    inner = {
        name: small(type(getattr(usual, name)) if sub is transformers.AutoConfig else sub).to_dict()
        for name, sub in kind.sub_configs.items()
        if isinstance(getattr(usual, name, None), transformers.PretrainedConfig)
    }
    return kind(**sizes, **inner)


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A short text, or a picture."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width)}
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 12))}
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 6))
    return inputs


def model_of(name: str) -> nn.Module:
    """The language model of an architecture, or where there is none its plain model."""
    from transformers.models.auto import configuration_auto, modeling_auto

    config = small(configuration_auto.CONFIG_MAPPING[name])
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_MAPPING,
    )
    kind: Any = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
    model: nn.Module = (kind[0] if isinstance(kind, tuple) else kind)(config)
    return model


_RUNNING = """
afmoe aimv2_vision_model albert apertus arcee aria aria_text audioflamingo3 axk1 axk2 aya_vision
bart beam bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
camembert canine chinese_clip_vision_model clip_text_model clip_vision_model codegen cohere
cohere2 cohere2_moe convbert cosmos3_omni cpmant ctrl cwm data2vec-text deberta deberta-v2
deepseek_v2 deepseek_v32 deepseek_v4 deepseek_vl deit diffllama dinov2 dinov2_with_registers
dinov3_vit distilbert doge dots3_note_text dpr dpt electra embedding_gemma2
embedding_gemma2_text ernie ernie4_5 ernie4_5_moe esm esmc eurobert exaone4 exaone4_5 exaone_moe
falcon_mamba flava flex_olmo flint fnet funnel fuyu gemma2 gemma3 gemma4_unified_text git glm
glm4 glm4_moe glm4_moe_lite glm_moe_dsa glmasr got_ocr2 gpt-sw3 gpt_bigcode gpt_neox_japanese
gpt_oss gptj granite granite_docling_text granite_speech granite_speech_plus granite_swa
granitemoe granitemoe_swa granitemoeshared gte helium higgs_audio_v2 hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hy_v4 hyperclovax hyperclovax_vision_v2 ibert idefics2 idefics3 ijepa
imagegpt inkling2_text inkling_mm_model inkling_text internlm3 internvl internvl_vision
iquestcoder jais2 jamba jetmoe jina_embeddings_v3 kimi_k25 kolibri1 kosmos-2.5 laguna layoutlm
led lfm2 lfm2_vl lfm3 lfm3_vl lighton_ocr llama4_text llava llava_next llava_next_video
llava_onevision longformer longt5 m2m_100 marian markuplm mbart megatron-bert mellum minicpm3
minicpm_ocr minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text
ministral ministral3 mistral3 mistral_large4 mistral_large4_text mlcd mlcd_vision_model mllama
mobilebert mobilenet_v2 modernbert-decoder modernvbert molmo2_text moshi moss_transcribe_diarize
mpnet mpt mra mt5 muse_glimmer_text muse_spark_text musicflamingo mvp nemotron nemotron_h
nllb-moe nomic_bert nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt
openai_privacy_filter opt ovis2 paligemma pegasus pegasus_x persimmon phi3 phimoe pixio pixtral
plbart prophetnet qianfan_ocr qianfan_ocr_vision qwen2 qwen2_audio qwen2_moe qwen3_5_moe_text
qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text
qwen4_exp_text radio recurrent_gemma rembert roberta roberta-prelayernorm roformer rwkv
sam3_vision_model sam3_vit_model sam_hq_vision_model sam_vision_model sapiens2 seamless_m4t
seamless_m4t_v2 seed_oss siglip_vision_model smollm3 smolvlm solar_open splinter stablelm
starcoder2 step3p7 switch_transformers t5gemma t5gemma2 tapas tipsv2 tipsv2_text_model
tipsv2_vision_model ultrabert ultravbert umt5 vaultgemma video_llama_3 video_llava vipllava
visual_bert vit_mae vit_msn vitdet voxtral xglm xlm-roberta xlm-roberta-xl xlnet xlstm yoso
youtu
"""
NAMES = tuple(_RUNNING.split())
"""The architectures of transformers 5.23 that the rule above makes, and that run."""
