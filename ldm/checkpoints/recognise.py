"""What kind of model a file holds, told by its keys and shapes alone.

Files in the wild hold more than a model (optimizer states, losses, a second set of weights), hold a
part of one, or hold another model altogether. Here is what each looks like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ldm.checkpoints.archive import Entry
from ldm.config import SD_V1, ModelConfig
from ldm.checkpoints.keys import PREFIXES

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


def official_name(key: str) -> str:
    """The official spelling of a key; one that means no weight stays as it is."""
    if not is_ignored(key):
        for found, official in SPELLINGS.items():
            if key.startswith(found):
                return official + key.removeprefix(found)
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
    # of CLIP, beside its text encoder
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection",
    "cond_stage_model.transformer.text_projection.",
)


def is_ignored(key: str) -> bool:
    """Whether a key is known not to matter."""
    return any(key.startswith(name) if name[-1] == "." else key == name for name in IGNORED)


def ignored_in(keys: Iterable[str]) -> dict[str, int]:
    """What a file holds that is known not to matter: first word of the keys -> how many."""
    return dict(Counter(key.split(".")[0] for key in sorted(keys) if is_ignored(key)))


# --- Families --------------------------------------------------------------------------------

# Other models, by the beginning of keys that they alone have.
OTHERS = {
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "conditioner.embedders.": "Stable Diffusion XL",
    f"{UNET}label_emb.": "Stable Diffusion XL",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "down_blocks.": "a part of a diffusers folder (pass the folder)",
    f"{VAE}decoder.up_blocks.": "a part of a diffusers folder (pass the folder)",
}
# Additions to a model, by a word in the keys of a file that holds no stage.
ADDITIONS = {
    "lora": "a LoRA, an addition to a model",
    "string_to_param.": "a textual inversion, an addition to a model",
    "emb_params": "a textual inversion, an addition to a model",
}
# Other inputs of the first convolution than the 4 channels of a latent.
OTHER_INPUTS = {
    5: "a depth-to-image model (5 input channels)",
    7: "an upscaler (7 input channels)",
    8: "an instruct-pix2pix model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
# Other widths of the text states that cross-attention reads.
OTHER_CONTEXTS = {
    1024: "Stable Diffusion 2 (text states of width 1024)",
    1280: "the refiner of Stable Diffusion XL (text states of width 1280)",
    2048: "Stable Diffusion XL (text states of width 2048)",
}


def other_family(entries: Mapping[str, Entry], config: ModelConfig = SD_V1) -> str | None:
    """What a file is when it is none of our models; None where nothing speaks against it.

    Args:
        entries: by official keys.
        config: of the model that it should be: a number that is its own speaks not against it.
    """
    for beginning, name in OTHERS.items():
        if any(key.startswith(beginning) for key in entries):
            return name
    if not stages_in(entries):
        for word, name in ADDITIONS.items():
            if any(word in key for key in entries):
                return name
    first = entries.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4 and first.shape[1] != config.unet.in_channels:
        return OTHER_INPUTS.get(first.shape[1])
    keys = [key for key in entries if key.startswith(UNET) and key.endswith("attn2.to_k.weight")]
    widths = {entries[key].shape[-1] for key in keys if entries[key].shape}
    others = widths & OTHER_CONTEXTS.keys() - {config.unet.context_dim}
    return OTHER_CONTEXTS[max(others)] if others else None


def stages_in(keys: Iterable[str]) -> dict[str, int]:
    """Stage -> number of its keys, for the stages that a file has something of."""
    counts = Counter(s for key in keys for s, prefix in PREFIXES.items() if key.startswith(prefix))
    return {stage: counts[stage] for stage in PREFIXES if counts[stage]}


# The first and the last layer of each stage, and how wide they are in Stable Diffusion v1.
SD_V1_SHAPES = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}out.2.weight": (4, 320, 3, 3),
    f"{VAE}encoder.conv_in.weight": (128, 3, 3, 3),
    f"{VAE}decoder.conv_out.weight": (3, 128, 3, 3),
    f"{TEXT}embeddings.token_embedding.weight": (49408, 768),
    f"{TEXT}final_layer_norm.weight": (768,),
}


def is_sd_v1(entries: Mapping[str, Entry]) -> bool:
    """Whether a file holds a stage of Stable Diffusion v1, or of a model just as wide."""
    return any(k in entries and entries[k].shape == shape for k, shape in SD_V1_SHAPES.items())
