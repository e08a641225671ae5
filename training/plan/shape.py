"""BaseShape: the numbers of a Qwen2.5-VL's configuration from which its modules, memory and work follow.

Owns the two published sizes as data, so that a plan needs no hub. Does not know: weights, recipes, memory. Place in a
training run: under the plan, before anything is loaded; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.sites import Part, Site

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Of the tower; lengths in numbers, the window in pixels."""

    depth: int = 32
    hidden: int = 1280
    heads: int = 16
    mlp: int = 3420
    patch: int = 14
    temporal: int = 2
    channels: int = 3
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    window: int = 112
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    """Blocks that attend to the whole picture; the others to their window."""

    @property
    def patch_numbers(self) -> int:
        return self.channels * self.temporal * self.patch**2

    @property
    def merged(self) -> int:
        """Width of the merger's input and middle."""
        return self.hidden * self.merge**2


@dataclass(frozen=True, slots=True)
class BaseShape:
    """Of one base."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    is_head_tied: bool
    vision: VisionShape = VisionShape()

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    def sites(self) -> dict[str, Site]:
        """The table that ``discover_sites`` finds on a model of this shape, in another order."""
        table = [*self._language(), *self._blocks(), *self._merger()]
        return {site.name: site for site in table}

    def _language(self) -> list[Site]:
        hidden, query, key, mlp = self.hidden, self.query_width, self.key_width, self.mlp
        linears = {
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, key),
            "self_attn.v_proj": (hidden, key),
            "self_attn.o_proj": (query, hidden),
            "mlp.gate_proj": (hidden, mlp),
            "mlp.up_proj": (hidden, mlp),
            "mlp.down_proj": (mlp, hidden),
        }
        return _repeated("model.language_model.layers", self.layers, linears, "language")

    def _blocks(self) -> list[Site]:
        hidden, mlp = self.vision.hidden, self.vision.mlp
        linears = {
            "attn.qkv": (hidden, 3 * hidden),
            "attn.proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, mlp),
            "mlp.up_proj": (hidden, mlp),
            "mlp.down_proj": (mlp, hidden),
        }
        return _repeated("model.visual.blocks", self.vision.depth, linears, "vision")

    def _merger(self) -> list[Site]:
        merged = self.vision.merged
        return [
            Site("model.visual.merger.mlp.0", merged, merged, "merger"),
            Site("model.visual.merger.mlp.2", merged, self.hidden, "merger"),
        ]


def _repeated(stem: str, times: int, linears: dict[str, tuple[int, int]], part: Part) -> list[Site]:
    return [
        Site(f"{stem}.{index}.{leaf}", width_in, width_out, part)
        for index in range(times)
        for leaf, (width_in, width_out) in linears.items()
    ]


KNOWN_SHAPES = (
    BaseShape("Qwen/Qwen2.5-VL-3B-Instruct", 2048, 36, 16, 2, 128, 11008, 151936, True),
    BaseShape("Qwen/Qwen2.5-VL-7B-Instruct", 3584, 28, 28, 4, 128, 18944, 152064, False),
)
"""From their ``config.json`` on the hub; the tower of both is the default of ``VisionShape``."""


def known_shape(name: str) -> BaseShape | None:
    """A published base by its hub id, with or without the organisation and ``-Instruct``, in any case."""
    wanted = name.lower().removeprefix("qwen/").removesuffix("-instruct")
    names = (shape.name.lower().removeprefix("qwen/").removesuffix("-instruct") for shape in KNOWN_SHAPES)
    return next((shape for shape, known in zip(KNOWN_SHAPES, names, strict=True) if known == wanted), None)


def shape_of(config: Qwen2_5_VLConfig, name: str) -> BaseShape:
    """The shape in a configuration that transformers has read; ``name`` is for showing. Raises ValueError."""
    text, vision = config.get_text_config(), config.vision_config
    if vision is None or isinstance(vision, dict):
        raise ValueError("the configuration has no vision part; is it a Qwen2.5-VL's?")
    heads = int(text.num_attention_heads)
    return BaseShape(
        name=name,
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(text.num_key_value_heads or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        mlp=int(text.intermediate_size),
        vocab=int(text.vocab_size),
        is_head_tied=bool(config.tie_word_embeddings),
        vision=VisionShape(
            depth=int(vision.depth),
            hidden=int(vision.hidden_size),
            heads=int(vision.num_heads),
            mlp=int(vision.intermediate_size),
            patch=int(vision.patch_size),
            temporal=int(vision.temporal_patch_size),
            channels=int(vision.in_channels),
            merge=int(vision.spatial_merge_size),
            window=int(vision.window_size),
            full_blocks=tuple(int(index) for index in vision.fullatt_block_indexes),
        ),
    )
