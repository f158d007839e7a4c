"""What a model is, in numbers: one frozen `ModelConfig` for every family, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .reader import ConfigReader

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    Field names are those of Hugging Face's ``rope_parameters``; which are read depends on ``kind``.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the first ``dims`` dimensions of a head (of MLA's rope part, for MLA).

    ``interleaved``: the checkpoint pairs dimensions (0, 1), (2, 3), ...; otherwise (0, dims/2), (1, dims/2+1), ...
    """

    theta: float
    dims: int
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class GqaAttention:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).

    ``qk_norm``: ``"full"`` normalises all heads of q (and of k) as one vector, ``"head"`` each head by itself.
    ``sliding_window``: a token sees itself and the ``sliding_window - 1`` tokens before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: Literal["none", "full", "head"] = "none"
    clip_qkv: float | None = None
    sliding_window: int | None = None
    bias: bool = False

    kind: Literal["gqa"] = field(default="gqa", init=False)

    @property
    def kv_width(self) -> int:
        """Elements cached per token and layer: keys, then values."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MlaAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    ``q_lora_rank`` None: queries are projected directly. ``norm_eps`` belongs to the norms of the latents.
    """

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    bias: bool = False
    norm_eps: float = 1e-6

    kind: Literal["mla"] = field(default="mla", init=False)

    @property
    def kv_width(self) -> int:
        """Elements cached per token and layer: the latent, then the rotated key all heads share."""
        return self.kv_lora_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class Router:
    """How a token chooses its experts.

    ``"softmax"``: the ``top_k`` largest probabilities. ``"sigmoid"``: DeepSeek-V3's (arXiv 2412.19437, section
    2.1.2): scores plus a correction bias choose ``topk_groups`` of ``groups`` by the sum of each group's two best,
    then ``top_k`` experts within them; the weights are the scores without the bias, times ``scale``.
    """

    kind: Literal["softmax", "sigmoid"]
    top_k: int
    normalise: bool
    groups: int = 1
    topk_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model; everything the rest of Concertina needs to know of ``config.json``.

    Parameters
    ----------
    family : str
        Key of the family (``architectures[0]`` of the checkpoint).
    moe_layers : tuple of int
        Decoder layers whose MLP is a mixture of experts, ascending; the others are dense. Elsewhere "MoE layer m"
        means ``moe_layers[m]``.
    expert_intermediate, shared_intermediate, dense_intermediate : int
        Inner width of one routed expert, of the shared experts together (0: none), and of a dense layer's MLP.
    dtype : str
        Data type of the checkpoint: ``bfloat16``, ``float16`` or ``float32``.
    eos_ids : tuple of int
        Tokens that end a sequence; may be empty.
    """

    family: str
    layers: int
    hidden_size: int
    vocab_size: int
    attention: GqaAttention | MlaAttention
    rope: Rope
    router: Router
    experts: int
    expert_intermediate: int
    moe_layers: tuple[int, ...]
    dense_intermediate: int
    shared_intermediate: int
    tie_word_embeddings: bool
    rms_eps: float
    max_positions: int
    dtype: str
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def top_k(self) -> int:
        return self.router.top_k


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the checkpoint must have it; ``alias`` is another name it may have there."""

    name: str
    shape: tuple[int, ...]
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class TrunkTensor:
    """A tensor of the trunk: checkpoint tensors one behind the other along their first dimension.

    ``dtype`` None means the model's; routers that choose in float32 keep their weights so.
    """

    parts: tuple[TensorSpec, ...]
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a layer's experts are in a checkpoint; ``{layer}`` is the decoder layer, ``{expert}`` the expert.

    ``gate``, ``up`` ([I, H]) and ``down`` ([H, I]) name one expert's matrices. Checkpoints that stack experts (as
    transformers 5 writes with ``save_original_format=False``) have ``stacked_gate_up`` [E, 2I, H] and
    ``stacked_down`` [E, H, I].
    """

    gate: str
    up: str
    down: str
    stacked_gate_up: str
    stacked_down: str


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: how to read its ``config.json`` and what its tensors are called.

    ``trunk`` maps the decoder's parameter names (see `naming`) to checkpoint tensors; ``experts`` names the rest.
    """

    architecture: str
    read: Callable[[ConfigReader], ModelConfig]
    trunk: Callable[[ModelConfig], dict[str, TrunkTensor]]
    experts: ExpertNames
