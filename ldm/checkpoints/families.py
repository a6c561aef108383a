"""Which kind of model a file holds, told by its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.checkpoints.entries import Entry
from ldm.checkpoints.keys import PREFIXES
from ldm.checkpoints.spellings import stages_in
from ldm.config import SD_V1, ModelConfig

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]

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
