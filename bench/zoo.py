"""Configurations of tiny random models, one for each architecture of the table in docs/guides/models.md.

Windows, chunks and original contexts are shorter than the rows that bench/architectures.py tries.
"""

from __future__ import annotations

from typing import Any

V, W, WINDOW = 264, 32, 16
IDS: dict[str, Any] = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NB: dict[str, Any] = {**IDS, "hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE: dict[str, Any] = {**NB, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512}
FOUR = {**BASE, "num_hidden_layers": 4}
GPT: dict[str, Any] = {**IDS, "n_embd": W, "n_layer": 2, "n_head": 4, "n_positions": 512}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
SSM: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
SSM2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 48,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", {**FOUR, **MOE, "head_dim": 8, "sliding_window": WINDOW, "num_dense_layers": 1}),
    "apertus": ("ApertusConfig", BASE),
    "arcee": ("ArceeConfig", BASE),
    "bamba": ("BambaConfig", {**FOUR, **SSM2, "attn_layer_indices": [1, 3]}),
    "bloom": ("BloomConfig", {**IDS, "hidden_size": W, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGenConfig", {**GPT, "rotary_dim": 4}),
    "cohere": ("CohereConfig", {**BASE, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**FOUR, "sliding_window": WINDOW, "layer_types": SLIDING * 2}),
    "deepseek v2": ("DeepseekV2Config", {**BASE, **MLA, **ROUTED, "n_group": 1, "topk_group": 1}),
    "deepseek v3": ("DeepseekV3Config", {**BASE, **MLA, **ROUTED, "n_group": 2, "topk_group": 1}),
    "diffllama": ("DiffLlamaConfig", BASE),
    "doge": ("DogeConfig", BASE),
    "dots1": ("Dots1Config", {**BASE, **ROUTED, "n_group": 1, "topk_group": 1, "layer_types": ["full_attention"] * 2}),
    "ernie 4.5": ("Ernie4_5Config", BASE),
    "ernie 4.5 moe": ("Ernie4_5_MoeConfig", {
        **BASE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1}),
    "exaone 4": ("Exaone4Config", {**FOUR, "sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "falcon": ("FalconConfig", {**NB, "alibi": False, "multi_query": True, "new_decoder_architecture": False}),
    "falcon (alibi)": ("FalconConfig", {**NB, "alibi": True, "new_decoder_architecture": False}),
    "falcon-h1": ("FalconH1Config", {**BASE, **SSM2, "mamba_d_ssm": 64, "head_dim": 8, "lm_head_multiplier": 0.5}),
    "falcon-mamba": ("FalconMambaConfig", {**IDS, "hidden_size": W, "num_hidden_layers": 2, "state_size": 8}),
    "flex-olmo": ("FlexOlmoConfig", {**BASE, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma": ("GemmaConfig", {**BASE, "head_dim": 8}),
    "gemma 2": ("Gemma2Config", {**BASE, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "gemma 3": ("Gemma3TextConfig", {
        **FOUR, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": SLIDING * 2}),
    "gemma 3n": ("Gemma3nTextConfig", {
        **FOUR, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING * 2, "vocab_size_per_layer_input": V,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4}),
    "gemma 4": ("Gemma4TextConfig", {
        **FOUR, "head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW, "layer_types": SLIDING * 2,
        "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}),
    "glm": ("GlmConfig", {**BASE, "head_dim": 8}),
    "glm 4": ("Glm4Config", {**BASE, "head_dim": 8}),
    "glm 4 moe": ("Glm4MoeConfig", {**BASE, **ROUTED, "head_dim": 8, "n_group": 1, "topk_group": 1}),
    "gpt-2": ("GPT2Config", GPT),
    "gpt-bigcode": ("GPTBigCodeConfig", GPT),
    "gpt-j": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "gpt-neo": ("GPTNeoConfig", {
        **IDS, "hidden_size": W, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW, "max_position_embeddings": 512}),
    "gpt-neox": ("GPTNeoXConfig", {**NB, "intermediate_size": 48, "max_position_embeddings": 512}),
    "gpt-oss": ("GptOssConfig", {
        **BASE, **LOCAL, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "granite": ("GraniteConfig", {
        **BASE, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2}),
    "granite moe": ("GraniteMoeConfig", {**BASE, **LOCAL, "logits_scaling": 4.0}),
    "granite moe hybrid": ("GraniteMoeHybridConfig", {
        **FOUR, **LOCAL, **SSM2, "shared_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"] * 2}),
    "helium": ("HeliumConfig", {**BASE, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1Config", {**BASE, "head_dim": 8}),
    "jamba": ("JambaConfig", {
        **FOUR, **SSM, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False}),
    "lfm2": ("Lfm2Config", {**FOUR, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "llama": ("LlamaConfig", BASE),
    "llama (dynamic ntk)": ("LlamaConfig", {
        **BASE, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama 4": ("Llama4TextConfig", {
        **FOUR, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": WINDOW}),
    "mamba": ("MambaConfig", {**IDS, "hidden_size": W, "num_hidden_layers": 2, "state_size": 8}),
    "mamba 2": ("Mamba2Config", {
        **IDS, "hidden_size": W, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1,
        "chunk_size": 8}),
    "minicpm 3": ("MiniCPM3Config", {**BASE, **MLA}),
    "minimax": ("MiniMaxConfig", {
        **FOUR, **LOCAL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 8}),
    "ministral": ("MinistralConfig", {**BASE, "head_dim": 8, "sliding_window": WINDOW, "layer_types": SLIDING}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": None}),
    "mistral (window)": ("MistralConfig", {**BASE, "sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {**BASE, **LOCAL, "sliding_window": None}),
    "mpt": ("MptConfig", {**IDS, "d_model": W, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}),
    "nanochat": ("NanoChatConfig", BASE),
    "nemotron": ("NemotronConfig", BASE),
    "olmo": ("OlmoConfig", BASE),
    "olmo 2": ("Olmo2Config", BASE),
    "olmo 3": ("Olmo3Config", {**FOUR, "sliding_window": WINDOW, "layer_types": SLIDING * 2}),
    "olmoe": ("OlmoeConfig", {**BASE, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {
        **NB, "ffn_dim": 48, "word_embed_proj_dim": W, "max_position_embeddings": 512, "layerdrop": 0.1}),
    "persimmon": ("PersimmonConfig", {**NB, "intermediate_size": 48, "max_position_embeddings": 512}),
    "phi": ("PhiConfig", {**BASE, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "phi 3": ("Phi3Config", {**BASE, "sliding_window": None}),
    "phi 3 (longrope)": ("Phi3Config", {
        **BASE, "sliding_window": None, "original_max_position_embeddings": 48, "rope_parameters": LONGROPE}),
    "phi-moe": ("PhimoeConfig", {**BASE, **LOCAL, "sliding_window": WINDOW, "router_jitter_noise": 0.1}),
    "qwen 2": ("Qwen2Config", BASE),
    "qwen 2 (window)": ("Qwen2Config", {
        **BASE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen 2 moe": ("Qwen2MoeConfig", {**BASE, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen 2 moe (window)": ("Qwen2MoeConfig", {
        **BASE, **MOE, "shared_expert_intermediate_size": 24, "use_sliding_window": True, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 2}),
    "qwen 3": ("Qwen3Config", {**BASE, "head_dim": 8}),
    "qwen 3 moe": ("Qwen3MoeConfig", {**BASE, **MOE, "head_dim": 8}),
    "qwen 3 next": ("Qwen3NextConfig", {**FOUR, **LINEAR, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen 3.5": ("Qwen3_5TextConfig", {**FOUR, **LINEAR}),
    "qwen 3.5 moe": ("Qwen3_5MoeTextConfig", {**FOUR, **LINEAR, **MOE, "shared_expert_intermediate_size": 24}),
    "recurrent gemma": ("RecurrentGemmaConfig", {
        **BASE, "num_hidden_layers": 3, "head_dim": 8, "lru_width": W, "attention_window_size": WINDOW}),
    "seed-oss": ("SeedOssConfig", {**BASE, "head_dim": 8}),
    "smollm 3": ("SmolLM3Config", BASE),
    "stablelm": ("StableLmConfig", BASE),
    "starcoder 2": ("Starcoder2Config", {**BASE, "residual_dropout": 0.1, "attention_dropout": 0.1}),
    "vaultgemma": ("VaultGemmaConfig", {
        **BASE, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": SLIDING}),
    "xglm": ("XGLMConfig", {
        **IDS, "d_model": W, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 512}),
    "zamba 2": ("Zamba2Config", {
        **BASE, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8,
        "num_mem_blocks": 1, "use_shared_attention_adapter": False, "num_key_value_heads": 4}),
}  # fmt: skip
"""Name → (configuration class of transformers, its arguments)."""

DOZEN = (
    "deepseek v3", "falcon", "gemma 2", "gemma 3", "gpt-2", "gpt-oss", "granite", "llama 4", "opt", "phi",
    "phi 3 (longrope)", "phi-moe", "qwen 3.5",
)  # fmt: skip
"""Architectures that tests/test_architectures.py tries: one for each thing that packed attention cannot express."""
