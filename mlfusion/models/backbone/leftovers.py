"""Says which tensors of a checkpoint may be left over, and why; every other one is refused by its name.

A tensor is judged by the part of its name at which it leaves the names of the tensors that are used: `classifier` in
`classifier.weight`, but `11` in `encoder.layer.11.output.dense.weight`, which is a layer that the configuration has not.
"""

import re
from collections.abc import Iterable

PARTS = {  # the reason → the part of the name; the part stands outside the blocks, so before any number
    "a head": r"(?:\w+_)?(?:heads?|classifiers?|predictors?|logits|logit_scale|logit_bias|projector|projection|projections)"
    r"|proj|head_dist|fc|neck",
    "a pooler": r"pooler|(?:\w+_)?pooling|probe",
    "a decoder of pretraining": r"decoder\w*|mask_token|mask_decoder|prompt_encoder|shared_image_embedding",
    "the text half": r"text\w*|language_model|lm\w*|qformer|query_tokens|token_embedding|positional_embedding|transformer"
    r"|ln_final|attn_mask|multi_modal_projector|connector|resampler|perceiver\w*",
    "a copy that training keeps": r"teacher\w*|(?:\w+_)?ema|ema_\w+|momentum\w*|optimizer\w*|queue\w*",
}
BUFFERS = {  # at the end of the name, anywhere
    "counted by training": r"num_batches_tracked",
    "computed by the model": r"position_ids|relative_position_index|relative_coords_table|inv_freq|attn_mask",
}
CHANGES = {  # what a left-over tensor is, where it changes the weights beside it
    "an adapter, which is not applied; merge it into the weights first": r"lora_|lokr_|loha_|hada_|ia3_|oft_|vera_|adapter",
    "quantised weights or their scale, and quantised weights are not read": (
        r"(?:^|\.)scales?$|(?<!logit)_scale$|scale_inv|\.SCB$|qweight|qzeros|g_idx|absmax|quant_state|quant_map|zero_point"
        r"|weight_packed|weight_shape$|_data$|\.meta$|amax$"
    ),
}


def reason(name: str, used: Iterable[str]) -> str | None:
    """Why a tensor that has no place may be left over, or None if it may not; `used` are the names that have a place."""
    if change(name) is not None:
        return None
    parts = name.split(".")
    for why, pattern in BUFFERS.items():
        if re.fullmatch(pattern, parts[-1]):
            return why
    depth = max((_common(parts, other.split(".")) for other in used), default=0)
    if depth == len(parts) or any(part.isdigit() for part in parts[:depth]):
        return None
    return next((why for why, pattern in PARTS.items() if re.fullmatch(pattern, parts[depth])), None)


def change(name: str) -> str | None:
    """What a left-over tensor does to the weights beside it, as its name says."""
    return next((what for what, pattern in CHANGES.items() if re.search(pattern, name)), None)


def _common(a: list[str], b: list[str]) -> int:
    """The number of parts at which two names begin alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
