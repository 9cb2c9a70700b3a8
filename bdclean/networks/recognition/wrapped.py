"""What kind of file holds tensors that are no network's own: adapters, quantised and flattened weights."""

from __future__ import annotations

from collections.abc import Iterable

# The ends or parts of names that a library gives to tensors of its own: what they are, and what to do.
KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("lora_A", "lora_B", "lora_embedding_A", "lora_down", "lora_up"),
        "LoRA adapters without a network of their own",
        "merge them into the network (merge_and_unload() in PEFT) and save that",
    ),
    (
        ("qweight", "qzeros", "g_idx", "absmax", "quant_map"),
        "quantised weights",
        "give the network that they were made from, in float",
    ),
    (
        ("_flat_param", "flat_param", "_fsdp_wrapped_module"),
        "an FSDP shard of flattened weights",
        "gather the full state dict (StateDictType.FULL_STATE_DICT) and save that",
    ),
    (
        ("weight_g", "weight_v", "parametrizations"),
        "weights under a parametrization, such as weight norm",
        "take it off (torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm) and save again",
    ),
)


def kind_of_tensors(names: Iterable[str]) -> tuple[str, str] | None:
    """What files with such tensors hold, and what to do, by the first name that tells; None where none does."""
    words = {word for name in names for word in name.split(".")}
    return next(((what, advice) for marks, what, advice in KINDS if words.intersection(marks)), None)
