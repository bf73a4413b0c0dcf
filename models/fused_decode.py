"""
A decoded token of a dense Qwen2 text model in few kernels, for a GPU. A token of the 7B model is too
little work to fill a GPU, so that half of its time would go into starting kernels. Beside transformers'
layers, which compute the same:

    one product for q, k and v         their weights are copied into one matrix for the time of a rollout
    one kernel for each RMSNorm        transformers takes seven
    three for the rotary embedding     of q and k together, where transformers takes ten
    no kernel for a residual sum       it is the start of the product's accumulation, without an adapter
    two products for the adapters of   A of all of them, then B of all of them as one block-diagonal
      q, k, v, and of gate and up      matrix

n rows (one new token each), D width, H heads, K key/value heads, E head width, r rank.
"""

from typing import NamedTuple

import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer

SUPPORTED = (Qwen2_5OmniDecoderLayer, Qwen2DecoderLayer)


class Adapter(NamedTuple):
    """The adapters of linear layers with one input, as two matrices."""

    a: torch.Tensor  # (sum of r, D)
    b: torch.Tensor  # (sum of D_out, sum of r), block-diagonal
    scale: float


def is_supported(policy):
    """Whether all layers are of a kind known here, and have the same adapters: ours, or none."""
    layers = text_model(policy).layers
    if not all(isinstance(layer, SUPPORTED) for layer in layers):
        return False
    linears = [linear for layer in layers for linear in linears_of(layer)]
    adapted = [linear for linear in linears if hasattr(linear, "lora_A")]
    scales = {linear.scaling[linear.switch.adapter] for linear in adapted}
    has_biases = all(layer.self_attn.q_proj.bias is not None for layer in layers)
    return len(adapted) in (0, len(linears)) and len(scales) <= 1 and has_biases


def linears_of(layer):
    attention = layer.self_attn
    mlp = layer.mlp
    in_attention = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*in_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def text_model(policy):
    return policy.thinker.model.language_model


def weight_of(linear):
    """Of a linear layer, or of the one that an adapter of PEFT wraps."""
    return getattr(linear, "base_layer", linear).weight


def bias_of(linear):
    return getattr(linear, "base_layer", linear).bias


def adapter_of(*linears):
    """-> Adapter of linear layers with one input; None without adapters"""
    if not hasattr(linears[0], "lora_A"):
        return None
    name = linears[0].switch.adapter
    dtype = weight_of(linears[0]).dtype
    a = [linear.lora_A[name].weight.to(dtype) for linear in linears]
    b = [linear.lora_B[name].weight.to(dtype) for linear in linears]
    return Adapter(torch.cat(a), torch.block_diag(*b), linears[0].scaling[name])


class FusedLayer:
    """One decoder layer, with copies of its small weights and of those for q, k and v."""

    def __init__(self, layer):
        attention = layer.self_attn
        mlp = layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.index = attention.layer_idx
        self.scaling = attention.scaling
        self.head_dim = attention.head_dim
        self.num_kv = weight_of(attention.k_proj).shape[0] // self.head_dim
        self.attention_norm = layer.input_layernorm
        self.mlp_norm = layer.post_attention_layernorm
        self.qkv_weight = torch.cat([weight_of(linear) for linear in qkv])
        self.qkv_bias = torch.cat([bias_of(linear) for linear in qkv])
        self.o_weight = weight_of(attention.o_proj)
        self.gate_weight = weight_of(mlp.gate_proj)
        self.up_weight = weight_of(mlp.up_proj)
        self.down_weight = weight_of(mlp.down_proj)
        self.activation = mlp.act_fn
        self.qkv_adapter = adapter_of(*qkv)
        self.o_adapter = adapter_of(attention.o_proj)
        self.gate_up_adapter = adapter_of(mlp.gate_proj, mlp.up_proj)
        self.down_adapter = adapter_of(mlp.down_proj)

    def __call__(self, x, cos, signed_sin, attention):
        """x (n, D) -> (n, D)"""
        normed = rms_norm(self.attention_norm, x)
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))  # (n, H + 2 K, E)
        q_and_k = rotate(heads[:, : -self.num_kv], cos, signed_sin)
        q = q_and_k[:, : -self.num_kv]
        k = q_and_k[:, -self.num_kv :]
        v = heads[:, -self.num_kv :]
        # attend takes (n, heads, 1, E)
        out = attention.attend(
            self.index, q[:, :, None], k[:, :, None], v[:, :, None], self.scaling
        )
        x = add_product(x, out.flatten(1), self.o_weight, self.o_adapter)

        normed = rms_norm(self.mlp_norm, x)
        gate, up = self.gate_and_up(normed)
        return add_product(x, self.activation(gate) * up, self.down_weight, self.down_adapter)

    def qkv(self, x):
        """(n, D) -> (n, (H + 2 K) E)"""
        if self.qkv_adapter is None:
            return torch.addmm(self.qkv_bias, x, self.qkv_weight.T)
        small = small_product(x, self.qkv_adapter)
        out = torch.addmm(small, x, self.qkv_weight.T, beta=self.qkv_adapter.scale)
        return out + self.qkv_bias

    def gate_and_up(self, x):
        if self.gate_up_adapter is None:
            return x @ self.gate_weight.T, x @ self.up_weight.T
        small = small_product(x, self.gate_up_adapter)
        scale = self.gate_up_adapter.scale
        gate_small, up_small = small.split(len(self.gate_weight), dim=-1)
        gate = torch.addmm(gate_small, x, self.gate_weight.T, beta=scale)
        up = torch.addmm(up_small, x, self.up_weight.T, beta=scale)
        return gate, up


def small_product(x, adapter):
    """B A x of the adapters, without their scale."""
    return x @ adapter.a.T @ adapter.b.T


def add_product(residual, x, weight, adapter):
    """residual + W x + s B A x"""
    if adapter is None:
        return torch.addmm(residual, x, weight.T)
    # as in adapters.py: W x is accumulated onto the small product, never the other way round
    out = torch.addmm(small_product(x, adapter), x, weight.T, beta=adapter.scale)
    return residual + out


def rms_norm(norm, x):
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)[0]


def rotate(x, cos, signed_sin):
    """
    The rotary embedding: halves (x1, x2) of a head become x cos + (-x2, x1) sin

    x           (n, heads, E)
    cos         (n, 1, E)
    signed_sin  (n, 1, E)   sin with the sign that its half of (-x2, x1) has
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (x2, x1)
    return torch.addcmul(x * cos, swapped, signed_sin)


class FusedDecoder:
    """The text model for one new token of each row; weights must not change while it is used."""

    def __init__(self, policy):
        text = text_model(policy)
        self.layers = [FusedLayer(layer) for layer in text.layers]
        self.norm = text.norm
        self.rotary = text.rotary_emb
        self.has_plain_positions = isinstance(text.layers[0], Qwen2DecoderLayer)

    def __call__(self, embeds, position_ids, attention):
        """
        embeds        (n, 1, D)
        position_ids  (3, n, 1), the same on all axes: what is decoded is text
        attention     DecodeAttention
        returns       hidden states (n, D)
        """
        x = embeds[:, 0]
        if self.has_plain_positions:
            position_ids = position_ids[0]
        cos, sin = self.rotary(embeds, position_ids)  # (n, 1, E)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for layer in self.layers:
            x = layer(x, cos, signed_sin, attention)
        return rms_norm(self.norm, x)
