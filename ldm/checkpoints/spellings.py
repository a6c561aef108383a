"""What a key of a file means: a weight, under one of its spellings, or nothing that matters.

Files in the wild hold more than a model (optimizer states, losses, a second set of weights), or a
part of one, whose keys then often lack the beginning that says which part it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ldm.checkpoints.keys import PREFIXES, computed_entries

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]

# --- Keys that mean a weight -----------------------------------------------------------------

# Beginnings of keys that mean official ones; the first that fits counts. A stage alone often lacks
# its prefix, and newer versions of transformers leave out "text_model.".
SPELLINGS = {
    UNET: UNET,
    VAE: VAE,
    TEXT: TEXT,
    "cond_stage_model.transformer.": TEXT,
    "diffusion_model.": UNET,
    **{f"{part}.": f"{UNET}{part}." for part in ("time_embed", "input_blocks")},
    **{f"{part}.": f"{UNET}{part}." for part in ("middle_block", "output_blocks", "out")},
    "text_model.": TEXT,
    **{f"{part}.": f"{TEXT}{part}." for part in ("embeddings", "final_layer_norm")},
    "encoder.layers.": f"{TEXT}encoder.layers.",
    **{f"{part}.": f"{VAE}{part}." for part in ("encoder", "decoder")},
    **{f"{part}.": f"{VAE}{part}." for part in ("quant_conv", "post_quant_conv")},
}


# The middle of the autoencoder attends as the UNet does, and so some name its layers; a widespread
# converter has put "to_" before names that had it. Others kept the names of diffusers, old or new.
VAE_ATTENTION = {
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "to_out.0": "proj_out",
    "to_to_out.0": "proj_out",
    "group_norm": "norm",
    **{f"{to}{name}": name for to in ("to_", "to_to_") for name in ("q", "k", "v")},
}
# What PyTorch's wrappers put into the names of all that is in them: of data parallelism (`module`),
# compilation, sharding and recomputation.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def official_name(key: str) -> str:
    """The official spelling of a key; one that means no weight stays as it is, but for the names of
    wrappers."""
    key = WRAPPERS.sub("", key)
    if is_ignored(key):
        return key.replace("_orig_mod", "") if key.startswith(EMA) else key
    for found, official in SPELLINGS.items():
        if key.startswith(found):
            key = official + key.removeprefix(found)
            break
    block, attention, rest = key.partition(".mid.attn_1.")
    layer, _, kind = rest.rpartition(".")
    if block.startswith(VAE) and layer in VAE_ATTENTION:
        return f"{block}{attention}{VAE_ATTENTION[layer]}.{kind}"
    return key


EMA = "model_ema."


def ema_name(official: str) -> str:
    """Where a training run keeps the running mean of a UNet's weight: the dots are left out of the
    name, so that no two names can be told apart but by flattening those that are known."""
    return EMA + official.removeprefix("model.").replace(".", "")


# --- Keys that mean none ---------------------------------------------------------------------

# What training runs and tools leave in a file beside the model. A name that ends in a dot is the
# beginning of keys.
IGNORED = (
    EMA,
    # of PyTorch Lightning
    "optimizer_states.",
    "lr_schedulers.",
    "callbacks.",
    "loops.",
    # of the autoencoder's training: LPIPS, the discriminator, a running mean
    "loss.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    # of variants of the training code, and of programs that merge models
    "logvar",
    "scale_factor",
    "lvlb_weights",
    "embedding_manager.",
    "denoiser.sigmas",
    "denoiser.log_sigmas",
    # markers of what the UNet predicts, and so read before (`ldm.checkpoints.noise`)
    "v_pred",
    "ztsnr",
    "edm_vpred.",
    # of CLIP, beside its text encoder
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection",
    "cond_stage_model.transformer.text_projection.",
    # of OpenCLIP, behind the last block that is run
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.text_projection",
    "cond_stage_model.model.transformer.resblocks.",
)


def is_ignored(key: str) -> bool:
    """Whether a key is known not to matter."""
    return any(key.startswith(name) if name[-1] == "." else key == name for name in IGNORED)


def ignored_in(keys: Iterable[str]) -> dict[str, int]:
    """What a file holds that is known not to matter: first word of the keys -> how many."""
    return dict(Counter(key.split(".")[0] for key in sorted(keys) if is_ignored(key)))


def is_expendable(key: str) -> bool:
    """Whether a model is whole without this key."""
    return key in computed_entries() or is_ignored(key)


def stages_in(keys: Iterable[str]) -> dict[str, int]:
    """Stage -> number of its keys, for the stages that a file has something of."""
    counts = Counter(s for key in keys for s, prefix in PREFIXES.items() if key.startswith(prefix))
    return {stage: counts[stage] for stage in PREFIXES if counts[stage]}
