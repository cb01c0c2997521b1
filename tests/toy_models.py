"""Toy models of any architecture of transformers, made from its own config with every size shrunk."""

import re

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

HIDDEN, HEADS, HEAD, LAYERS, VOCABULARY = 32, 4, 8, 4, 64

# field name -> the most that it may be; the first pattern that fits counts
SIZES = {
    r".*vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab": VOCABULARY,
    r"(num_)?(hidden_|encoder_|decoder_|n_)?layers?|(en|de)coder_layers|conf_num_hidden_layers|depth": LAYERS,
    r"hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_(size|dim)|word_embed_proj_dim|dim": HIDDEN,
    r"(backbone_|attention_|out_)hidden_size|lru_width|(projector_in|projector_out)put_dim|adapter_(in|out).*": HIDDEN,
    r".*key_value_heads|kv_n_heads|num_kv_heads|num_query_groups": 2,
    r".*attention_heads|num_.*heads|n_heads?|n_mamba_heads|mamba_n_heads": HEADS,
    r".*(head_dim|_head_size|d_head|dim_head|d_kv|kv_channels|mamba_headdim|rotary_dim)": HEAD,
    r".*(intermediate_size.*|ffn_dim|n_inner|ffn_hidden_size|d_ff|dff|dim_ff|d_inner|mlp_dim|feed_forward_size)": 48,
    r".*(num_experts|n_routed_experts|num_local_experts|zero_expert_num)": 4,
    r".*(experts_per_tok(en)?|moe_k|moe_top_?k|cross_attn_k)": 2,
    r".*(lora_rank|qk_nope.*|state_size|_d_state|mamba_d_ssm|laurel_rank|adapter_rank|dt_rank|step_rank|lowrank)": 8,
    r"hidden_size_per_layer_input": 8,
    r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r".*(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_(source|target)_positions)": 64,
    r"image_size|crop_size": 32,
    r"ngram_vocab_size_base": 50,
    r"make_ngram.*|split_ngram.*|heads_per_ngram": 2,
    r"num_kv_shared_layers|num_nextn_predict_layers": 0,
    r".*_token_(id|index)": 3,
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")

_ATTENTIONS = ["sliding_attention", "full_attention"]
_INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16, indexer_compress_ratio=4)
_MATCHING_HEADS = dict(num_key_value_heads=4, swa_num_key_value_heads=4, head_dim=16, swa_head_dim=16)
# fields that belong together, or that the config leaves open
FIELDS = {
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8),
    "cohere_compass_text": dict(
        num_hidden_layers=4,
        layer_types=_ATTENTIONS * 2,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _ATTENTIONS},
    ),
    "dbrx": dict(attn_config=dict(rope_theta=1e4)),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1),
    "dots3_note": dict(text_config=_MATCHING_HEADS),
    "dots3_note_text": _MATCHING_HEADS,
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
    "gemma3n_text": dict(intermediate_size=48),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=4),
    "phi4_multimodal": dict(audio_config=dict(nemo_conv_channels=16, ext_pw_out_channel=16)),
    "qwen4_exp": dict(text_config=_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=[16, 16], axial_pos_shape=[8, 8]),
    "segformer": dict(hidden_sizes=[8, 8, 16, 16]),
    "swin": dict(embed_dim=8, depths=[1, 1], num_heads=[2, 2]),
    "zamba": dict(num_hidden_layers=6, layers_block_type=["mamba", "mamba", "hybrid"] * 2),
}


def shrunk(values):
    """The fields of a config that are sizes, made small."""
    small = {}
    layers = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    for name, value in values.items():
        if isinstance(value, dict) and (name.endswith("_config") or name in ("encoder", "decoder")):
            small[name] = shrunk(value)
            if value.get("model_type"):
                small[name]["model_type"] = value["model_type"]
        elif isinstance(value, list | tuple) and len(value) == layers and len(value) > LAYERS:
            small[name] = list(value)[:LAYERS]
        elif isinstance(value, int) and not isinstance(value, bool):
            limit = next((limit for pattern, limit in SIZES.items() if re.fullmatch(pattern, name)), None)
            if limit is not None and value > limit:
                small[name] = limit
    return small


def toy_config(model_type):
    """A config of a model type whose model is tiny."""
    fields = FIELDS.get(model_type, {})
    try:
        values = CONFIG_MAPPING[model_type]().to_dict()
    # a config whose defaults do not go together
    except Exception:
        values = CONFIG_MAPPING[model_type](**fields).to_dict()
    small = shrunk(values)
    for name, value in fields.items():
        small[name] = {**small.get(name, {}), **value} if isinstance(value, dict) else value
    return CONFIG_MAPPING[model_type](**small)


@torch.no_grad()
def toy_model(model_type, seed=0, auto_class=AutoModelForCausalLM) -> PreTrainedModel:
    """A toy model; nothing in its state dict is as a model is made, so that what is lost on the way shows."""
    torch.manual_seed(seed)
    model = auto_class.from_config(toy_config(model_type)).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return model


def size(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


class OwnProducts(LlamaForCausalLM):
    """A causal model with a layer of one's own, whose weight it uses as it likes."""

    def __init__(self, use):
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        super().__init__(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
        for layer in self.model.layers:
            layer.mlp.mix = nn.Linear(16, 16)
            layer.mlp.register_forward_hook(use)
