"""Inputs: a run from a picture, with a mask, with latents, noise, timesteps or contexts of one's
own, watched and stopped; and what does not go together."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.inputs import Inputs, Keywords, asked
from ldm.pipeline import TextToImage
from ldm.presets import COMPVIS, PRESETS
from ldm.samplers import SAMPLERS, Step, Steps, slerp
from ldm.schedule import NoiseSchedule, noised
from ldm.settings import Settings
from tests.helpers import randn, relative_error, rng, tiny_config, tiny_model

CONFIG = tiny_config()
SAME = 1e-5  # rounding differs with the size of a batch, by about 1e-7 a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder: Path, device: str) -> TextToImage:
    return ldm.load(folder, device=device, dtype=torch.float32)


def picture(seed: int = 0, width: int = 16, height: int = 16) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def half_white(width: int = 16, height: int = 16) -> Image.Image:
    """A mask whose right half is redrawn."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def seeds_noise(*seeds: int) -> Tensor:
    return torch.stack([torch.randn(4, 8, 8, generator=rng(seed)) for seed in seeds])


def final(steps: Steps) -> Tensor:
    return list(steps)[-1].x_prev.cpu()


def test_every_keyword_is_a_setting_or_an_input() -> None:
    settings = inspect.signature(Settings.of).parameters.keys() - {"config", "prompt"}
    inputs = {field.name for field in dataclasses.fields(Inputs)}
    assert Keywords.__annotations__.keys() == settings | inputs and not settings & inputs


def test_an_unknown_keyword_is_a_type_error(pipe: TextToImage) -> None:
    with pytest.raises(TypeError, match="stepz"):
        pipe("a red house", stepz=3)


# --- From a picture ----------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "left"), [(1.0, 10), (0.75, 7), (0.3, 3), (0.1, 1)])
def test_a_run_from_a_picture_begins_at_its_share_of_the_grid(
    pipe: TextToImage, strength: float, left: int
) -> None:
    steps = list(pipe.denoise("red", image=picture(), strength=strength, steps=10, seed=3))
    whole = list(pipe.denoise("red", steps=10))
    assert [step.t for step in steps] == [step.t for step in whole][-left:]
    expected = noised(pipe.encode(picture()).cpu(), seeds_noise(3), steps[0].alpha_bar)
    assert relative_error(steps[0].x, expected) <= SAME


def test_without_a_strength_it_is_075_and_with_a_mask_1() -> None:
    image = picture()
    assert asked(CONFIG, "red", {"image": image})[0].strength == 0.75
    assert asked(CONFIG, "red", {"image": image, "mask": half_white()})[0].strength == 1.0
    assert asked(CONFIG, "red", {})[0].strength is None


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_from_a_picture_and_with_a_mask(
    pipe: TextToImage, sampler: str
) -> None:
    run = {"image": picture(), "mask": half_white(), "strength": 0.5, "steps": 6, "seed": 1}
    latents = final(pipe.denoise("red", sampler=sampler, guidance_scale=2.0, **run))
    assert latents.isfinite().all()
    clean = pipe.encode(picture()).cpu()
    assert torch.equal(latents[..., :4], clean[..., :4])
    assert not torch.equal(latents[..., 4:], clean[..., 4:])


def test_image_i_from_a_picture_is_the_image_made_alone(pipe: TextToImage) -> None:
    run = {"mask": half_white(), "strength": 0.6, "steps": 5, "eta": 1.0}
    two = [picture(0), picture(1)]
    together = final(pipe.denoise("red", image=two, num_images=2, seed=7, **run))
    for i in range(2):
        alone = final(pipe.denoise("red", image=two[i], seed=7 + i, **run))
        assert relative_error(together[i : i + 1], alone) <= SAME


def test_compvis_noises_one_timestep_above_where_it_denoises(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/img2img.py: stochastic_encode at index t_enc, decode from those below it."""
    monkeypatch.setitem(PRESETS, "compvis", dataclasses.replace(COMPVIS, noise_device="cpu"))
    run = pipe.denoise("red", image=picture(), strength=0.5, steps=10, seed=3, like="compvis")
    rising = list(range(1, 1001, 100))  # make_ddim_timesteps
    t_enc = int(0.5 * 10)
    steps = list(run)
    assert [step.t for step in steps] == rising[:t_enc][::-1]
    noise = torch.randn(1, 4, 8, 8, generator=rng(3))
    alpha_bar = pipe.schedule.alpha_bar[rising[t_enc]].item()
    expected = noised(pipe.encode(picture()).cpu(), noise, alpha_bar)
    assert relative_error(steps[0].x, expected) <= SAME
    with pytest.raises(ValueError, match=r"CompVis' code fails with strength=1\.0"):
        pipe.denoise("red", image=picture(), strength=1.0, steps=10, like="compvis")


def test_another_size_is_cropped_in_the_middle_if_it_is_to_be(pipe: TextToImage) -> None:
    wide = Image.new("RGB", (32, 16), "red")
    wide.paste(picture(), (8, 0))
    run = {"fit": "crop", "strength": 0.5, "steps": 2, "noise": zeros}
    first = next(pipe.denoise("red", image=wide, **run))
    assert torch.equal(first.x, first.alpha_bar**0.5 * pipe.encode(picture()))
    large = wide.resize((64, 32), Image.Resampling.NEAREST)
    again = next(pipe.denoise("red", image=large, **run))
    assert again.x.shape == first.x.shape


def zeros(k: int, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape)


def test_a_picture_is_drawn_from_by_a_model_of_v_whose_schedule_ends_in_noise(
    pipe: TextToImage,
) -> None:
    schedule = dataclasses.replace(CONFIG.schedule, zero_terminal_snr=True)
    pipe.config = dataclasses.replace(CONFIG, prediction="v", schedule=schedule)
    pipe.schedule = NoiseSchedule(schedule)
    run = {"image": picture(), "mask": half_white(), "steps": 4, "seed": 2}
    steps = list(pipe.denoise("red", **run))
    assert steps[0].alpha_bar == 0.0
    assert torch.equal(steps[0].x.cpu(), seeds_noise(2))  # at a strength of 1 nothing else is left
    clean = pipe.encode(picture()).cpu()
    assert torch.equal(steps[-1].x_prev[..., :4].cpu(), clean[..., :4])


# --- With a mask -------------------------------------------------------------------------------


def test_what_is_kept_is_the_original_noised_to_each_steps_end(pipe: TextToImage) -> None:
    run = {"image": picture(), "mask": half_white(), "steps": 5, "seed": 4, "eta": 0.5}
    clean, noise = pipe.encode(picture()).cpu(), seeds_noise(4)
    steps = list(pipe.denoise("red", **run))
    for step in steps[:-1]:
        kept = noised(clean, noise, step.alpha_bar_prev)[..., :4]
        assert relative_error(step.x_prev[..., :4], kept) <= SAME
    assert torch.equal(steps[-1].x_prev[..., :4].cpu(), clean[..., :4])
    for step, after in itertools.pairwise(steps):
        assert torch.equal(step.x_prev, after.x)


def test_a_white_mask_changes_nothing_but_the_start(pipe: TextToImage) -> None:
    white = Image.new("L", (16, 16), 255)
    run = {"image": picture(), "strength": 0.6, "steps": 5, "seed": 4}
    with_it = final(pipe.denoise("red", mask=white, **run))
    assert torch.equal(with_it, final(pipe.denoise("red", **run)))


def test_a_latent_is_redrawn_if_any_of_its_pixels_is() -> None:
    mask = Image.new("L", (16, 16))
    mask.putpixel((5, 9), 255)
    mask.putpixel((0, 0), 127)  # darker than lighter
    settings, inputs = asked(CONFIG, "red", {"image": picture(), "mask": mask})
    latents = inputs.redrawn(settings, 2)
    assert latents.shape == (1, 1, 8, 8)
    assert latents.nonzero().tolist() == [[0, 0, 4, 2]]


def test_pasted_pixels_are_the_originals(pipe: TextToImage) -> None:
    run = {"image": picture(), "mask": half_white(), "steps": 2}
    (decoded,), (pasted,) = pipe("red", **run), pipe("red", paste_back=True, **run)
    levels, original = np.asarray(pasted), np.asarray(picture())
    assert (levels[:, :8] == original[:, :8]).all()
    assert (levels[:, 8:] == np.asarray(decoded)[:, 8:]).all()
    assert (np.asarray(decoded)[:, :8] != original[:, :8]).any()  # the decoder is not exact


# --- Latents, noise, timesteps, contexts -------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_seeds_noise_as_latents_is_the_seeds_run(pipe: TextToImage, sampler: str) -> None:
    """Each step's noise too: it is never that of the start once more."""
    latents, run = seeds_noise(5, 6), {"seed": 5, "num_images": 2, "steps": 4, "sampler": sampler}
    given = final(pipe.denoise("red", latents=latents, **run))
    assert torch.equal(given, final(pipe.denoise("red", **run)))
    assert torch.equal(latents, seeds_noise(5, 6))


def test_noise_that_is_handed_in_stands_in_the_seeds_place(pipe: TextToImage) -> None:
    generator = rng(8)
    noise = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(4)]
    drawn: list[tuple[int, tuple[int, ...]]] = []

    def kth(k: int, shape: tuple[int, ...]) -> Tensor:
        drawn.append((k, shape))
        return noise[k]

    run = {"sampler": "ddpm", "steps": 4}
    by_seed = final(pipe.denoise("red", seed=8, **run))
    assert torch.equal(final(pipe.denoise("red", noise=noise, **run)), by_seed)
    assert torch.equal(final(pipe.denoise("red", noise=kth, **run)), by_seed)
    assert drawn == [(k, (1, 4, 8, 8)) for k in range(4)]  # ddpm's last step draws none


def test_compvis_needs_no_cuda_where_its_noise_is_handed_in(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"draws its noise on a CUDA device.*pass the noise"):
        pipe.denoise("red", like="compvis", steps=7)
    steps = list(pipe.denoise("red", like="compvis", steps=7, noise=[seeds_noise(1)]))
    assert len(steps) == 8 and torch.equal(steps[0].x.cpu(), seeds_noise(1))


def test_timesteps_are_walked_as_they_are_given(pipe: TextToImage) -> None:
    pairs = [(900, 500), (500, 20), (20, -1)]
    steps = list(pipe.denoise("red", timesteps=pairs))
    assert [(step.t, step.t_prev) for step in steps] == pairs
    same = final(pipe.denoise("red", timesteps=pipe.schedule.ddim_timesteps(5), seed=1))
    assert torch.equal(same, final(pipe.denoise("red", steps=5, seed=1)))
    part = pipe.denoise("red", timesteps=pairs, image=picture(), strength=0.7)
    assert [step.t for step in part] == [500, 20]


def test_contexts_stand_in_the_prompts_place(pipe: TextToImage) -> None:
    contexts = {"context": pipe.context(["blue"]), "uncond_context": pipe.context(["sea"])}
    run = {"steps": 3, "seed": 1, "num_images": 2}
    expected = final(pipe.denoise("blue", negative_prompt="sea", **run))
    assert torch.equal(final(pipe.denoise("any name", **contexts, **run)), expected)
    longer = {name: states.repeat(1, 2, 1) for name, states in contexts.items()}
    assert final(pipe.denoise("any name", **longer, **run)).isfinite().all()


# --- Watched and stopped -----------------------------------------------------------------------


def test_a_callback_is_told_of_every_step(pipe: TextToImage) -> None:
    seen: list[tuple[int, int]] = []
    pipe("red", steps=4, callback=lambda step, count: seen.append((step.index, count)))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_callback_that_says_false_ends_the_run_at_the_clean_estimate(pipe: TextToImage) -> None:
    def until_the_second(step: Step, count: int) -> bool:
        return step.index < 1

    steps = list(pipe.denoise("red", steps=4, callback=until_the_second))
    assert [step.index for step in steps] == [0, 1]
    (image,) = pipe("red", steps=4, callback=until_the_second)
    assert image.tobytes() == pipe.decode(steps[-1].x0)[0].tobytes()
    (whole,) = pipe("red", steps=4, callback=lambda step, count: step.index < 3)
    assert whole.tobytes() == pipe("red", steps=4)[0].tobytes()  # the last step is whole


def test_what_is_sent_passes_a_callback(pipe: TextToImage) -> None:
    run = pipe.denoise("red", steps=3, callback=lambda step, count: None)
    first = next(run)
    assert torch.equal(run.send(torch.zeros_like(first.x)).x, torch.zeros_like(first.x))


# --- Variations --------------------------------------------------------------------------------


def test_a_variation_begins_on_the_way_to_another_seeds_noise(pipe: TextToImage) -> None:
    run = {"steps": 2, "num_images": 2, "variation_seed": 50, "variation_strength": 0.3}
    first = next(pipe.denoise("red", seed=5, **run))
    assert torch.equal(first.x.cpu(), slerp(seeds_noise(5, 6), seeds_noise(50, 51), 0.3))


# --- Back to the noise -------------------------------------------------------------------------


def test_inversion_and_back_is_closer_the_more_steps_there_are(pipe: TextToImage) -> None:
    scaled_down(pipe)
    clean = pipe.encode(picture())
    errors = []
    for count in (10, 40, 160):
        *_, last = pipe.invert(picture(), "red", steps=count)
        assert last.t_prev == pipe.schedule.ddim_timesteps(count)[0][0]
        run = {"sampler": "ddim", "steps": count, "guidance_scale": 1.0}
        again = final(pipe.denoise("red", latents=last.x_prev, **run))
        errors.append(relative_error(again, clean.cpu()))
    print("round trip:", errors)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def scaled_down(pipe: TextToImage) -> None:
    """A random network's flow is too wild to be followed back; a hundredth of it is not."""
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.01)


# --- What is refused ---------------------------------------------------------------------------

IMAGE, MASK, LATENTS = picture(), half_white(), torch.zeros(1, 4, 8, 8)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "latents and image": ({"image": IMAGE, "latents": LATENTS}, "pass one of them"),
    "mask alone": ({"mask": MASK}, "pass image too"),
    "strength alone": ({"strength": 0.5}, "strength is of a picture"),
    "fit alone": ({"fit": "crop"}, "fit is of a picture"),
    "paste_back alone": (
        {"paste_back": True, "image": IMAGE},
        "paste_back is of what a mask keeps",
    ),
    "no step": ({"image": IMAGE, "strength": 0.05, "steps": 10}, "leaves none: 0.1 is one"),
    "no strength": ({"image": IMAGE, "strength": 0.0}, "strength must be above 0"),
    "too strong": ({"image": IMAGE, "strength": 1.5}, "strength must be above 0 and at most 1"),
    "size": ({"image": picture(width=20)}, "image is 20x16, and the run draws 16x16"),
    "size of the mask": ({"image": IMAGE, "mask": half_white(20)}, "mask is 20x16"),
    "fit": ({"image": picture(width=20), "fit": "pad"}, "unknown fit 'pad'"),
    "two for three": ({"image": [IMAGE, IMAGE], "num_images": 3}, "2 pictures for a run of 3"),
    "none": ({"image": []}, "an empty list"),
    "no picture": ({"image": 5}, "not a int"),
    "black mask": ({"image": IMAGE, "mask": Image.new("L", (16, 16))}, "nothing of the mask"),
    "latents' shape": ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents must be .* \(1, 4, 8, 8\)"),
    "latents' kind": ({"latents": IMAGE}, "not Image"),
    "whole latents": ({"latents": LATENTS.long()}, "int64"),
    "noise": ({"noise": LATENTS}, "noise must be a list"),
    "noise's shape": ({"noise": [torch.zeros(4, 8, 8)]}, "noise 0 must be"),
    "too little noise": ({"noise": [LATENTS], "eta": 1.0, "steps": 3}, "draws noise 4 times"),
    "context": ({"context": torch.zeros(1, 5, 24)}, "context must be"),
    "two negatives": (
        {"uncond_context": torch.zeros(1, 12, 24), "negative_prompt": "sea"},
        "pass one of them",
    ),
    "timesteps and steps": ({"timesteps": [(5, 0)], "steps": 1}, "leave out steps"),
    "timesteps and spacing": ({"timesteps": [(5, 0)], "spacing": "karras"}, "leave out spacing"),
    "no timesteps": ({"timesteps": []}, "steps must be between 1"),
    "rising timesteps": ({"timesteps": [(5, 9)]}, "must be falling"),
    "timesteps": ({"timesteps": [5, 4]}, "must be pairs"),
    "callback": ({"callback": True}, "callback must be a function"),
    "half a variation": ({"variation_seed": 3}, "a variation needs both"),
    "the other half": ({"variation_strength": 0.3}, "a variation needs both"),
    "variation of latents": (
        {"variation_seed": 3, "variation_strength": 0.3, "latents": LATENTS},
        "not of latents",
    ),
    "plms there": ({"image": IMAGE, "sampler": "plms", "like": "diffusers"}, "no plms"),
    "eta": ({"image": IMAGE, "sampler": "euler", "eta": 0.5}, "eta is a setting of ddim"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_go_together_is_refused_at_the_call_in_one_line(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords, line = REFUSED[kind]
    pipe = ldm.load(folder, device="cpu")
    for stage in ("context", "posterior"):
        monkeypatch.setattr(pipe, stage, lambda _: pytest.fail("work started"))
    with pytest.raises(ValueError, match=line) as error:
        pipe.denoise("a red house", **keywords)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_not_there_is_refused(pipe: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture at"):
        pipe.denoise("red", image=tmp_path / "nothing.png")


def test_a_run_checks_inputs_that_were_made_for_other_settings(pipe: TextToImage) -> None:
    _, inputs = asked(CONFIG, "red", {"image": picture()})
    with pytest.raises(ValueError, match="needs a strength"):
        pipe.run(Settings.of(CONFIG, "red"), inputs)


# --- Told for the record -----------------------------------------------------------------------


def test_what_was_given_is_told_by_shape_and_hash(tmp_path: Path) -> None:
    picture(1, width=20).save(tmp_path / "a.png")
    _, inputs = asked(
        CONFIG, "red", {"image": str(tmp_path / "a.png"), "mask": half_white(), "fit": "crop"}
    )
    told = inputs.held()
    assert told.keys() == {"image", "mask"} and told["image"] is not None
    assert told["image"].shape == (16, 20, 3)  # before it is cropped
    assert told["image"].sha256 == hashlib.sha256(np.asarray(picture(1, width=20))).hexdigest()
    assert told["mask"] is not None and told["mask"].shape == (16, 16)
    assert Inputs().held() == {}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: {"latents": torch.zeros(1, 4, 8, 8)}, (1, 4, 8, 8)),
        (lambda: {"noise": [torch.zeros(1, 4, 8, 8)] * 2}, (2, 1, 4, 8, 8)),
        (lambda: {"timesteps": [(900, 0.5), (0.5, -1)]}, (2, 2)),
        (lambda: {"context": randn(1, 12, 24)}, (1, 12, 24)),
        (lambda: {"image": [picture(0), picture(1)], "num_images": 2}, (2, 16, 16, 3)),
    ],
    ids=["latents", "noise", "timesteps", "context", "image"],
)
def test_the_same_input_has_the_same_hash(
    make: Callable[[], Keywords], shape: tuple[int, ...]
) -> None:
    first, second = (asked(CONFIG, "red", make())[1].held() for _ in range(2))
    assert first == second
    (one, *_) = first.values()
    assert one is not None and one.shape == shape and len(one.sha256) == 64


def test_a_function_cannot_be_told() -> None:
    keywords: Keywords = {"noise": zeros, "callback": lambda step, count: None}
    assert asked(CONFIG, "red", keywords)[1].held() == {"noise": None, "callback": None}
