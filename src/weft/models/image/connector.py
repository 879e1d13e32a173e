"""UniPic2-MetaQuery's conditioner: learned queries, and the connector that turns their VLM states into SD3's text.

Keys and configuration are those of SkyworkAI/UniPic, UniPic-2/unipicv2/stable_diffusion_3_conditioner.py and
modeling_connector.py, so released folders load and what is saved here loads there. The attention implementation that
a released configuration names (`flash_attention_2`) is not needed: attention here is torch's, which picks its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.rng import generator

IGNORED = ("_attn_implementation", "attn_implementation", "model_type", "transformers_version", "torch_dtype", "dtype")
"""Keys of a released `connector_config` that say nothing about the weights."""


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of the connector; the defaults of the code, not those of the released 24 layers of width 1536."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0

    @classmethod
    def of(cls, values: dict[str, Any]) -> ConnectorConfig:
        """From a conditioner's `connector_config`. Raises WeftError for an unknown key."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - set(IGNORED))
        if unknown:
            raise WeftError(f"connector_config: unknown key '{unknown[0]}': {nearest(unknown[0], sorted(known))}")
        config = cls(**{key: value for key, value in values.items() if key in known})
        if config.hidden_size % config.num_attention_heads:
            raise WeftError(
                f"connector_config: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        return config


class ConnectorAttention(nn.Module):
    """Multi-head self-attention with biases; bidirectional, without mask or positions."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [B, Q, D]
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class ConnectorMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class ConnectorLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.self_attn = ConnectorAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ConnectorMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Connector(nn.Module):
    """The stack of layers; no final norm. Position-free: permuting the queries permutes the result."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers: Any = nn.ModuleList([ConnectorLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # set by diffusers with the flag

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(layer, x)
            else:
                x = layer(x)
        return x


class StableDiffusion3Conditioner(ModelMixin, ConfigMixin):
    """`meta_queries` [Q, H] in the VLM's embedding space; forward maps the VLM's states at their places to SD3's text.

    The class has the released one's name, because the name is part of the saved configuration.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        connector_config: dict,
        num_queries: int = 256,
        llm_hidden_size: int = 3584,
        pooled_projection_dim: int = 2048,
        joint_attention_dim: int = 4096,
    ) -> None:
        super().__init__()
        config = ConnectorConfig.of(connector_config)
        self.connector = Connector(config)
        self.projector_1 = nn.Linear(llm_hidden_size, config.hidden_size)
        self.projector_2 = nn.Linear(config.hidden_size, pooled_projection_dim)
        self.projector_3 = nn.Linear(config.hidden_size, joint_attention_dim)
        self.meta_queries = nn.Parameter(torch.zeros(num_queries, llm_hidden_size))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States of the queries [B, Q, H] -> text [B, Q, C] and pooled [B, P], in the place of CLIP's and T5's."""
        x = self.connector(self.projector_1(states))
        return self.projector_3(x), self.projector_2(x.mean(1))


@torch.no_grad()
def initialise(conditioner: Any, seed: int = 0, *, zero_output: bool = True) -> None:
    """Fresh weights for stage A, in place; a function of the seed.

    The connector as its released code draws it (Xavier-uniform matrices, MLP biases N(0, 1e-6)). The queries and
    `zero_output` follow training code of the same family (deepgenteam/deepgen): queries N(0, 1/sqrt(H)), projections
    to the transformer zero, so that the first step sees an empty text.
    """
    draw = generator(seed, "conditioner")

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * std)

    for layer in conditioner.connector.layers:
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                bound = (6 / sum(linear.weight.shape)) ** 0.5  # Xavier-uniform
                linear.weight.copy_((torch.rand(linear.weight.shape, generator=draw) * 2 - 1) * bound)
                linear.bias.zero_()
        normal(layer.mlp.fc1.bias, 1e-6)
        normal(layer.mlp.fc2.bias, 1e-6)
    for projector in (conditioner.projector_1, conditioner.projector_2, conditioner.projector_3):
        normal(projector.weight, projector.in_features**-0.5)
        projector.bias.zero_()
    if zero_output:
        conditioner.projector_2.weight.zero_()
        conditioner.projector_3.weight.zero_()
    normal(conditioner.meta_queries, conditioner.meta_queries.shape[1] ** -0.5)
