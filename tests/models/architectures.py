"""Tiny configurations of real Mixture-of-Experts architectures, in transformers' own classes.

Hidden size 128, 8 or 16 experts, 2 or 3 layers: everything that the exporters and our ops can tell
apart is there, but small.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

# Equal to no other dimension: the genai builder recognises lm_head by it.
VOCAB = 320


def _common(layers: int) -> dict[str, Any]:
    """Configuration that all text models share."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def gpt_oss(intermediate_size: int = 96) -> PreTrainedModel:
    """gpt-oss: biased experts, clamped SwiGLU, attention sinks, alternating sliding window."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_common(layers=2),
        num_local_experts=8,
        num_experts_per_tok=4,
        intermediate_size=intermediate_size,
        sliding_window=32,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
            "rope_theta": 150000.0,
        },
    )
    # The builder reads it from the top level, where the published checkpoints have it too.
    config.original_max_position_embeddings = 1024
    return GptOssForCausalLM(config)


def qwen35_moe() -> PreTrainedModel:
    """Qwen3.5-MoE: Gated DeltaNet and full attention, softmax router, gated shared expert."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    text = {
        **_common(layers=2),
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    config = Qwen3_5MoeConfig(
        text_config=text,
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
        },
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return Qwen3_5MoeForConditionalGeneration(config)


def lfm2_moe() -> PreTrainedModel:
    """LFM2-MoE: short convolutions and attention, sigmoid router that selects in the graph."""
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    common = _common(layers=3)
    common.pop("head_dim")
    config = Lfm2MoeConfig(
        **common,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_dense_layers=1,
        num_experts=8,
        num_experts_per_tok=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    return Lfm2MoeForCausalLM(config)


def gemma4() -> PreTrainedModel:
    """Gemma 4 MoE: a dense MLP and GeGLU experts side by side, two attention geometries."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = {
        **_common(layers=2),
        # The builder rounds the factor of the embedding, sqrt(hidden_size), to two decimals.
        "hidden_size": 256,
        "tie_word_embeddings": True,
        "intermediate_size": 128,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "max_position_embeddings": 512,
        "final_logit_softcapping": 30.0,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 64,
    }
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    )


def mixtral() -> PreTrainedModel:
    """Mixtral: softmax router over 8 experts, whose factors are normalised."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_common(layers=2),
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    return MixtralForCausalLM(config)


def llama() -> PreTrainedModel:
    """Llama, without experts: what GPTQ and AWQ checkpoints come through the builder with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_common(layers=2), intermediate_size=192, max_position_embeddings=512)
    return LlamaForCausalLM(config)


def qwen3_moe() -> PreTrainedModel:
    """Qwen3-MoE: softmax router over 16 experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_common(layers=2),
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )
    return Qwen3MoeForCausalLM(config)


def glm4_moe() -> PreTrainedModel:
    """GLM4-MoE: sigmoid router, one shared expert."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        **_common(layers=2),
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        use_qk_norm=True,
        max_position_embeddings=512,
    )
    # transformers rotates halves; mobius 0.1.0 would take it for interleaved, as GLM4 is.
    config.rope_interleave = False
    return Glm4MoeForCausalLM(config)


def deepseek_v3() -> PreTrainedModel:
    """DeepSeek-V3: latent attention, sigmoid router over groups of experts, one shared expert."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    common = _common(layers=2)
    common["num_key_value_heads"] = common["num_attention_heads"]
    common.pop("head_dim")
    config = DeepseekV3Config(
        **common,
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=512,
    )
    # As in the published checkpoint; transformers knows no other way, mobius asks.
    config.scoring_func = "sigmoid"
    config.topk_method = "noaux_tc"
    return DeepseekV3ForCausalLM(config)
