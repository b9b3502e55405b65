"""What a vision transformer's tokens look at: attention of the class and teachers' tokens over the patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.layers.attention import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from cit_scale.models.advised import Advised
from cit_scale.models.network import Network


@dataclass(frozen=True)
class TokenAttention:
    """What the P prefix tokens of a network attend to, for B images. Rows sum to 1.

    tokens: names of the prefix tokens. grid: rows and columns of patches. last: (B, P, P + N), of the last layer, mean
    over its heads. rollout: the same through all layers (Abnar and Zuidema, ACL 2020): the product over layers of
    (A + 1) / 2, A being the mean over the heads of a layer.
    """

    tokens: tuple[str, ...]
    grid: tuple[int, int]
    last: Tensor
    rollout: Tensor


def transformer_of(network: Network) -> VisionTransformer | None:
    """The vision transformer in a network whose attention can be read; None for any other model."""
    model: nn.Module = network.model
    if isinstance(model, Advised):
        model = model.trunk
    if not isinstance(model, VisionTransformer) or model.num_prefix_tokens < 1:
        return None
    return model if _layers(model) else None


def _layers(model: VisionTransformer) -> list[Attention]:
    """The attention of each block; empty where that of some block cannot be read."""
    layers = [getattr(block, "attn", None) for block in model.blocks]
    # Of exactly this type: a subclass may turn or weigh queries and keys in a way that ``attention_rows`` leaves out.
    known = [layer for layer in layers if type(layer) is Attention]
    return known if len(known) == len(layers) else []


@torch.no_grad()
def token_attention(network: Network, images: Tensor) -> TokenAttention:
    """Return what each prefix token looks at. images: (B, 3, H, W) in [0, 1]. Raises ValueError where
    ``transformer_of`` finds none.
    """
    transformer = transformer_of(network)
    if transformer is None:
        raise ValueError(f"{type(network.model).__name__} has no attention that can be read")
    layers, prefix = _layers(transformer), transformer.num_prefix_tokens
    with _inputs_of(layers) as inputs:
        network(images)
    rollout: Tensor | None = None
    for layer, tokens in zip(layers, inputs, strict=True):
        rows = attention_rows(layer, tokens).mean(dim=1)  # (B, P + N, P + N)
        mixed = (rows + torch.eye(rows.shape[1], device=rows.device)) / 2
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    rows_patches, columns = transformer.patch_embed.grid_size
    return TokenAttention(
        tokens=_token_names(network, prefix),
        grid=(int(rows_patches), int(columns)),
        last=rows[:, :prefix].cpu(),
        rollout=rollout[:, :prefix].cpu(),
    )


def attention_rows(layer: Attention, tokens: Tensor) -> Tensor:
    """The weights with which a layer mixes values: softmax(q k' / sqrt(d)), (B, num_heads, N, N). tokens: (B, N, C)."""
    batch, count, _ = tokens.shape
    qkv = layer.qkv(tokens).reshape(batch, count, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys = layer.q_norm(qkv[0]), layer.k_norm(qkv[1])  # each (B, num_heads, N, d)
    return ((queries.float() * layer.scale) @ keys.float().transpose(-2, -1)).softmax(dim=-1)


def _token_names(network: Network, prefix: int) -> tuple[str, ...]:
    """Names of the prefix tokens: the heads' of a CiT; otherwise cls, and registers by number."""
    if len(network.heads) == prefix and not isinstance(network.model, Advised):
        return network.heads
    return ("cls", *(f"register {number}" for number in range(1, prefix)))


@contextmanager
def _inputs_of(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets what each layer is given, in the order of the calls."""
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
