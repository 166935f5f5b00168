"""Readers of a host's call: what its positions mean to seeds that mix them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError
from kasmina_core.positions import NESTED, WHOLE_SEQUENCES, SeedContext

CACHES: Final = ("cache", "past_key_values", "past_key_value", "cache_params", "mems")
_LENGTHS: Final = ("cu_seq_lens", "cu_seqlens")
_LENGTHS_OF_ROWS: Final = ("length", "lengths", "lens", "seq_lens", "seq_lengths")
_BETWEEN_POSITIONS: Final = ("attn_mask", "src_mask", "tgt_mask", "memory_mask")


def call_arguments(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a host's call by name, as its ``forward`` declares them.

    >>> call_arguments(nn.ReLU(), (1,), {})
    {'input': 1}
    """
    # Of the class: a measurement puts another forward in the place of an instance's.
    declared = list(inspect.signature(type(host).forward).parameters.values())[1:]
    names = [p.name for p in declared if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@final
class EveryPosition:
    """States that a host knows no padding, no packed documents and no cache.

    A call that shows one of them is refused: an ``attention_mask`` with zeros, a ``*padding_mask`` that hides something,
    another mask ``(b, t)`` that is not the same everywhere, ``lengths`` that differ, ``position_ids`` that begin anew, a
    cache that is filled, nested tensors; in a mapping that is an argument too. What a host keeps to itself cannot be seen.
    """

    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
        """Return the context of whole sequences.

        Raises:
            HostError: If the call shows padding, documents or a cache.
        """
        for name, value in _named(call_arguments(host, args, kwargs)):
            if value is None:
                continue
            if name in CACHES and is_filled(value):
                _refuse(f"'{name}' is a cache that holds earlier positions")
            elif name.startswith(_LENGTHS):
                _refuse(f"'{name}' packs several documents into a row")
            elif isinstance(value, Tensor):
                if value.is_nested:
                    _refuse(f"'{name}' is a nested tensor, of sequences of several lengths")
                elif name.endswith(("padding_mask", "pad_mask")):
                    _refuse_if(~_unhidden(value), f"'{name}' hides positions")
                elif name.endswith("attention_mask"):
                    if value.dim() != 2:
                        _refuse(f"'{name}' has shape {tuple(value.shape)}, not (b, t)")
                    _refuse_if(value == 0, f"'{name}' hides positions")
                elif name.endswith("position_ids") and value.dim() == 2 and value.shape[1] > 1:
                    _refuse_if(value.diff(dim=1) <= 0, f"'{name}' begins anew within a row")
                elif name.endswith("mask") and value.dim() == 2 and not name.endswith(_BETWEEN_POSITIONS):
                    _refuse_if(value != value[:1, :1], f"'{name}' differs between positions")
                elif name in _LENGTHS_OF_ROWS and value.dim() == 1 and len(value):
                    _refuse_if(value != value[:1], f"'{name}' differs between rows")
        return WHOLE_SEQUENCES

    def __repr__(self) -> str:
        return "EveryPosition()"


def _named(given: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping) and name not in CACHES:
            yield from _named(value)
        else:
            yield str(name), value


def _refuse(what: str) -> None:
    raise HostError(_refusal(what))


def _refusal(what: str) -> str:
    return (
        f"{what}, and context=EveryPosition() states that there is no padding, no packing and no cache, so a seed that "
        "mixes positions would compute something else.\n"
        "Give the model a reader of its host's calls: MorphogeneticModel(host, ..., context=reader)."
    )


def _refuse_if(found: Tensor, what: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(~found.any(), _refusal(what))
    elif bool(found.any()):
        _refuse(what)


def is_filled(cache: Any) -> bool:
    """Return whether a cache of keys and values holds positions."""
    length = getattr(cache, "get_seq_length", None)
    return int(length()) > 0 if length is not None else not isinstance(cache, (tuple, list)) or len(cache) > 0


def _unhidden(mask: Tensor) -> Tensor:
    """Turn a mask of torch's, bool with True for hidden or added to scores, into bool with True for seen.

    Raises:
        HostError: If it is added and holds other numbers than 0 and minus infinity.
    """
    if mask.dtype is torch.bool:
        return ~mask
    limit = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0
    hidden = mask <= limit if mask.is_floating_point() else mask != 0
    if not torch.compiler.is_compiling() and bool(((mask != 0) & ~hidden).any()):
        raise HostError("A mask that is added to scores weighs positions, which a seed cannot follow.")
    return ~hidden


@final
class TorchTransformer:
    """Reads the calls of torch's own transformers.

    It knows ``nn.Transformer``, ``nn.TransformerEncoder``, ``nn.TransformerDecoder`` and their layers: the key padding
    masks, and attention masks that are causal, or say padding or documents. Everything else is refused.

    Args:
        module: Path of the transformer in the host; empty if it is the host.

    >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    >>> padding = torch.tensor([[False, False, True]])
    >>> TorchTransformer()(encoder, (torch.zeros(1, 3, 8),), {"src_key_padding_mask": padding}).real
    tensor([[ True,  True, False]])
    """

    def __init__(self, module: str = "") -> None:
        self.module = module

    def __call__(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> SeedContext | Mapping[str, SeedContext]:
        """Return the context of a call, of ``nn.Transformer`` those of its encoder and decoder.

        Raises:
            HostError: If the module is none of torch's transformers, or a mask says something else.
        """
        given = call_arguments(host, args, kwargs)
        if isinstance(host, nn.Transformer):
            source = _context(host.encoder, given, "src", "src_mask", "src_is_causal")
            target = _context(host.decoder, given, "tgt", "tgt_mask", "tgt_is_causal")
            start = f"{self.module}." if self.module else ""
            return {f"{start}encoder": source, f"{start}decoder": target}
        if isinstance(host, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            mask = "mask" if isinstance(host, nn.TransformerEncoder) else "src_mask"
            return _context(host, given, "src", mask, "is_causal")
        if isinstance(host, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
            return _context(host, given, "tgt", "tgt_mask", "tgt_is_causal")
        raise HostError(
            f"TorchTransformer reads the calls of torch.nn.Transformer*, not of {type(host).__name__}.\n"
            "Say where the transformer is: TorchTransformer('path.of.module')."
        )

    def __repr__(self) -> str:
        return f"TorchTransformer({self.module!r})"


def _context(
    host: nn.Module, given: Mapping[str, Any], side: str, mask_name: str, causal_name: str
) -> SeedContext:
    padding, mask = given.get(f"{side}_key_padding_mask"), given.get(mask_name)
    if padding is not None and getattr(host, "use_nested_tensor", False):
        raise HostError(NESTED.format(where="A seed in this nn.TransformerEncoder"))
    real = _unhidden(padding) if padding is not None else None
    if given.get(causal_name):  # torch's word that the mask is a causal one
        return SeedContext(real, causal=True)
    if mask is None:
        return SeedContext(real)
    allowed = _unhidden(mask)
    if allowed.dim() != 2:
        raise HostError(f"'{mask_name}' differs between samples or heads, which a seed cannot follow.")
    attention = next(m for m in host.modules() if isinstance(m, nn.MultiheadAttention))
    b = given[side].shape[0 if attention.batch_first else 1]
    read = SeedContext.from_allowed(allowed.expand(b, -1, -1))
    if read.real is not None:
        real = read.real if real is None else real & read.real
    return SeedContext(real, read.documents, read.causal)
