"""A trace: what it keeps is what the run did, and its maps are what the papers' formulas say."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import ldm
from ldm import viz
from ldm.observe.hooks import record
from ldm.observe.maps import Word, daam, group_words, map_size, prompt_to_prompt
from ldm.observe.traces import Trace, trace, trace_run
from ldm.pipeline import TextToImage
from ldm.schedule import noised
from ldm.settings import Settings
from ldm.tokenizer import BOS, EOS
from tests.helpers import pipe_that_reads, relative_error, rng

PROMPT = "a red house, and a bluish house"
SETTINGS = {"steps": 3, "seed": 5, "guidance_scale": 3.0, "height": 20, "width": 12}
CROSS = "*.cross_attention.weights"
# What float16 loses: it keeps 11 bits.
FP16 = dict(rtol=2**-10, atol=1e-6)


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    """A random model with attention at three sizes, of which none is a square."""
    return pipe_that_reads(channel_mult=(1, 2, 2), max_length=16)


@pytest.fixture(scope="module")
def run(pipe: TextToImage) -> Trace:
    return trace(pipe, PROMPT, **SETTINGS)


# --- What is kept --------------------------------------------------------------------------------


def test_a_trace_is_what_denoise_yields(pipe: TextToImage, run: Trace) -> None:
    steps = list(pipe.denoise(PROMPT, **SETTINGS))
    assert len(run) == len(steps) == 3
    assert run.t == tuple(step.t for step in steps) == (667, 334, 1)
    assert run.t_prev == (334, 1, 0)
    assert run.alpha_bar == tuple(pipe.schedule.alpha_bar_at(t) for t in run.t)
    # A sampler can amplify the rounding of the watched attention, 1e-7 a step.
    near = dict(rtol=1e-4, atol=1e-4)
    for name in ("x", "eps", "x0", "eps_cond", "eps_uncond"):
        kept = getattr(run, name)
        assert kept.shape == (3, 4, 10, 6)
        expected = torch.cat([getattr(step, name) for step in steps])
        torch.testing.assert_close(kept, expected, **near)
    assert torch.equal(run.x[:1], steps[0].x)
    torch.testing.assert_close(run.latents, steps[-1].x_prev, **near)
    assert [image.size for image in pipe.decode(run.x0)] == [(12, 20)] * 3
    assert pipe.decode(run.latents)[0].size == (12, 20)


def test_maps_are_the_conditional_weights_averaged_over_heads(
    pipe: TextToImage, run: Trace
) -> None:
    contexts = pipe.context(["", PROMPT])
    for i, t in enumerate(run.t):
        with torch.no_grad(), record(pipe.unet, CROSS) as seen:
            pipe.unet(run.x[i : i + 1].expand(2, -1, -1, -1), torch.tensor([t, t]), contexts)
        assert seen.keys() == run.maps.keys()
        for name, (weights,) in seen.items():
            expected = weights[1].mean(dim=0)  # (places, L)
            kept = run.maps[name][i]
            assert kept.dtype == torch.float16
            torch.testing.assert_close(kept.flatten(0, 1).float(), expected, **FP16)
            ones = torch.ones(kept.shape[:2])
            torch.testing.assert_close(kept.float().sum(dim=-1), ones, rtol=2e-3, atol=0)


def test_maps_lie_as_the_picture_does(pipe: TextToImage, run: Trace) -> None:
    shapes = {name.split(".transformer")[0]: maps.shape for name, maps in run.maps.items()}
    rows_columns = {0: (10, 6), 1: (5, 3), 2: (3, 2)}
    levels = {f"down.{n}.blocks.0": n for n in range(3)} | {"mid": 2}
    levels |= {f"up.{n}.blocks.{i}": n for n in range(3) for i in range(2)}
    assert shapes == {name: (3, *rows_columns[n], 16) for name, n in levels.items()}
    assert run.resolutions == ((10, 6), (5, 3), (3, 2))
    assert len(run.layers()) == 10
    assert set(run.layers(5)) == {name for name, m in run.maps.items() if m.shape[1] == 5}
    # Row after row: a query of the first block, by hand, at one place of the picture.
    layer = pipe.unet.down[0].blocks[0].transformer.cross_attention
    with torch.no_grad(), record(pipe.unet, "down.0.blocks.0.transformer.norm2") as seen:
        x, t = run.x[:1], torch.tensor([run.t[0]])
        pipe.unet(x, t, pipe.context([PROMPT]))
        places = seen["down.0.blocks.0.transformer.norm2"][0][0]  # (60, 16)
        q, k = layer.to_q(places[6 * 7 + 4]), layer.to_k(pipe.context([PROMPT])[0])
    halves = [torch.softmax(k[:, h] @ q[h] / 8**0.5, dim=0) for h in (slice(8), slice(8, 16))]
    kept = run.maps["down.0.blocks.0.transformer.cross_attention.weights"][0, 7, 4]
    torch.testing.assert_close(kept.float(), sum(halves) / 2, **FP16)


def test_on_a_cpu_each_image_of_a_batch_is_recorded_alone(pipe: TextToImage) -> None:
    with record(pipe.unet, CROSS) as together:
        list(pipe.denoise("red", steps=2, seed=3, num_images=2))
    for i in range(2):
        with record(pipe.unet, CROSS) as alone:
            list(pipe.denoise("red", steps=2, seed=3 + i))
        for name, calls in together.items():
            assert [call.shape[0] for call in calls] == [2] * 4  # without and with the prompt
            assert len(alone[name]) == 2 and all(map(torch.equal, calls[i::2], alone[name]))


def test_without_guidance_there_is_one_prediction(pipe: TextToImage) -> None:
    run = trace(pipe, "red", steps=2, guidance_scale=1.0)
    assert run.eps_cond is None and run.eps_uncond is None
    with pytest.raises(ValueError, match="without guidance"):
        _ = run.guidance_norms
    with torch.no_grad(), record(pipe.unet, CROSS) as seen:
        pipe.unet(run.x[:1], torch.tensor([run.t[0]]), pipe.context(["red"]))
    for name, (weights,) in seen.items():
        expected = weights[0].mean(dim=0)
        torch.testing.assert_close(run.maps[name][0].flatten(0, 1).float(), expected, **FP16)


def test_guidance_norms_are_lengths_of_the_difference(run: Trace) -> None:
    for i, norm in enumerate(run.guidance_norms.tolist()):
        squares = ((run.eps_cond[i] - run.eps_uncond[i]) ** 2).sum().item()
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_settings_are_all_that_made_the_run(pipe: TextToImage, run: Trace) -> None:
    assert run.model == "tiny"
    assert run.prompt == PROMPT
    assert run.heads == 2
    assert run.settings == Settings.of(pipe.config, PROMPT, **SETTINGS)
    again = list(pipe.run(run.settings))
    torch.testing.assert_close(run.latents, again[-1].x_prev, rtol=1e-4, atol=1e-4)
    trained = trace(pipe, "red", steps=1)
    assert (trained.settings.height, trained.settings.width) == (16, 16)


def test_a_trace_knows_the_words_without_their_brackets(pipe: TextToImage) -> None:
    run = trace(pipe, "a (red:1.5) house", weighting=True, clip_skip=1, steps=1)
    assert [word.text for word in run.words[1:-1]] == ["a", "red", "house"]
    plain = trace(pipe, "a red house", steps=1)
    assert run.tokens == plain.tokens
    assert not torch.equal(run.attention("red"), plain.attention("red"))


def test_a_trace_of_more_than_one_chunk_is_refused(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = trace(pipe, "red house", long_prompts=True, steps=1).words
    assert [word.text for word in words[1:-1]] == ["red", "house"]
    monkeypatch.setattr(pipe, "context", lambda *_: pytest.fail("work started"))
    with pytest.raises(ValueError, match=r"of one chunk of tokens, and these need 2$"):
        trace(pipe, "1 " * 15, long_prompts=True)


def test_a_trace_is_of_one_picture(pipe: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "context", lambda _: pytest.fail("work started"))
    with pytest.raises(ValueError, match="a trace is of one picture"):
        trace(pipe, ["red", "blue"])
    with pytest.raises(ValueError, match="a trace is of one picture"):
        trace(pipe, "red", num_images=2)
    two = Settings.of(pipe.config, "red", num_images=2)
    with pytest.raises(ValueError, match="a trace is of one picture"):
        trace_run(pipe, two)
    with pytest.raises(ValueError, match="steps must be between"):
        trace(pipe, "red", steps=0)
    with pytest.raises(TypeError, match="stepz"):
        trace(pipe, "red", stepz=3)


def test_hooks_are_gone_after_a_run_that_failed(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.samplers.loop.pair_from", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(pipe, "red", steps=2)
    assert not any(module._forward_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize(
    "settings",
    [{"sampler": "heun"}, {"sampler": "plms"}, {"sampler": "unipc", "guidance_scale": 1}],
)
def test_a_sampler_that_asks_twice_a_step_has_the_maps_of_its_first_call(
    pipe: TextToImage, settings: dict[str, object], tmp_path: Path
) -> None:
    run = trace(pipe, "red", steps=3, **settings)
    assert len(run) == 3 and {len(maps) for maps in run.maps.values()} == {3}
    alone = trace(pipe, "red", steps=3, **settings | {"sampler": "euler"})
    for layer, maps in run.maps.items():  # of the same noise
        assert torch.equal(maps[0], alone.maps[layer][0])
    run.save(tmp_path / "run.trace")
    assert Trace.load(tmp_path / "run.trace").t == run.t


def test_a_trace_may_visit_points_between_two_timesteps(pipe: TextToImage, tmp_path: Path) -> None:
    run = trace(pipe, "red", steps=3, sampler="euler", spacing="karras")
    assert run.t[0] == 999 and run.t[2] == 0 and not float(run.t[1]).is_integer()
    run.save(tmp_path / "run.trace")
    again = Trace.load(tmp_path / "run.trace")
    assert (again.t, again.t_prev, again.alpha_bar) == (run.t, run.t_prev, run.alpha_bar)


def test_a_trace_names_itself(run: Trace) -> None:
    assert repr(run).startswith(f"<Trace of {PROMPT!r} by tiny: 12x20, 3 steps of ddim, guidance")
    assert "words: a red house , and a bluish house;" in repr(run)
    latents, maps = 4 * 10 * 6 * 4, 16 * (3 * 60 + 3 * 15 + 4 * 6) * 2  # bytes, per step
    assert run.nbytes == 3 * (5 * latents + maps) + latents + 20 * 12 * 3 == 39984
    assert "attention layers: 3 at 10x6, 3 at 5x3, 4 at 3x2; 0.04 MB>" in repr(run)


# --- Words ---------------------------------------------------------------------------------------


def words_of(pipe: TextToImage, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
    tokenizer = pipe.text.require_tokenizer()
    ids = tokenizer.pad(tokenizer.encode(prompt), 16)
    return [(word.text, word.tokens) for word in group_words(tokenizer, ids)]


def test_a_trace_from_a_picture_starts_from_it_noised_and_says_so(
    pipe: TextToImage, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (12, 20), (200, 30, 90))
    asked = SETTINGS | {"image": picture, "strength": 0.7}
    run = trace(pipe, PROMPT, **asked)
    assert run.t == (334, 1)
    noise = torch.randn(1, 4, 10, 6, generator=rng(5))
    expected = noised(pipe.encode(picture), noise, run.alpha_bar[0])
    assert relative_error(run.x[:1], expected) <= 1e-5
    assert "12x20, from a picture at strength 0.7, 2 steps of ddim" in repr(run)
    assert run.inputs.keys() == {"image"}
    run.save(tmp_path / "run.safetensors")
    assert Trace.load(tmp_path / "run.safetensors").inputs == run.inputs


def test_a_trace_of_guidance_on_an_interval_keeps_no_halves(
    pipe: TextToImage, tmp_path: Path
) -> None:
    run = trace(pipe, PROMPT, guidance_interval=(300, 400), **SETTINGS)
    assert run.eps_cond is None and run.eps_uncond is None and len(run.eps) == 3
    run.save(tmp_path / "run.safetensors")
    assert Trace.load(tmp_path / "run.safetensors").settings == run.settings


def test_a_trace_of_a_run_that_was_stopped_ends_in_its_clean_estimate(pipe: TextToImage) -> None:
    run = trace(pipe, PROMPT, callback=lambda step, count: step.index < 1, **SETTINGS)
    assert len(run) == 2 and torch.equal(run.latents, run.x0[-1:])
    assert run.inputs == {"callback": None}


def test_a_trace_needs_the_words_that_were_looked_at(pipe: TextToImage) -> None:
    with pytest.raises(ValueError, match="pass the prompt, and no context"):
        trace(pipe, PROMPT, context=pipe.context(["a red house"]), **SETTINGS)


def test_words_are_grouped_from_their_tokens(pipe: TextToImage, run: Trace) -> None:
    expected = [(BOS, (0,)), ("a", (1,)), ("red", (2,)), ("house", (3,)), (",", (4,))]
    expected += [("and", (5,)), ("a", (6,)), ("bluish", (7, 8, 9, 10, 11)), ("house", (12,))]
    expected += [(EOS, (13, 14, 15))]
    assert [(word.text, word.tokens) for word in run.words] == expected
    (strings,) = pipe.text.token_strings(pipe.text.tokenize([PROMPT]))
    assert run.tokens == tuple(strings)
    assert [run.tokens[i] for i in run.word("bluish").tokens] == ["bl", "u", "i", "s", "h</w>"]


def test_words_of_other_scripts_and_cases_read_as_they_are_seen(pipe: TextToImage) -> None:
    assert [text for text, _ in words_of(pipe, "A CAFÉ'S 25")[1:-1]] == [
        "a",
        "café",
        "'s",
        "2",
        "5",
    ]
    assert words_of(pipe, "日")[1] == ("日", (1, 2, 3))


def test_a_prompt_that_is_too_long_ends_where_it_was_cut(pipe: TextToImage) -> None:
    prompt = "a " * 12 + "bluish"
    with pytest.warns(UserWarning, match="too long") as warned:
        run = trace(pipe, prompt, steps=1)
    assert len(warned) == 1
    assert run.words[0].tokens == (0,)
    assert [word.tokens for word in run.words[1:13]] == [(i,) for i in range(1, 13)]
    assert run.words[13].tokens == (13, 14)
    assert run.words[13].text == "blu…"  # which says so wherever it is shown
    assert run.words[-1] == Word(EOS, (15,))


@pytest.mark.parametrize("text", ["bluish", "House", ","])
def test_a_word_that_was_cut_off_is_said_to_be(pipe: TextToImage, text: str) -> None:
    with pytest.warns(UserWarning, match="too long"):
        run = trace(pipe, "a " * 12 + "bluish house, and a sea", steps=1)
    line = (
        f"{text!r} was cut off: the prompt is longer than the 16 tokens that the model reads, "
        "which end with 'blu…'"
    )
    for look in (run.word, run.attention, lambda word: viz.attention(run, word)):
        with pytest.raises(ValueError) as error:
            look(text)
        assert str(error.value) == line
    with pytest.raises(ValueError, match="no word 'red'; it has a, a,"):
        run.word("red")
    assert run.word("blu…").tokens == (13, 14)


def test_a_prompt_that_just_fits_has_no_word_cut_off(pipe: TextToImage) -> None:
    words = words_of(pipe, "a red house " * 4 + "a red")
    assert words[-2:] == [("red", (14,)), (EOS, (15,))]


def test_special_tokens_inside_a_prompt_stand_alone(pipe: TextToImage) -> None:
    assert words_of(pipe, f"red{EOS}blue")[1:4] == [("red", (1,)), (EOS, (2,)), ("blue", (3,))]


def test_a_word_is_found_by_its_text(run: Trace) -> None:
    assert run.word("Red") == Word("red", (2,))
    assert run.word(EOS).tokens == (13, 14, 15)
    with pytest.raises(ValueError, match="says 'house' 2 times: pass one of `words`"):
        run.word("house")
    with pytest.raises(ValueError, match="no word 'blueish'; it has bluish"):
        run.word("blueish")
    with pytest.raises(ValueError, match=r"no word '\?\?'; it has a, red, house, ,, and"):
        run.word("??")


# --- Attention -----------------------------------------------------------------------------------


def test_daam_is_the_sum_over_heads_layers_and_steps_of_upscaled_maps(
    pipe: TextToImage, run: Trace
) -> None:
    """From single heads and steps, each upscaled on its own."""
    expected = torch.zeros(10, 6)
    contexts = pipe.context(["", PROMPT])
    for i, t in enumerate(run.t):
        with torch.no_grad(), record(pipe.unet, CROSS) as seen:
            pipe.unet(run.x[i : i + 1].expand(2, -1, -1, -1), torch.tensor([t, t]), contexts)
        for name, (weights,) in seen.items():
            size = run.maps[name].shape[1:3]
            for head in weights[1]:
                one = head[:, 2].reshape(1, 1, *size)
                expected += F.interpolate(one, (10, 6), mode="bicubic")[0, 0]
    # 60 maps, each rounded to float16 when it was kept.
    torch.testing.assert_close(run.attention("red"), expected, rtol=2e-3, atol=2e-3)


def test_daam_of_constant_maps_is_their_number() -> None:
    maps = [torch.full((5, 2, 3), 0.5), torch.full((5, 4, 6), 0.25)]
    total = daam(maps, heads=8, size=(4, 6))
    torch.testing.assert_close(total, torch.full((4, 6), 8 * 5 * (0.5 + 0.25)))


def test_prompt_to_prompt_is_the_mean_of_one_resolution(run: Trace) -> None:
    layers = [maps for maps in run.maps.values() if maps.shape[1] == 5]
    by_hand = torch.zeros(5, 3)
    for maps in layers:
        for step in maps:
            by_hand += step[..., 2].float()
    red = run.attention("red", method="prompt-to-prompt")
    torch.testing.assert_close(red, by_hand / (3 * len(layers)))  # of 10, 5 and 3 rows
    coarse = run.attention("red", method="prompt-to-prompt", resolution=3)
    assert coarse.shape == (3, 2)
    assert torch.equal(
        prompt_to_prompt([torch.zeros(2, 4, 4), torch.ones(2, 4, 4)]), torch.full((4, 4), 0.5)
    )


def test_prompt_to_prompt_chooses_its_authors_resolution(run: Trace) -> None:
    def chosen(*sizes: int) -> int:
        maps = {f"layer{n}": torch.zeros(3, n, n, 16) for n in sizes}
        one = dataclasses.replace(run, maps=maps)
        return len(one.attention("red", method="prompt-to-prompt"))

    assert chosen(64, 32, 16, 8) == 16  # Stable Diffusion v1
    assert chosen(8, 4) == 8
    assert chosen(4) == 4


def test_attention_of_all_tokens_adds_up(run: Trace) -> None:
    total = sum(
        len(word.tokens) * run.attention(word, method="prompt-to-prompt") for word in run.words
    )
    torch.testing.assert_close(total, torch.ones(5, 3), rtol=2e-3, atol=0)


def test_a_word_of_several_tokens_has_their_mean(run: Trace) -> None:
    tokens = [run.attention(Word("", (i,))) for i in range(7, 12)]
    torch.testing.assert_close(run.attention("bluish"), sum(tokens) / 5)


def test_steps_and_resolutions_can_be_looked_at_alone(run: Trace) -> None:
    steps = [run.attention("red", step=i) for i in range(3)]
    torch.testing.assert_close(sum(steps), run.attention("red"))
    sizes = [run.attention("red", resolution=rows) for rows in (10, 5, 3)]
    assert [size.shape for size in sizes] == [(10, 6)] * 3
    torch.testing.assert_close(sum(sizes), run.attention("red"))
    one = run.attention("red", step=1, resolution=10, method="prompt-to-prompt")
    layers = [maps[1, ..., 2].float() for maps in run.maps.values() if maps.shape[1] == 10]
    torch.testing.assert_close(one, sum(layers) / len(layers))
    assert not torch.equal(steps[0], steps[2])


def test_attention_refuses_what_is_not_there(run: Trace) -> None:
    for arguments, message in (
        ({"word": "blue"}, "no word 'blue'"),
        ({"word": "red", "step": 3}, "step must be between 0 and 2, not 3"),
        ({"word": "red", "step": -1}, "step must be between 0 and 2, not -1"),
        ({"word": "red", "resolution": 16}, "no layer has maps of 16 rows; there are 10, 5, 3"),
        ({"word": "red", "method": "mean"}, "unknown method 'mean': there are daam, prompt-to"),
    ):
        with pytest.raises(ValueError, match=message):
            run.attention(**arguments)


@pytest.mark.parametrize("latent_size", [(64, 64), (64, 96), (7, 5), (1, 9), (2, 1), (1, 1)])
def test_the_size_of_a_map_follows_from_its_number_of_places(latent_size: tuple[int, int]) -> None:
    x = torch.empty(1, 1, *latent_size)
    for _ in range(5):
        assert map_size(x[0].numel(), latent_size) == x.shape[2:]
        x = F.conv2d(x, torch.empty(1, 1, 3, 3), stride=2, padding=1)  # the UNet's Downsample
    with pytest.raises(ValueError, match="no level of latents"):
        map_size(latent_size[0] * latent_size[1] + 1, latent_size)


# --- Files ---------------------------------------------------------------------------------------


def assert_same(a: Trace, b: Trace) -> None:
    for field in dataclasses.fields(Trace):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "maps":
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)
        elif isinstance(left, Tensor):
            assert torch.equal(left, right) and left.dtype == right.dtype
        else:
            assert left == right, field.name


def test_a_trace_comes_back_from_its_file(run: Trace, pipe: TextToImage, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    run.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = Trace.load(path)
    assert_same(again, run)
    assert repr(again) == repr(run)
    assert torch.equal(again.attention("red"), run.attention("red"))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with safe_open(path, "pt") as file:
        ((key, text),) = file.metadata().items()
    assert key == "ldm.trace"
    assert text == json.dumps(json.loads(text), sort_keys=True)

    alone = trace(pipe, "red", steps=1, guidance_scale=1.0)
    alone.save(path)
    assert_same(Trace.load(path), alone)


def test_saving_says_so_when_it_cannot(run: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        run.save(tmp_path / "nowhere" / "run.safetensors")
    path = tmp_path / "run.safetensors"
    run.save(path)
    before = path.read_bytes()
    broken = dataclasses.replace(run, settings=dataclasses.replace(run.settings, seed={1, 2}))
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """The file with its metadata and tensors changed."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["ldm.trace"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(facts, tensors)
    save_file(tensors, path, metadata={"ldm.trace": json.dumps(facts)})


BROKEN = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a trace\n" * 50),
    "foreign": lambda path: save_file({"x": torch.zeros(2)}, path),
    "no json": lambda path: save_file({}, path, metadata={"ldm.trace": "{"}),
    "a long header": lambda path: save_file({}, path, metadata={"ldm.trace": " " * 2**21}),
    "a list": lambda path: save_file({}, path, metadata={"ldm.trace": "[1]"}),
    "no settings": lambda path: rewritten(path, lambda f, t: f.pop("settings")),
    "no prompt": lambda path: rewritten(path, lambda f, t: f["settings"].pop("prompts")),
    "two prompts": lambda path: rewritten(path, lambda f, t: f["settings"]["prompts"].append("a")),
    "unknown fact": lambda path: rewritten(path, lambda f, t: f.update(more=1)),
    "prompt a number": lambda path: rewritten(path, lambda f, t: f["settings"].update(prompts=[1])),
    "tokens numbers": lambda path: rewritten(path, lambda f, t: f.update(tokens=[1] * 16)),
    "too few tokens": lambda path: rewritten(path, lambda f, t: f["tokens"].pop()),
    "too few t": lambda path: rewritten(path, lambda f, t: f["t"].pop()),
    "words a list": lambda path: rewritten(path, lambda f, t: f.update(words=["red"])),
    "deep json": lambda path: save_file({}, path, metadata={"ldm.trace": "[" * 99_999}),
    "words at halves": lambda path: rewritten(
        path, lambda f, t: f["words"][2].update(tokens=[0.5])
    ),
    "words elsewhere": lambda path: rewritten(path, lambda f, t: f["words"][2].update(tokens=[99])),
    "no eps": lambda path: rewritten(path, lambda f, t: t.pop("eps")),
    "unknown tensor": lambda path: rewritten(path, lambda f, t: t.update(more=torch.zeros(1))),
    "other shape": lambda path: rewritten(path, lambda f, t: t.update(x0=torch.zeros(2, 4, 10, 6))),
    "integers": lambda path: rewritten(path, lambda f, t: t.update(x0=t["x0"].int())),
    "no final latents": lambda path: rewritten(path, lambda f, t: t.update(latents=t["x"].clone())),
    "no maps": lambda path: rewritten(
        path, lambda f, t: [t.pop(name) for name in list(t) if name.startswith("maps.")]
    ),
    "maps of fewer steps": lambda path: rewritten(
        path, lambda f, t: t.update({n: m[1:].clone() for n, m in t.items() if n[:5] == "maps."})
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_or_foreign_file_is_refused_in_one_line(
    run: Trace, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    run.save(path)
    BROKEN[kind](path)
    with pytest.raises(ValueError) as error:
        Trace.load(path)
    assert str(error.value).startswith(f"{path} is not a readable trace: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no trace at"):
        Trace.load(tmp_path / "run.safetensors")


# --- The shipped model ---------------------------------------------------------------------------


def test_horizon_can_be_traced() -> None:
    pipe = ldm.load(device="cpu", dtype=torch.float32)
    run = trace(pipe, "a red house on green grass at night", steps=2, seed=1)
    side = pipe.config.image_size // pipe.config.vae.factor
    assert run.model == "horizon"
    assert run.attention("house").shape == (side, side)
    assert run.attention("house").std() > 0
    assert len(run.words) == 2 + 8


def test_a_half_precision_model_is_traced_near_its_own(pipe: TextToImage, run: Trace) -> None:
    half = trace(copy.deepcopy(pipe).to(dtype=torch.bfloat16), PROMPT, **SETTINGS)
    assert half.x.dtype == torch.float32  # the sampler's arithmetic is never halved
    assert {maps.dtype for maps in half.maps.values()} == {torch.float16}
    # bfloat16 keeps 8 bits, an error of 0.4% per operation.
    exact = run.attention("red", step=0)
    assert 0 < relative_error(half.attention("red", step=0), exact) < 0.5
