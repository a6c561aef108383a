"""No silent black picture: which part of a model made the first number that is none.

NaN and infinity pass on through all that comes after them, and what was to be a picture is black.
So a run that ends in them says where they came from, and a decoder too: the work is done once more,
with a hook on every part, up to the first that gives something else than finite numbers. Where all
is well that costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.attention import AttentionWeights
from ldm.errors import DivergedError
from ldm.observe.hooks import OfThisThread, eagerly, find_parts
from ldm.samplers import EpsFn, Steps
from ldm.samplers.loop import predict
from ldm.samplers.soundness import ailment, is_sound
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, TinyDecoder


def explained(
    steps: Steps,
    *,
    text: CLIPTextEncoder,
    encode: Callable[[], object],
    unet: UNet,
    eps_fn: EpsFn,
    guidance_scale: float,
) -> Steps:
    """The same steps; where they diverge, the error also says which part of which stage began it.

    Args:
        steps: of a sampler that asks `eps_fn`, which asks `unet`.
        encode: makes the run's contexts once more, with `text`.
        guidance_scale: to be named where the model's own numbers are finite.
    """
    try:
        yield from steps
    except DivergedError as error:
        x, t = error.x, error.t
        if x is None or t is None:  # the run was given no latents to begin with
            raise
        cause = (
            first_to_fail("the text encoder", text, encode)
            or first_to_fail("the unet", unet, lambda: predict(eps_fn, x, t))
            or "what the model says there is finite: is "
            f"guidance_scale={guidance_scale:g} what you mean?"
        )
        raise DivergedError(f"{error}; {cause}", t=t, x=x) from error


def decoded(vae: AutoencoderKL, latents: Tensor) -> Iterator[Tensor]:
    """The pictures of scaled latents (B, C, h, w), one by one: (1, 3, H, W) each, finite float32.

    Where a decoder overflows in float16, as that of Stable Diffusion v1 is known to do, the picture
    is decoded once more in float32. A warning says so, once.

    Raises:
        DivergedError: latents are not sound, or what the decoder makes of them is not finite.
    """
    wide: AutoencoderKL | None = None
    for z in latents.to(vae.post_quant_conv.weight.device)[:, None]:  # (1, C, h, w)
        y = decode(vae, z)
        # Here a GPU is waited for, as it is anyway by all who want to see the picture.
        if is_sound(z) & y.isfinite().all():
            yield y
            continue
        if not is_sound(z):
            raise DivergedError(f"latents cannot be decoded: they hold {ailment(z)}")
        said, model = wide is not None, wide or vae
        if vae.post_quant_conv.weight.dtype == torch.float16:
            model = wide = wide or copy.deepcopy(vae).float()
            y = decode(wide, z)
        if not y.isfinite().all():
            cause = first_to_fail("the decoder", model, functools.partial(decode, model, z))
            raise DivergedError("; ".join(filter(None, [f"the picture holds {ailment(y)}", cause])))
        if not said:
            warnings.warn(
                "the decoder overflowed in float16: pictures are decoded once more, in float32; "
                "with dtype=torch.bfloat16 that need not be",
                stacklevel=4,
            )
        yield y


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """The pictures of scaled latents, computed in the decoder's precision, as float32."""
    z = z.to(vae.post_quant_conv.weight)
    return vae.decode(z / vae.config.scaling_factor).float()


def decoded_roughly(tiny: TinyDecoder, latents: Tensor) -> Iterator[Tensor]:
    """The same by a tiny decoder, in its own precision.

    Raises:
        DivergedError: latents are not sound, or what is made of them is not finite.
    """
    for z in latents.to(next(tiny.parameters()))[:, None]:  # (1, C, h, w)
        y = 2 * tiny(z).float() - 1  # (1, 3, H, W)
        if not is_sound(z):
            raise DivergedError(f"latents cannot be decoded: they hold {ailment(z)}")
        if not y.isfinite().all():
            raise DivergedError(f"the picture holds {ailment(y)}")
        yield y


class _Found(Exception):
    """Ends a search."""


@torch.no_grad()
def first_to_fail(stage: str, model: nn.Module, run: Callable[[], object]) -> str | None:
    """Which part of a stage makes the first number that is none when `run` asks it once more: a
    phrase for a message, or None if no part does.

    Parts end from the inside out, so the first that ends badly is the smallest. Where what it was
    given was bad already, the sums between two parts went wrong: then it is the part around them.
    """

    def watch(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
            if not is_finite(value):
                around = name.rpartition(".")[0] or "what goes into it"
                raise _Found((name if is_finite((args, kwargs)) else around) + bad_weight(part))

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(eagerly())
        for name, part in find_parts(model, ["*"]).items():
            # Attention whose weights are watched is computed otherwise, and takes much memory.
            if not isinstance(part, AttentionWeights):
                hook = OfThisThread(watch(name))
                handle = part.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        try:
            run()
        except _Found as found:
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            line = f"in {stage} ({dtype}) it begins with {found}"
            # The largest number of half precision is soon reached.
            return (
                f"{line}; float16 ends at 65504, bfloat16 does not" if dtype == "float16" else line
            )
    return None


def bad_weight(part: nn.Module) -> str:
    """Which of a part's own weights is not finite, for a message; nothing if they all are."""
    bad = {n: w for n, w in part.named_parameters(recurse=False) if not w.isfinite().all()}
    return "".join(f", whose {name} holds {ailment(bad[name])}" for name in list(bad)[:1])


def is_finite(value: Any) -> bool:
    """Whether all numbers are finite, of tensors in whatever they are packed in."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return is_finite(tuple(value.values()))
    return not isinstance(value, tuple | list) or all(is_finite(one) for one in value)
