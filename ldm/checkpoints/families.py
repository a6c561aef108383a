"""Which kind of model a file holds, told by its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.checkpoints.entries import Entry
from ldm.checkpoints.keys import PREFIXES
from ldm.checkpoints.spellings import stages_in
from ldm.config import SD_V1, SD_V1_INPAINTING, SD_V1_PIX2PIX, SD_V2, ModelConfig

LOADS = "ldm loads Stable Diffusion 1 and 2 models"

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]

TAESD = "3.conv.0.weight"  # a key of TAESD's decoder, which are counted from its first layer
# Other models, by the beginning of keys that they alone have; the first that fits counts.
OTHERS = {
    TAESD: "TAESD, a tiny decoder (load a model, and pass this to ldm.load as vae=)",
    "lora_controlnet": "a control-LoRA, a small ControlNet",
    "control_model.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "zero_convs.": "a ControlNet",
    "controlnet_": "a ControlNet",
    f"{UNET}time_embed.cond_proj.": "a latent consistency model (LCM)",
    "time_embedding.cond_proj.": "a latent consistency model (LCM)",
    "noise_augmentor.": "Stable Diffusion 2.1 unCLIP",
    "embedder.model.": "Stable Diffusion 2.1 unCLIP",
    "depth_model.": "a depth-to-image model",
    "low_scale_model.": "an upscaler",
    "conditioner.embedders.": "Stable Diffusion XL",
    f"{UNET}label_emb.": "Stable Diffusion XL",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "cond_stage_model.model.visual.": "Stable Diffusion 2.1 unCLIP",
    "down_blocks.": "a part of a diffusers folder (pass the folder)",
    f"{VAE}decoder.up_blocks.": "a part of a diffusers folder (pass the folder)",
}
# Additions to a model, by a part of the keys of a file that holds no stage; the first that fits
# counts, since many are trained as a LoRA, or have one in them.
ADDITIONS = {
    "lllite_": "a ControlNet-LLLite",
    "motion_module": "a motion module (AnimateDiff)",
    "temporal_transformer.": "a motion module (AnimateDiff)",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "adapter.body.": "a T2I-Adapter",
    "body.0.block1.": "a T2I-Adapter",
    "body.0.in_conv.": "a T2I-Adapter",
    "oft_unet_": "an OFT",
    ".oft_": "an OFT",
    "hada_w1": "a LoHa, a kind of LoRA",
    "lokr_w1": "a LoKr, a kind of LoRA",
    "lora": "a LoRA",
    "string_to_param.": "a textual inversion",
    "emb_params": "a textual inversion",
}
# How those are loaded that ldm knows.
LOADED_BY = {
    "a LoRA": " (load the model, then pipe.load_lora)",
    "a textual inversion": " (load the model, then pipe.load_embedding)",
}
# The widths of the text states to which a textual inversion adds: those of Stable Diffusion 1, 2
# and XL; and how many tensors it can have.
WORD_WIDTHS, MOST_WORDS = {768, 1024, 1280}, 8
# Other inputs of the first convolution than the 4 channels of a latent.
OTHER_INPUTS = {
    5: "a depth-to-image model (5 input channels)",
    7: "an upscaler (7 input channels)",
    8: "an instruct-pix2pix model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
# Other widths of the text states that cross-attention reads.
OTHER_CONTEXTS = {
    1280: "the refiner of Stable Diffusion XL (text states of width 1280)",
    2048: "Stable Diffusion XL (text states of width 2048)",
}


def other_family(entries: Mapping[str, Entry], config: ModelConfig | None = None) -> str | None:
    """What a file is when it is none of our models; None where nothing speaks against it.

    Args:
        entries: by official keys.
        config: of the model that it should be, by default the official one that it is as wide as: a
            number that is its own speaks not against it.
    """
    config = config or known_config(entries) or SD_V1
    if not stages_in(entries) and (addition := addition_in(entries)):
        how = LOADED_BY.get(addition, "")
        return f"{addition}, an addition to a model{how}"
    for beginning, name in OTHERS.items():
        if any(key.startswith(beginning) for key in entries):
            return name
    first = entries.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and len(first.shape) == 4 and first.shape[1] != config.unet.in_channels:
        return OTHER_INPUTS.get(first.shape[1])
    keys = [key for key in entries if key.startswith(UNET) and key.endswith("attn2.to_k.weight")]
    widths = {entries[key].shape[-1] for key in keys if entries[key].shape}
    others = widths & OTHER_CONTEXTS.keys() - {config.unet.context_dim}
    return OTHER_CONTEXTS[max(others)] if others else None


def addition_in(entries: Mapping[str, Entry]) -> str | None:
    """Which addition to a model a file is that holds no stage of one."""
    for part, name in ADDITIONS.items():
        if any(part in key for key in entries):
            return name
    # diffusers keeps a word as the only tensor, and that under the word itself.
    rows = [e.shape for key, e in entries.items() if "." not in key and 1 <= len(e.shape) <= 2]
    words = [shape for shape in rows if shape[-1] in WORD_WIDTHS]
    return "a textual inversion" if 0 < len(words) == len(entries) <= MOST_WORDS else None


# The first and the last layer of each stage, and how wide they are in Stable Diffusion v1.
SD_V1_SHAPES = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}out.2.weight": (4, 320, 3, 3),
    f"{VAE}encoder.conv_in.weight": (128, 3, 3, 3),
    f"{VAE}decoder.conv_out.weight": (3, 128, 3, 3),
    f"{TEXT}embeddings.token_embedding.weight": (49408, 768),
    f"{TEXT}final_layer_norm.weight": (768,),
}


# What tells Stable Diffusion 2 from it: wider text states.
SD_V2_SHAPES = {
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    f"{TEXT}embeddings.token_embedding.weight": (49408, 1024),
}


def known_config(entries: Mapping[str, Entry]) -> ModelConfig | None:
    """Stable Diffusion's config of the version that a file is as wide as, if any. What the UNet
    predicts, and for which size, is not told by widths: version 2 is there twice."""
    if any(k in entries and entries[k].shape == shape for k, shape in SD_V2_SHAPES.items()):
        return SD_V2
    first = entries.get(f"{UNET}input_blocks.0.0.weight")
    for config in (SD_V1_INPAINTING, SD_V1_PIX2PIX):
        if first is not None and first.shape == (320, config.unet.in_channels, 3, 3):
            return config
    return SD_V1 if is_sd_v1(entries) else None


def is_sd_v1(entries: Mapping[str, Entry]) -> bool:
    """Whether a file holds a stage of Stable Diffusion v1, or of a model just as wide."""
    return any(k in entries and entries[k].shape == shape for k, shape in SD_V1_SHAPES.items())
