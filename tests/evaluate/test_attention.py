"""Where words look: how maps become masks, what luck gets, the bootstrap, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ldm
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.cli import main as cli
from ldm.evaluate import attention
from ldm.evaluate.attention import (
    NAMES,
    PLACE,
    SIDES,
    Looks,
    Overlap,
    bootstrap_interval,
    coverage,
    evaluate_attention,
    joint_rows,
    layer_rows,
    mentions,
    most_covered,
    overlaps,
    own_and_others,
    pairwise_iou,
    resamples,
    summed_up,
    told_scenes,
    watch,
)
from ldm.observe.maps import Word, daam, group_words, prompt_to_prompt
from ldm.worlds.batches import OBJECTS, pictures
from ldm.worlds.scenes import Scene
from tests.helpers import randn, random_checkpoint, rng, tiny_config, tiny_tokenizer

# -------------------------------------------------------------------------------- maps to masks


def test_a_map_is_cut_to_the_area_of_the_mask_it_is_held_against() -> None:
    maps = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    # Map 0 cut to two places is mask 0, cut to one it misses mask 1; map 1 cut to one is mask 1.
    assert pairwise_iou(maps, masks).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_iou_is_shared_places_over_all_that_either_has() -> None:
    maps = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    masks = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool
    )
    # Three places against three: all, two or one of them shared.
    assert pairwise_iou(maps, masks)[0] == pytest.approx([3 / 3, 2 / 4, 1 / 5])


def test_only_the_order_of_a_maps_places_counts() -> None:
    maps, masks = randn(5, 16), randn(5, 16, seed=1) > 0.5
    assert np.array_equal(pairwise_iou(maps, masks), pairwise_iou(7 * maps - 3, masks))
    assert not np.array_equal(pairwise_iou(maps, masks), pairwise_iou(-maps, masks))


def test_others_are_all_but_a_maps_own() -> None:
    own, others = own_and_others(np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4], [0.0, 0.0, 0.7]]))
    assert own.tolist() == [0.9, 0.8, 0.7]
    assert others == pytest.approx([0.2, 0.3, 0.0])


def test_a_mask_becomes_as_many_places_as_its_area_those_it_covers_most() -> None:
    masks = torch.zeros(3, 8, 8)
    masks[0, :4, :4] = 1  # exactly four places of 2 x 2 pixels
    masks[1, 0, 0] = 1  # a quarter of one place: still one
    masks[2, 2:5, 2:4] = 1  # one place whole and half of the next: 1.5, rounded to even
    places = most_covered(coverage(masks, (4, 4))).view(3, 4, 4)
    assert torch.equal(places[0].nonzero(), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    assert places[1].nonzero().tolist() == [[0, 0]]
    assert places[2].nonzero().tolist() == [[1, 1], [2, 1]]


# -------------------------------------------------------------------------------------- overlap


def boxes(n: int = 24) -> Tensor:
    """Masks (n, 16, 16) of boxes of different places and sizes."""
    draw = np.random.default_rng(0)
    masks = torch.zeros(n, 16, 16)
    for mask in masks:
        height, width = draw.integers(2, 8, size=2)
        top, left = draw.integers(16 - height), draw.integers(16 - width)
        mask[top : top + height, left : left + width] = 1
    return masks


def looks_of(maps: Tensor, masks: Tensor, steps: int = 3) -> Looks:
    """Layers of 8 x 8 and 4 x 4 that show `maps` (n, 16, 16) at every step."""
    small = {
        f"layer{size}": torch.nn.functional.adaptive_avg_pool2d(maps[:, None], size).expand(
            -1, steps, -1, -1
        )
        for size in (8, 4)
    }
    return Looks(small, masks, (16, 16))


def test_maps_that_equal_their_masks_are_perfect_and_better_than_luck() -> None:
    masks = boxes()
    found = overlaps(looks_of(masks, masks), [100, 500, 900], seed=0)
    assert found.scenes == 24
    assert found.mean.own == pytest.approx(1.0) and found.mean.others < 0.5
    assert found.mean.ratio == pytest.approx(found.best) and found.mean.points
    assert list(found.table) == [
        *("layer8 (8x8)", "layer4 (4x4)"),
        *("all of 8x8", "all of 4x4", "all, upscaled to 16x16"),
    ]
    for row, cells in found.table.items():
        assert list(cells) == ["t = 100", "t = 500", "t = 900", "all t"]
        for cell in cells.values():
            # Upscaling rounds corners off; at its own size a map can be exactly right.
            assert cell.own == pytest.approx(1.0) if "upscaled" not in row else cell.own > 0.6
            assert cell.points and cell.low <= cell.own - cell.others <= cell.high


def test_maps_of_other_scenes_do_not_point() -> None:
    masks = boxes()
    found = overlaps(looks_of(masks.roll(1, dims=0), masks), [1, 2, 3], seed=0)
    assert found.mean.own < 0.3 and not found.mean.points
    # A map that is the same for every scene knows no more of its own than of the others'.
    same = overlaps(looks_of(masks.mean(dim=0).expand_as(masks), masks), [1, 2, 3], seed=0)
    assert same.mean.own == pytest.approx(same.mean.others, rel=0.2) and not same.mean.points
    assert same.mean.low < 0 < same.mean.high


def test_the_mean_is_over_single_layers_and_timesteps() -> None:
    masks = boxes()
    right = looks_of(masks, masks, steps=2)
    wrong = looks_of(masks.roll(1, dims=0), masks, steps=2)
    mixed = Looks(
        {"layer8": torch.stack([right.maps["layer8"][:, 0], wrong.maps["layer8"][:, 1]], 1)},
        masks,
        (16, 16),
    )
    found = overlaps(mixed, [1, 2], seed=0)
    cells = found.table["layer8 (8x8)"]
    expected = (cells["t = 1"].own + cells["t = 2"].own) / 2
    assert cells["t = 1"].own == pytest.approx(1.0)
    assert cells["t = 2"].own < 0.5
    assert found.mean.own == pytest.approx(expected)
    assert cells["all t"].own != pytest.approx(expected)  # that one is of the mean map


def test_where_a_word_points_best_is_chosen_on_other_scenes_than_it_is_measured_on() -> None:
    masks = boxes()
    right, wrong = looks_of(masks, masks), looks_of(masks.roll(1, dims=0), masks)
    maps = {layer: m.clone() for layer, m in wrong.maps.items()}
    maps["layer8"][:, 2] = right.maps["layer8"][:, 2]
    found = overlaps(Looks(maps, masks, (16, 16)), [1, 2, 3], seed=0).sharpest
    assert (found.layer, found.timestep, found.scenes) == ("layer8 (8x8)", "t = 3", 12)
    assert found.overlap.own == pytest.approx(1.0) and found.overlap.points

    maps["layer4"][::2, 0] = right.maps["layer4"][::2, 0]  # right on the scenes that choose...
    maps["layer8"][::2, 2] = wrong.maps["layer8"][::2, 2]
    lucky = overlaps(Looks(maps, masks, (16, 16)), [1, 2, 3], seed=0).sharpest
    assert (lucky.layer, lucky.timestep) == ("layer4 (4x4)", "t = 1")
    assert lucky.overlap.own < 0.3 and not lucky.overlap.points  # ... and on no others


def test_joint_maps_are_those_of_the_papers() -> None:
    maps = {
        "a": randn(2, 5, 8, 8).abs(),
        "b": randn(2, 5, 4, 4, seed=1).abs(),
        "c": randn(2, 5, 8, 8, seed=2).abs(),
    }
    looks = Looks(maps, boxes(2), (16, 16))
    rows = joint_rows(looks)
    assert list(layer_rows(looks)) == ["a (8x8)", "b (4x4)", "c (8x8)"]
    for i in range(2):
        one_size = prompt_to_prompt([maps["a"][i], maps["c"][i]])
        assert torch.allclose(rows["all of 8x8"][i].mean(dim=0), one_size, atol=1e-6)
        everything = daam([m[i] for m in maps.values()], heads=1, size=(16, 16))
        assert torch.allclose(rows["all, upscaled to 16x16"][i].sum(dim=0), everything, atol=1e-5)


# ------------------------------------------------------------------------------------ bootstrap


def test_the_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(0.3, 2.0, size=2000)
    low, high = bootstrap_interval(values, resamples(2000, np.random.default_rng(2)))
    error = values.std() / math.sqrt(2000)
    # Percentiles of 2000 resamples: the standard error of either is about 0.06 of `error`.
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(3)
    counts = resamples(60, draw)
    repeats, inside = 400, 0
    for _ in range(repeats):
        low, high = bootstrap_interval(draw.exponential(1.0, size=60), counts)
        inside += low <= 1.0 <= high
    # 95%, a little less for few and skewed values; four standard deviations of the count are 4%.
    assert 0.88 <= inside / repeats <= 0.99


def test_maps_that_know_nothing_seldom_seem_to() -> None:
    masks = most_covered(coverage(boxes(30), (8, 8)))
    draw, false_alarms = np.random.default_rng(4), 0
    for repeat in range(200):
        pair = own_and_others(pairwise_iou(randn(30, 64, seed=repeat), masks))
        false_alarms += summed_up(*pair, resamples(30, draw)).low > 0
    assert false_alarms <= 0.08 * 200  # 2.5% by right


def test_pointing_takes_the_ratio_and_a_sure_difference() -> None:
    assert Overlap(0.75, 0.5, 0.01, 0.4).points
    assert not Overlap(0.74, 0.5, 0.01, 0.4).points
    assert not Overlap(0.75, 0.5, 0.0, 0.4).points
    assert Overlap(0.5, 0.2, 0.1, 0.4).ratio == pytest.approx(2.5)
    nothing = Overlap(0.0, 0.0, 0.0, 0.0)
    assert math.isnan(nothing.ratio) and not nothing.points
    assert nothing.as_dict()["ratio"] is None


# --------------------------------------------------------------------------------------- scenes


def test_scenes_are_fresh_and_show_every_object_often_enough() -> None:
    told = told_scenes(12, seed=0)
    assert told == told_scenes(12, seed=0) != told_scenes(12, seed=1)
    shown = [set(scene.masks(64)) for scene, _ in told]
    for thing in OBJECTS:
        assert sum(thing in names for names in shown) >= 12, thing
    assert not any(scene.held_out for scene, _ in told)


def words_of(caption: str) -> list[Word]:
    """The caption's words, a token each, commas apart as the tokenizer has them."""
    texts = caption.replace(",", " ,").split()
    return [Word("<start>", (0,)), *(Word(text, (i + 1,)) for i, text in enumerate(texts))]


def test_captions_name_all_that_is_there_and_where() -> None:
    for scene, caption in told_scenes(25, seed=2):
        words = words_of(caption)
        found = mentions(words)
        assert {"ground", "sky"} <= found.keys(), caption
        sides = {
            "house": scene.house_position,
            "tree": scene.tree,
            "moon" if scene.sky == "night" else "sun": scene.light,
        }
        there = {thing for thing, side in sides.items() if side != "none"}
        assert there == found.keys() & set(OBJECTS), caption
        for thing in there:
            (noun,), place = found[thing], found[thing + PLACE]
            assert words[noun].text == thing and place[0] == noun
            last = words[place[-1]].text
            side = sides[thing]
            assert last in ({"left": "left", "right": "right"}.get(side) or SIDES), caption


def test_a_mention_has_the_tokens_of_its_words() -> None:
    words = [
        *(Word("<start>", (0,)), Word("a", (1,)), Word("tree", (2, 3)), Word("on", (4,))),
        *(Word("the", (5,)), Word("left", (6, 7)), Word("and", (8,)), Word("snow", (9,))),
        *(Word("snow", (10,)), Word("<end>", (11, 12))),
    ]
    found = mentions(words)
    assert found == {"tree": (2, 3), "tree + place": (2, 3, 4, 5, 6, 7), "ground": (9, 10)}
    assert mentions(words[:3]) == {"tree": (2, 3)}  # without a side there is no phrase


# ---------------------------------------------------------------------------- a model and command


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model that reads whole captions: its tokens are mostly single bytes."""
    folder = tmp_path_factory.mktemp("model")
    tiny = tiny_config()
    config = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, max_length=200))
    write_tokenizer(tiny_tokenizer(), folder)
    random_checkpoint(folder / "model.safetensors", config)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def pipe(weights: Path) -> ldm.TextToImage:
    return ldm.load(weights, device="cpu", dtype=torch.float32)


@torch.no_grad()
def test_maps_are_those_of_one_denoising_step(pipe: ldm.TextToImage) -> None:
    told = told_scenes(1, seed=0)
    times = [100, 700]
    looks = watch(pipe, told, times, seed=5, batch_size=2)
    scene, caption = told[0]
    layer = "mid.transformer.cross_attention.weights"

    size = pipe.config.image_size
    z = pipe.vae.encode(pictures([s for s, _ in told[:2]], size)).mode()
    x0 = z * pipe.config.vae.scaling_factor
    noise = torch.randn(x0.shape, generator=rng(5))
    context = pipe.text([text for _, text in told[:2]])
    with ldm.record(pipe.unet, layer) as recorded:
        for time in times:
            t = torch.tensor([time, time])
            pipe.unet(pipe.schedule.add_noise(x0, noise, t), t, context)
    weights = torch.stack([calls[0] for calls in recorded[layer]])  # (T, heads, 16, L)

    tokenizer = pipe.text.require_tokenizer()
    found = mentions(group_words(tokenizer, pipe.text.tokenize([caption])[0].tolist()))
    masks = scene.masks(size)
    name = next(name for name in found if name.endswith(PLACE))
    tokens = list(found[name])
    assert len(tokens) > 1
    expected = weights[..., tokens].mean(dim=(1, 3)).view(2, 4, 4)
    assert torch.allclose(looks[name].maps["mid"][0], expected, atol=1e-6)
    assert not torch.allclose(expected[0], expected[1], atol=1e-6)
    mask = torch.from_numpy(masks[name.removesuffix(PLACE)]).float()
    assert torch.equal(looks[name].masks[0], mask)
    assert looks[name].latent_size == (8, 8)


def test_a_thing_that_is_hidden_is_not_looked_for(
    pipe: ldm.TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = told_scenes(2, seed=0)
    shown = Scene.masks
    everything = watch(pipe, told, [500], seed=0)
    assert "house" in everything

    def without_house(scene: Scene, size: int) -> dict[str, np.ndarray]:
        return shown(scene, size) | {"house": np.zeros((size, size), bool)}

    monkeypatch.setattr(Scene, "masks", without_house)
    rest = watch(pipe, told, [500], seed=0)
    assert everything.keys() - rest.keys() == {"house", "house" + PLACE}


def test_nothing_to_compare_with_is_said(
    pipe: ldm.TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "told_scenes", lambda per_object, seed: told_scenes(1, seed)[:1])
    with pytest.raises(ValueError, match="nothing to compare"):
        evaluate_attention(pipe, per_value=1)


def test_the_command_prints_the_table_and_json(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", "--attention", "--weights", str(weights), "--per-value", "2"]
    assert cli.main([*args, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "| words | scenes | IoU | with others | ratio | best |" in text
    assert "tree + place, by layer and timestep (own / others):" in text
    assert "| layer | t = 100 | t = 300 | t = 500 | t = 700 | t = 900 | all t |" in text

    assert cli.main([*args, "--device", "cpu", "--json"]) == 0
    results = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert set(results["words"]) <= {name + end for name in NAMES for end in ("", PLACE)}
    tree = results["words"]["tree"]
    assert tree["scenes"] >= 2 and 0 <= tree["mean"]["own"] <= 1
    there = tree["sharpest"]
    assert f"| tree | {there['layer']} | {there['timestep']} | {there['scenes']} | " in text
    line = f"| tree | {tree['scenes']} | {tree['mean']['own']:.3f} | {tree['mean']['others']:.3f} |"
    assert line in text
    cells = tree["table"]["mid (4x4)"]
    assert cells.keys() == {"t = 100", "t = 300", "t = 500", "t = 700", "t = 900", "all t"}
    assert f"{cells['all t']['own']:.2f} / {cells['all t']['others']:.2f}" in text


@pytest.mark.parametrize("option", [["--steps", "3"], ["--sampler", "ddpm"]])
def test_settings_of_drawing_are_refused(
    option: list[str], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--attention", "--weights", str(weights), *option]) == 2
    line = f"ldm: leave out {option[0]}: --attention has its own, or none\n"
    assert capsys.readouterr().err == line
