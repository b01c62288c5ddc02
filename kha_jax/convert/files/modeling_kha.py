"""Llama with knocking heads: a shared map of every head behind a projection (arXiv 2510.23052).

Needs transformers and torch, and nothing else. Everything but the projections is the stock model's:
attention, cache, kernels, generation.
"""

import torch
from torch import nn
from transformers import LlamaConfig as StockConfig
from transformers import LlamaForCausalLM as StockForCausalLM


class KhaConfig(StockConfig):
    """kha_mixers: of the streams q, k and v those with a map, and its kind, mlp or gate."""

    model_type = "kha_llama"


try:  # version 5 reads experts that are tensors of their own by a mapping, version 4 as they are
    from transformers import conversion_mapping
except ImportError:
    conversion_mapping = None
if conversion_mapping is not None:
    stock = conversion_mapping.get_checkpoint_conversion_mapping(StockConfig.model_type)
    if stock:
        register = conversion_mapping.register_checkpoint_conversion_mapping
        register(KhaConfig.model_type, stock, overwrite=True)


class Knocking(nn.Linear):
    """A projection, whose heads z [H] then pass one map: mlp 2 ((z W_up) * sigmoid(z W_gate))
    W_down, gate z * 2 sigmoid(z W_gate)."""

    def __init__(self, stock, kind, head_dim):
        like = {"device": stock.weight.device, "dtype": stock.weight.dtype}
        bias = stock.bias is not None
        super().__init__(stock.in_features, stock.out_features, bias=bias, **like)
        self.kind, self.head_dim = kind, head_dim
        for name in ("gate", "up", "down") if kind == "mlp" else ("gate",):
            start = torch.zeros if name == "gate" else torch.ones
            values = torch.diag(start(head_dim, **like)).contiguous()
            self.register_parameter(f"knocking_{name}", nn.Parameter(values))

    def forward(self, x):
        flat = super().forward(x)
        z = flat.unflatten(-1, (-1, self.head_dim))
        gate = 2 * torch.sigmoid(z @ self.knocking_gate)
        if self.kind == "gate":
            return (z * gate).reshape(flat.shape)
        return (z @ self.knocking_up * gate @ self.knocking_down).reshape(flat.shape)


class KhaForCausalLM(StockForCausalLM):
    """The stock model with `Knocking` projections where the config says so."""

    config_class = KhaConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            for slot, kind in config.kha_mixers.items():
                stock = getattr(attention, f"{slot}_proj")
                setattr(attention, f"{slot}_proj", Knocking(stock, kind, attention.head_dim))
        self.post_init()
