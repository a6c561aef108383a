"""The pipeline: from a prompt to pictures, each stage in its place."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoints.tokenizer_files import read_tokenizer, write_tokenizer
from ldm.device import default_dtype
from ldm.pipeline import TextToImage
from ldm.prompts import Reading
from ldm.samplers import SAMPLERS, Step
from ldm.schedule import x0_from_v
from ldm.tokenizer import Tokenizer
from tests.helpers import relative_error, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder: Path, device: str) -> TextToImage:
    return ldm.load(folder, device=device, dtype=torch.float32)


def final_latents(steps: Iterator[Step]) -> torch.Tensor:
    return list(steps)[-1].x_prev


def test_a_prompt_becomes_a_picture_of_the_trained_size(pipe: TextToImage) -> None:
    (image,) = pipe("a red house", steps=2)
    assert image.mode == "RGB"
    assert image.size == (16, 16)
    assert np.asarray(image).std() > 0


def test_height_and_width_may_be_any_multiple_of_the_factor(pipe: TextToImage) -> None:
    (image,) = pipe("a red house", steps=1, height=22, width=34)
    assert image.size == (34, 22)


def test_denoise_and_call_give_the_same_picture(pipe: TextToImage) -> None:
    settings = {"steps": 4, "seed": 3, "eta": 0.5, "num_images": 2}
    called = pipe("a red house", **settings)
    stepped = pipe.decode(final_latents(pipe.denoise("a red house", **settings)))
    assert [a.tobytes() for a in called] == [b.tobytes() for b in stepped]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("ddim", "ddpm")])
def test_every_sampler_draws_and_a_picture_does_not_depend_on_its_batch(
    pipe: TextToImage, sampler: str
) -> None:
    settings = {"steps": 3, "sampler": sampler, "spacing": "linspace", "guidance_scale": 2.0}
    together = final_latents(pipe.denoise("red", seed=7, num_images=2, **settings))
    assert together.isfinite().all()
    for i in range(2):
        alone = final_latents(pipe.denoise("red", seed=7 + i, **settings))
        assert relative_error(together[i : i + 1], alone) <= 1e-5  # as in the other test of this


def test_call_and_denoise_take_the_same_arguments() -> None:
    called = inspect.signature(TextToImage.__call__).parameters
    stepped = inspect.signature(TextToImage.denoise).parameters
    assert list(called.items()) == list(stepped.items())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("batch", [2, 5])
def test_image_i_of_a_batch_is_the_image_made_alone(
    pipe: TextToImage, sampler: str, batch: int
) -> None:
    settings = {"steps": 10, "sampler": sampler} | ({"eta": 1.0} if sampler == "ddim" else {})
    together = final_latents(pipe.denoise("a red house", seed=7, num_images=batch, **settings))
    for i in range(batch):
        alone = final_latents(pipe.denoise("a red house", seed=7 + i, **settings))
        # Rounding may differ with the shape of a matrix product, by about 1e-7 a step.
        assert relative_error(together[i : i + 1], alone) <= 1e-5


def test_a_list_of_prompts_gives_num_images_of_each_in_order(pipe: TextToImage) -> None:
    run = {"steps": 3, "seed": 5}
    together = final_latents(pipe.denoise(["red", "blue"], num_images=2, **run))
    assert together.shape[0] == 4
    alone = final_latents(pipe.denoise("blue", steps=3, seed=5 + 2))
    assert relative_error(together[2:3], alone) <= 1e-5  # as above


def test_each_prompt_moves_away_from_its_own_negative_prompt(pipe: TextToImage) -> None:
    run = {"steps": 3, "seed": 5, "guidance_scale": 3.0}
    together = final_latents(pipe.denoise(["red", "blue"], negative_prompt=["sea", "sky"], **run))
    alone = final_latents(
        pipe.denoise("blue", negative_prompt="sky", **run | {"seed": 6})  # the second's seed
    )
    assert relative_error(together[1:2], alone) <= 1e-5  # as above


def test_seed_prompt_and_guidance_each_change_the_picture(pipe: TextToImage) -> None:
    base = {"prompt": "a red house", "steps": 3, "seed": 0}
    reference = final_latents(pipe.denoise(**base))
    assert torch.equal(reference, final_latents(pipe.denoise(**base)))
    for change in (
        {"seed": 1},
        {"prompt": "blue"},
        {"guidance_scale": 3.0},
        {"negative_prompt": "blue"},
        {"eta": 1.0},
        {"sampler": "ddpm"},
    ):
        changed = final_latents(pipe.denoise(**(base | change)))
        assert relative_error(changed, reference) > 1e-3, change


def test_the_starting_noise_is_the_seeds_own_on_the_cpu(pipe: TextToImage) -> None:
    first = next(pipe.denoise("a red house", steps=2, seed=11, num_images=2))
    for i in range(2):
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(11 + i))
        assert torch.equal(first.x[i].cpu(), noise)


def test_guidance_joins_two_predictions(pipe: TextToImage) -> None:
    step = next(pipe.denoise("a red house", steps=2, guidance_scale=3.0))
    assert step.eps_cond is not None and step.eps_uncond is not None
    expected = step.eps_uncond + 3.0 * (step.eps_cond - step.eps_uncond)
    assert torch.equal(step.eps, expected)
    alone = next(pipe.denoise("a red house", steps=2, guidance_scale=1.0))
    assert alone.eps_cond is None
    assert relative_error(alone.eps, step.eps_cond) <= 1e-5  # another batch size, as above


def test_guidance_on_an_interval_asks_with_the_prompt_alone_outside_of_it(
    pipe: TextToImage,
) -> None:
    run = {"steps": 10, "guidance_scale": 3.0, "seed": 2}
    steps = list(pipe.denoise("a red house", guidance_interval=(300, 701), **run))
    guided = [step.t for step in steps if step.eps_uncond is not None]
    assert guided == [701, 601, 501, 401, 301]
    whole = pipe.denoise("a red house", guidance_interval=(0, 999), **run)
    assert torch.equal(final_latents(whole), final_latents(pipe.denoise("a red house", **run)))


def test_rescaled_guidance_has_the_contrast_of_the_prompts_own_prediction(
    pipe: TextToImage,
) -> None:
    step = next(pipe.denoise("a red house", steps=2, guidance_scale=9.0, guidance_rescale=1.0))
    assert step.eps_cond is not None
    torch.testing.assert_close(step.eps.std(), step.eps_cond.std())


def test_brackets_weigh_words_of_both_prompts_where_asked(pipe: TextToImage) -> None:
    run = {"steps": 2, "guidance_scale": 3.0, "weighting": True}
    step = next(pipe.denoise("a (red:1.5) house", negative_prompt="[night]", **run))
    weighing = Reading(weighting=True)
    contexts = {
        "context": pipe.context(["a (red:1.5) house"], weighing),
        "uncond_context": pipe.context(["[night]"], weighing),
    }
    given = next(pipe.denoise("words", **contexts, steps=2, guidance_scale=3.0))
    assert torch.equal(step.eps, given.eps)
    plain = next(pipe.denoise("a red house", negative_prompt="night", **run))
    text = next(pipe.denoise("(red:1.5)", **(run | {"weighting": False})))
    for other in (plain, text):
        assert relative_error(step.eps, other.eps) > 1e-4


LONG = "a red house" + " by the lake" * 9  # more than 12 tokens


def test_long_prompts_make_contexts_of_one_length(pipe: TextToImage) -> None:
    run = {"steps": 2, "guidance_scale": 3.0, "num_images": 2}
    step = next(pipe.denoise(LONG, long_prompts=True, **run))
    reading = Reading(long_prompts=True)
    chunks = pipe.text.chunks(LONG, reading)
    assert chunks > 2
    context, nothing = pipe.context([LONG], reading), pipe.context([""], reading, chunks)
    assert context.shape == nothing.shape == (1, chunks * 12, 24)
    assert torch.equal(nothing, pipe.context([""]).repeat(1, chunks, 1))
    given = next(pipe.denoise("words", context=context, uncond_context=nothing, **run))
    assert torch.equal(step.eps, given.eps)
    (picture,) = pipe("red", negative_prompt=LONG, long_prompts=True, steps=1)
    assert np.asarray(picture).std() > 0


def test_long_prompts_change_no_prompt_that_fits(pipe: TextToImage) -> None:
    run = {"steps": 2, "seed": 3, "negative_prompt": "night"}
    long, plain = (pipe.denoise("red", long_prompts=asked, **run) for asked in (True, False))
    assert torch.equal(final_latents(long), final_latents(plain))


def test_pictures_of_prompts_of_other_lengths_are_drawn_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch the short one would be given chunks that it has not alone."""
    pipe = ldm.load(folder, device="cpu")
    monkeypatch.setattr(pipe, "context", lambda *_: pytest.fail("work started"))
    context = torch.zeros(1, 12, 24)
    refused = {
        r"must need as many chunks, and these need 1, \d+: draw them apart$": {
            "prompt": ["red", LONG]
        },
        r"^long_prompts: a prompt takes 300 chunks, more than 32$": {"prompt": "1 " * 3000},
        r"pass both context and uncond_context, or none$": {"prompt": "red", "context": context},
    }
    for match, run in refused.items():
        with pytest.raises(ValueError, match=match):
            pipe.denoise(**run, long_prompts=True)


def test_nothing_that_was_yielded_changes_later_and_decoding_changes_no_latent(
    pipe: TextToImage,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in pipe.denoise("a red house", steps=4, eta=1.0):
        for tensor in (step.x, step.eps, step.x0, step.x_prev):
            seen.append((tensor, tensor.clone()))
        pipe.decode(step.x0)
    assert all(torch.equal(now, then) for now, then in seen)
    assert len(seen) == 16


def test_encode_undoes_the_scaling_of_decode(pipe: TextToImage) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    latents = pipe.encode([image, image])
    assert latents.shape == (2, 4, 8, 12)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(pipe.device) / 127.5 - 1
    with torch.no_grad():
        z = pipe.vae.encode(x).mode()
        y = pipe.vae.decode(z)
    assert relative_error(latents[:1], z * 0.18215) <= 1e-5  # one picture, where it was two
    levels = ((y[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1) * 255
    (decoded,) = pipe.decode(latents[:1])
    difference = np.abs(np.asarray(decoded, dtype=np.float32) - levels.cpu().numpy())
    assert difference.max() <= 0.51  # rounded to whole levels, after another order of scaling


BAD = {
    "steps": [0, 1001, -3, 2.5],
    "sampler": ["eula", "", ["ddim"], 1],
    "spacing": ["even", "", ["karras"], 1],
    "height": [0, 15, -16],
    "width": [3],
    "eta": [-0.1, 1.5, float("nan")],
    "guidance_scale": [float("nan"), float("inf"), "7", [7.5], 10**400],
    "guidance_rescale": [-0.1, 1.5, float("nan"), "0.7"],
    "guidance_interval": [5, (5,), (9, 5), (-1, 5), (0, 1000), ("0", "5"), (0, float("nan"))],
    "weighting": [1, None, "yes"],
    "clip_skip": [-1, 2, 1.5, None],
    "long_prompts": [1, None],
    "seed": [-1, 2**63, None, 1.5],
    "num_images": [0, 1.5],
    "prompt": ["", "   ", [], ["a", ""], None, [1]],
    "negative_prompt": [None, ["blurred"]],
    "like": ["novelai", "", ["diffusers"], 1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_bad_arguments_are_refused_at_the_call_in_one_line(
    folder: Path, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ldm.load(folder, device="cpu")
    monkeypatch.setattr(pipe, "context", lambda _: pytest.fail("work started"))
    with pytest.raises(ValueError) as error:
        pipe.denoise(**({"prompt": "a red house"} | {name: value}))
    assert "\n" not in str(error.value)


def test_eta_belongs_to_ddim(folder: Path) -> None:
    with pytest.raises(ValueError, match="eta is a setting of ddim"):
        ldm.load(folder, device="cpu").denoise("a", sampler="ddpm", eta=0.5)


def test_what_a_person_sees_is_encoded(pipe: TextToImage, tmp_path: Path) -> None:
    """Whatever the mode, the file or the array: the same picture gives the same latents."""
    greys = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    image = Image.fromarray(greys).convert("RGB")
    latents = pipe.encode(image)
    turned = Image.Exif()
    turned[0x0112] = 8  # what is stored lies on its side
    deep = Image.fromarray(greys.astype(np.uint16) * 257)
    deep.rotate(-90, expand=True).save(tmp_path / "a.png", exif=turned)
    same = [
        image.convert("RGBA"),
        image.quantize(256),
        image.convert("LA"),
        greys,
        np.asarray(image),
        deep,
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
    ]
    for picture in same:
        assert torch.equal(pipe.encode(picture), latents)
    whole = pipe.encode(same)
    assert whole.shape == (8, 4, 8, 12)
    assert relative_error(whole, latents.expand_as(whole)) <= 1e-5  # another batch size
    white = Image.new("RGB", image.size, "white")
    assert torch.equal(pipe.encode(Image.new("RGBA", image.size)), pipe.encode(white))


REFUSED = {
    "another size": ([Image.new("RGB", (16, 16)), Image.new("RGB", (16, 24))], "16x16, 16x24$"),
    "none": ([], "there are none$"),
    "width": (Image.new("RGB", (15, 16)), "^width must be a positive multiple of 2, not 15"),
    "height": (np.zeros((15, 16, 3), np.uint8), "^height must be a positive multiple of 2, not 15"),
    "numbers": (np.zeros((16, 16, 3)), "an array must be uint8, 0 to 255, of shape"),
    "batch": (np.zeros((2, 16, 16, 3), np.uint8), "for several pictures pass a list$"),
    "mode": (Image.new("F", (16, 16)), "is of mode 'F', which does not say what number is white"),
    "tensor": (torch.zeros(1, 3, 16, 16), "pipe.vae.encode$"),
    "nothing": (None, "not a NoneType$"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_encoded_is_refused_in_one_line(pipe: TextToImage, kind: str) -> None:
    pictures, line = REFUSED[kind]
    with pytest.raises(ValueError, match=line) as error:
        pipe.encode(pictures)
    assert "\n" not in str(error.value)


def test_save_and_load_give_the_same_pictures(pipe: TextToImage, tmp_path: Path) -> None:
    pipe.save(tmp_path / "mine.safetensors")
    again = ldm.load(tmp_path / "mine.safetensors", device=pipe.device, dtype=torch.float32)
    settings = {"steps": 2, "seed": 1}
    assert pipe("a red", **settings)[0].tobytes() == again("a red", **settings)[0].tobytes()


def test_save_refuses_before_writing(pipe: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        pipe.save(tmp_path / "nowhere" / "mine.safetensors")
    other = Tokenizer.train(["something else entirely, in other words"] * 3, 530)
    write_tokenizer(other, tmp_path)
    with pytest.raises(ValueError, match="another model's tokenizer"):
        pipe.save(tmp_path / "mine.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    assert read_tokenizer(tmp_path) == other


def test_to_moves_every_stage_and_reports_it(pipe: TextToImage) -> None:
    moved = pipe.to(dtype=torch.bfloat16)
    assert moved is pipe
    assert pipe.dtype == torch.bfloat16
    for stage in (pipe.unet, pipe.vae, pipe.text):
        assert {p.dtype for p in stage.parameters()} == {torch.bfloat16}
    step = next(pipe.denoise("a red house", steps=2))
    assert step.x_prev.dtype == torch.float32  # the sampler's arithmetic is never halved
    assert pipe("a red house", steps=2)[0].size == (16, 16)


def test_half_precision_stays_near_float32(folder: Path, device: str) -> None:
    def latents(dtype: torch.dtype) -> torch.Tensor:
        pipe = ldm.load(folder, device=device, dtype=dtype)
        return final_latents(pipe.denoise("a red", steps=5, guidance_scale=1.0))

    exact = latents(torch.float32)
    for dtype in [torch.bfloat16] + ([torch.float16] if device == "cuda" else []):
        half = latents(dtype)
        # bfloat16 keeps 8 bits, an error of 0.4% per operation; a random tiny model adds them up.
        assert 0 < relative_error(half, exact) < 0.5


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    for name in ("cuda:99", "warp"):
        with pytest.raises(ValueError, match="device"):
            ldm.load(folder, device=name)
    for load in (ldm.load_unet, ldm.load_vae, ldm.load_text_encoder):
        with pytest.raises(ValueError, match="device"):
            load(folder, device="cuda:99")
    with pytest.raises(ValueError, match="device"):
        ldm.load(folder, device="cpu").to("cuda:99")


@pytest.mark.parametrize("dtype", [torch.int8, "float16", torch.float8_e4m3fn])
def test_a_dtype_that_is_not_floating_point_is_refused(folder: Path, dtype: object) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        ldm.load(folder, device="cpu", dtype=dtype)


def test_load_refuses_a_path_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights"):
        ldm.load(tmp_path / "nothing.safetensors")


def test_load_says_what_to_do_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt"):
        ldm.load(weights)
    shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    assert ldm.load(weights, device="cpu")("red", steps=1)


def test_the_default_dtype_is_half_on_a_gpu_alone() -> None:
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.float16
    assert default_dtype(torch.device("mps")) == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings", [{"eta": 1.0}, {"sampler": "ddpm"}])
def test_a_step_never_waits_for_the_device(
    folder: Path, dtype: torch.dtype, settings: dict
) -> None:
    pipe = ldm.load(folder, device="cuda", dtype=dtype)
    run = pipe.denoise("a red house", steps=4, **settings)
    next(run)  # the first step may set up libraries
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        assert [next(run).index for _ in range(3)] == [1, 2, 3]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert list(run) == []  # here it waits, to look at what came out


def test_a_model_saved_as_one_of_v_is_loaded_and_drawn_by_v(folder: Path, tmp_path: Path) -> None:
    pipe = ldm.load(folder, device="cpu", dtype=torch.float32)
    pipe.config = dataclasses.replace(pipe.config, prediction="v")
    path = tmp_path / "v.safetensors"
    pipe.save(path)
    again = ldm.load(path, device="cpu", dtype=torch.float32)
    assert again.config.prediction == "v"
    step = next(again.denoise("a red house", steps=4, guidance_scale=1.0))
    with torch.no_grad():
        v = again.unet(step.x, torch.tensor([step.t]), again.context(["a red house"]))
    torch.testing.assert_close(step.x0, x0_from_v(step.x, v, step.alpha_bar))
    assert ldm.load(path, device="cpu", prediction="eps").config.prediction == "eps"
