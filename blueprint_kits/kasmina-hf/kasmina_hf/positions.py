"""What positions mean in the calls of transformers models: padding, packed documents, and the cache."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import torch
from kasmina_core import WHOLE_SEQUENCES, HostError, SeedContext, call_arguments
from torch import Tensor, nn

_CACHES: Final = ("cache", "past_key_values", "cache_params", "mems")  # the first from transformers 5.24 on
_UNREAD: Final = ("input_mask", "perm_mask")
_TEXT: Final = ("language_model", "text_model", "model.language_model", "model.text_model")
_VISION: Final = (
    "vision_model",
    "vision_tower",
    "visual",
    "model.vision_model",
    "model.vision_tower",
    "model.visual",
)
_PARTS_OF_IMAGES: Final = (
    "pixel_attention_mask",
    "pixel_mask",
    "spatial_shapes",
    "image_grid_thw",
    "image_sizes",
)
_PAD_THEMSELVES: Final = ("big_bird", "bigbird_pegasus", "led", "longformer", "reformer")
_ADVICE: Final = "Begin with an empty cache, or pass use_cache=False."


@final
class _Store(dict[str, Any]):
    """What seeds keep of the positions in one cache, by slot.

    Attributes:
        positions: The ``position_ids`` of the cached positions, if they were given.
        seen: The cache's tensors as the last forward left them, with their versions.
    """

    positions: Tensor | None = None
    seen: tuple[tuple[weakref.ref[Tensor], int], ...] = ()


@final
class TransformersCall:
    """Reads the calls of transformers models.

    - ``attention_mask`` ``(b, t)``: its zeros are padding. One of four dimensions is read if it says no more than
      padding, documents in a row and causality, and is refused otherwise.
    - ``position_ids`` that begin anew within a row, and ``cu_seq_lens_q``: packed documents.
    - A cache: seeds keep what they need of its positions beside it. A cache that was filled without the seed, or was
      reordered, cropped or copied since, is refused.

    - A mask of the samples of sound becomes that of the steps which the model makes of them, as in the model itself.

    Of an encoder-decoder model encoder and decoder have masks of their own; the encoder's is read too where ``generate``
    calls it alone. Of a model with towers the language model is
    read; images have no padding, unless the call has masks or sizes of their parts. In another tower a seed that mixes
    positions is refused. Where a model pads sequences itself, to a multiple of its window, such a seed is too: give
    inputs of such a length, or leave the window as long as they are.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, _Store] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __call__(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> SeedContext | Mapping[str, SeedContext]:
        """Return the context of a call, or that of each part of the model by its path.

        Raises:
            HostError: If a mask or a cache cannot be followed.
        """
        given = call_arguments(host, args, kwargs)
        for name in _UNREAD:
            if given.get(name) is not None:
                raise HostError(f"'{name}' says of positions what a seed that mixes them cannot follow.")
        config: Any = host.config
        given["attention_mask"] = _of_steps(host, given)
        pads = config.model_type in _PAD_THEMSELVES
        if pads and given["attention_mask"] is None:
            given["attention_mask"] = torch.ones(_tokens(given), device=host.device)  # type: ignore[arg-type]  # of torch's modules
        if _is_an_encoder(host):
            return self._read({"attention_mask": given["attention_mask"]}, pads=pads)
        if getattr(config, "is_encoder_decoder", False):
            decoder = {
                "attention_mask": given.get("decoder_attention_mask"),
                "position_ids": given.get("decoder_position_ids"),
                "input_ids": given.get("decoder_input_ids"),
                "inputs_embeds": given.get("decoder_inputs_embeds"),
            }
            caches = {name: given.get(name) for name in _CACHES}
            return {
                _path(host, "encoder"): self._read({"attention_mask": given["attention_mask"]}, pads=pads),
                _path(host, "decoder"): self._read(decoder | caches, keeps=_keeps(host, given)),
            }
        read = self._read(given, keeps=_keeps(host, given), pads=pads)
        if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
            contexts = dict.fromkeys(_TEXT, read)
            if all(given.get(name) is None for name in _PARTS_OF_IMAGES):
                contexts |= dict.fromkeys(_VISION, WHOLE_SEQUENCES)
            return {path: context for path, context in contexts.items() if _has(host, path)}
        return read

    def entries(self, host: nn.Module) -> list[str]:
        """Return the path of the encoder of an encoder-decoder model, which ``generate`` calls before the model."""
        if not getattr(host.config, "is_encoder_decoder", False):
            return []
        encoder = host.get_encoder()  # type: ignore[operator]  # of transformers
        return [path for path, module in host.named_modules() if module is encoder and path]

    def ended(self, context: SeedContext | Mapping[str, SeedContext], output: Any) -> None:
        """Tie what seeds kept of a call to the cache that the model returned."""
        contexts = [context] if isinstance(context, SeedContext) else list(context.values())
        stores = [one.store for one in contexts if isinstance(one.store, _Store)]
        if stores and (cache := _cache_in(output)) is not None:
            stores[0].seen = tuple((weakref.ref(t), t._version) for t in _tensors_of(cache))
            self._kept[cache] = stores[0]

    def _read(self, given: Mapping[str, Any], keeps: bool = False, pads: bool = False) -> SeedContext:
        cache = next((_own(given[name]) for name in _CACHES if given.get(name) is not None), None)
        past, store = 0, _Store() if keeps else None
        if cache is not None and _length(cache) > 0:
            past, store = _length(cache), self._store_of(cache)
        ids = given.get("position_ids")
        documents = None
        if ids is not None:
            known = store.positions if store is not None else None
            if past and known is None:
                raise HostError(
                    f"'position_ids' are given now, and were not for the cached positions. {_ADVICE}"
                )
            ids = (
                torch.cat([known.expand(*ids.shape[:-1], -1), ids], -1) if past and known is not None else ids
            )
            documents = _documents(ids)
        elif past and store is not None and store.positions is not None:
            raise HostError(f"'position_ids' were given for the cached positions, and are not now. {_ADVICE}")
        if store is not None:
            store.positions = ids
        if (lengths := given.get("cu_seq_lens_q")) is not None:
            t = _tokens(given)[1]
            documents = torch.bucketize(torch.arange(t, device=lengths.device), lengths[1:], right=True)[None]
        if documents is not None:
            documents = documents.expand(_tokens(given)[0], -1)
        real, causal = None, False
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask != 0
            # Features of a host that pads have more positions than the mask of all of them: then it does not fit.
            if not pads and not torch.compiler.is_compiling() and bool(real.all()):
                real = None
        elif mask is not None:
            shown = SeedContext.from_allowed(_allowed(mask, past))
            real, causal = shown.real, shown.causal
            documents = shown.documents if documents is None else documents
        return SeedContext(real, documents, causal, past, store)

    def _store_of(self, cache: Any) -> _Store:
        store = self._kept.get(cache) if hasattr(cache, "layers") else None
        if store is None:
            raise HostError(
                f"The cache holds {_length(cache)} positions that a seed which mixes positions has not seen. {_ADVICE}"
            )
        now = _tensors_of(cache)
        if len(now) != len(store.seen) or not all(
            ref() is tensor and version == tensor._version
            for tensor, (ref, version) in zip(now, store.seen, strict=True)
        ):
            raise HostError(
                "The cache was reordered, cropped or changed in another way since the last forward, and what a seed that "
                f"mixes positions keeps of it was not. {_ADVICE}"
            )
        return store


def _keeps(host: Any, given: Mapping[str, Any]) -> bool:
    """Return whether the host keeps keys and values in this call."""
    asked = given.get("use_cache")
    return bool(getattr(host.config, "use_cache", False) if asked is None else asked)


def _is_an_encoder(host: Any) -> bool:
    """Return whether a module is the encoder of an encoder-decoder model, called without it."""
    return getattr(host.config, "is_encoder_decoder", False) and host.get_encoder() is host


def _length(cache: Any) -> int:
    if isinstance(cache, (tuple, list)):
        return len(cache)
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:  # of a cache of states
        raise HostError(
            f"A {type(cache).__name__} does not say how many positions it holds. {_ADVICE}"
        ) from error


def _has(host: nn.Module, path: str) -> bool:
    module: Any = host
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)


def _of_steps(host: Any, given: Mapping[str, Any]) -> Any:
    """Return the attention mask of a call, that of sound by the steps which the model makes of its samples."""
    mask = given.get("attention_mask")
    is_sound = any(given.get(name) is not None for name in ("input_values", "input_features"))
    if (
        not is_sound
        or not isinstance(mask, Tensor)
        or not hasattr(host, "_get_feature_vector_attention_mask")
    ):
        return mask
    lengths, steps = host._get_feat_extract_output_lengths, host._get_feature_vector_attention_mask  # noqa: SLF001  # transformers'
    before = {"add_adapter": False} if "add_adapter" in inspect.signature(steps).parameters else {}
    return steps(int(lengths(torch.tensor(mask.shape[1]), **before)), mask, **before)


def _own(cache: Any) -> Any:
    """Return the part of a cache that holds the positions of the model itself: of a decoder not those of its encoder."""
    return getattr(cache, "self_attention_cache", cache)


def _tensors_of(cache: Any) -> list[Tensor]:
    """Return the keys that a cache holds; one that holds them in another way has none."""
    held = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    return [keys for keys in held if isinstance(keys, Tensor)]


def _cache_in(output: Any) -> Any:
    """Return the cache in what a model returned, if it is one whose tensors can be watched."""
    held = output if isinstance(output, tuple) else [getattr(output, name, None) for name in _CACHES]
    for item in held:
        if _tensors_of(_own(item)):
            return _own(item)
    return None


def _documents(ids: Tensor) -> Tensor:
    """Number the documents of each row by where ``position_ids`` begin anew."""
    steps = ids.diff(dim=-1)
    # Of three dimensions the first axis are time, height and width: the tokens of an image share a time.
    anew = steps[0] < 0 if ids.dim() == 3 else steps <= 0
    return torch.nn.functional.pad(anew.long().cumsum(-1), (1, 0))


def _tokens(given: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many sequences a call has, and how many new positions."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(tensor := given.get(name), Tensor):
            return tensor.shape[0], tensor.shape[1]
    raise HostError("'position_ids' say something of positions, and no 'input_ids' how many there are.")


def _allowed(mask: Any, past: int) -> Tensor:
    """Turn a mask ``(b, 1, t, t)``, bool or added to scores, into who may look at whom ``(b, t, t)``.

    Raises:
        HostError: If it has another form.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or past:
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        cached = " with a cache" if past else ""
        raise HostError(
            f"An attention mask of {what}{cached} cannot be followed by a seed that mixes positions: give (b, t)."
        )
    mask = mask[:, 0]
    if mask.dtype is torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise HostError(
            "An attention mask that weighs positions cannot be followed by a seed that mixes them."
        )
    return ~hidden


def _path(host: nn.Module, name: str) -> str:
    """Return the path of a model's encoder or decoder.

    Raises:
        HostError: If there is none of that name, or several.
    """
    found = [path for path, _ in host.named_modules() if path.rpartition(".")[2] == name]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise HostError(
            f"{type(host).__name__} has {len(outermost)} modules named '{name}', where one was expected."
        )
    return outermost[0]
