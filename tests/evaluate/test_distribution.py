"""Pictures held against the law: a perfect model passes, and every planted fault is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from ldm.evaluate.distribution import (
    KINDS,
    NUMBERS,
    TOUCHED,
    Drawn,
    evaluate_distribution,
    law_of,
    see,
    summarise,
    thumb,
)
from ldm.evaluate.distribution_tables import DistributionResults
from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.worlds.captions import SOME
from ldm.worlds.distribution import ATTRIBUTES
from ldm.worlds.law import law
from ldm.worlds.scenes import Scene, training_scene
from tests.helpers import tiny_config
from tests.worlds.doubled import copies

TREE = {"tree": SOME}


# --------------------------------------------------------------------------------------- kinds


def test_every_kind_has_a_law_and_speaks_as_captions_do() -> None:
    assert len(KINDS) == 24
    assert Settings.of(tiny_config(), list(KINDS)).num_images == 24  # a pipeline can draw them
    rng = np.random.default_rng(0)
    words = {
        word.strip(",") for _ in range(1500) for word in training_scene(rng).caption(rng).split()
    }
    for prompt, stated in KINDS.items():
        assert set(prompt.split()) <= words, prompt
        assert law_of(stated).open  # it leaves something open
        assert all(value in (*ATTRIBUTES[name], SOME) for name, value in stated.items())


def test_what_touches_a_held_out_combination_is_told_apart() -> None:
    apart = [
        prompt
        for prompt, stated in KINDS.items()
        if law(stated, whole_world=True).held_out >= TOUCHED
    ]
    assert apart == ["a yellow house", "a house on the sand", "a small yellow house at night"]
    # What training never showed has the law of the world; the rest that of training.
    assert law_of(KINDS["a small yellow house at night"]).held_out == pytest.approx(1)
    assert law_of(KINDS["a yellow house"]).of("sky").keys() == {("day",), ("sunset",)}


# ------------------------------------------------------------------------------------- judging


def drawn(scene: Scene, prompt: str = "a tree", **changes: Any) -> Drawn:
    """What a flawless look at a scene's picture sees."""
    seen = Drawn(
        prompt=prompt,
        seed=0,
        names=scene.attributes,
        counts={"house": int(scene.house != "none"), "tree": 1, "sun": 0, "moon": 0},
        numbers={name: getattr(scene, name) for name in NUMBERS},
        residual=4.0,
        thumb="AAAA",
    )
    return replace(seen, **changes)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """No small pictures: they take the time."""
    monkeypatch.setattr("ldm.evaluate.distribution.thumb", lambda _: np.zeros(3))
    monkeypatch.setattr(Scene, "render", lambda *_: None)


def scenes(number: int, **fixed: str) -> list[Scene]:
    rng = np.random.default_rng(7)
    asked = law(TREE).sample(rng, number)
    return [training_scene(rng, **(names | fixed)) for names in asked]


def test_draws_from_the_law_pass(alike: None) -> None:
    kind = summarise([drawn(s) for s in scenes(200)], TREE, law(TREE), np.random.default_rng(1))
    assert (kind.obeyed, kind.doubled, kind.impossible, kind.bad) == (200, 0, 0, 0)
    assert kind.attributes.keys() == set(ATTRIBUTES)
    assert len(kind.pairs) == 28
    assert max(one.excess for one in kind.attributes.values()) < 0.08
    assert np.median([one.excess for one in kind.attributes.values()]) < 0.03
    assert min(one.p for one in (*kind.attributes.values(), *kind.pairs.values())) > 0.001
    assert min(one.p for one in kind.numbers.values()) > 0.01


def test_faults_are_found_where_they_were_planted(alike: None) -> None:
    """Nothing but sunsets; horizons too high; two trees, and what no scene shows."""
    pictures = [drawn(s) for s in scenes(100, sky="sunset", tree="left")]
    for i, one in enumerate(pictures):
        high = one.numbers | {"horizon_height": one.numbers["horizon_height"] + 0.01}
        counts = one.counts | ({"tree": 2} if i < 30 else {})
        residual = 80.0 if 20 <= i < 40 else 4.0
        pictures[i] = replace(one, numbers=high, counts=counts, residual=residual)
    kind = summarise(pictures, TREE, law(TREE), np.random.default_rng(2))
    assert (kind.doubled, kind.impossible, kind.bad) == (30, 20, 40)
    assert kind.bad_interval[0] == pytest.approx(0.309, abs=0.002)
    assert kind.attributes["sky"].excess > 0.55 and kind.attributes["sky"].p < 0.002
    assert kind.attributes["tree"].excess > 0.4
    assert kind.attributes["horizon"].p > 0.001
    assert kind.pairs["sky", "tree"].excess > 0.7
    assert kind.numbers["horizon_height"].p < 0.002
    text = DistributionResults((kind,), {"steps": 15}).as_markdown()
    assert "| a tree | 100 / 100 | 30 | 20 | 40.0% | 30.9% to 49.8% |" in text
    assert "| all | 100 / 100 | 30 | 20 |" in text and "steps 15" in text
    assert "sky and tree: **+0." in text and "largest 0." in text


def test_a_missing_tree_does_not_obey(alike: None) -> None:
    pictures = [drawn(s) for s in scenes(20)]
    pictures[0] = replace(pictures[0], names=pictures[0].names | {"tree": "none"})
    kind = summarise(pictures, TREE, law(TREE), np.random.default_rng(3))
    assert kind.obeyed == 19 and kind.attributes["tree"].as_dict()["chi_square"] is None


def test_a_copied_scene_is_nearer_to_the_training_set_than_a_fresh_one() -> None:
    some = scenes(6)
    atoms = np.stack([thumb(scene.render(64)) for scene in some])
    pictures = [see(some[0].render(64), "a tree", 0)] * 3
    kind = summarise(pictures, TREE, law(TREE), np.random.default_rng(4), atoms)
    assert kind.nearest is not None
    assert kind.nearest[0] < 1 < kind.nearest[1] and kind.diversity[0] < 0.01
    assert "nearest training scene" in DistributionResults((kind,), {}).as_markdown()


def test_a_doubled_tree_is_seen() -> None:
    seen = see(Image.fromarray(copies("tree", 2, 0)), "a tree", 5)
    assert seen.doubled and seen.impossible and seen.counts["tree"] == 2
    assert (seen.prompt, seen.seed, seen.pixels.shape) == ("a tree", 5, (16 * 16 * 3,))


# ----------------------------------------------------------------------------- drawn and resumed


class Painter:
    """A perfect model of "snow" and "the calm sea": it paints a scene of the law by the seed."""

    def __init__(self) -> None:
        self.config = tiny_config()
        self.asked: list[tuple[str, int]] = []

    def draw(self, settings: Settings) -> Sequence[Image.Image]:
        settings.check(self.config)
        pictures = []
        for i, prompt in enumerate(settings.prompts):
            self.asked.append((prompt, settings.seed + i))
            rng = np.random.default_rng(settings.seed + i)
            (names,) = law(KINDS[prompt]).sample(rng, 1)
            pictures.append(training_scene(rng, **names).render(64))
        return pictures


def measured(painter: Painter, out: Path | None, per_kind: int, **more: Any) -> DistributionResults:
    kinds = {prompt: KINDS[prompt] for prompt in ("snow", "the calm sea")}
    pipe = cast(TextToImage, painter)
    return evaluate_distribution(pipe, kinds=kinds, per_kind=per_kind, out=out, seed=3, **more)


def test_only_what_is_missing_is_drawn(tmp_path: Path) -> None:
    painter, out = Painter(), tmp_path / "drawn.jsonl"
    measured(painter, out, 2, weights="a")
    assert painter.asked == [("snow", 3), ("snow", 4), ("the calm sea", 3), ("the calm sea", 4)]
    with out.open("a") as file:
        file.write('{"prompt": "the ca')  # a run that was ended while it wrote
    again = Painter()
    results = measured(again, out, 3, weights="a")
    assert again.asked == [("snow", 5), ("the calm sea", 5)]
    assert len(out.read_text().splitlines()) == 1 + 6
    alone = measured(Painter(), None, 3)
    assert results.as_dict() == alone.as_dict()
    assert [kind.obeyed for kind in results.kinds] == [3, 3]
    assert [kind.bad for kind in results.kinds] == [0, 0]
    json.dumps(results.as_dict(), allow_nan=False)


def test_a_file_of_another_model_or_damaged_is_refused_before_work(tmp_path: Path) -> None:
    painter, out = Painter(), tmp_path / "drawn.jsonl"
    measured(painter, out, 1, weights="a")
    painter.asked.clear()
    whole = out.read_text()
    for more in ({"weights": "b"}, {"weights": "a", "steps": 2}):
        with pytest.raises(ValueError, match="no pictures of this model and these settings"):
            measured(painter, out, 1, **more)
    out.write_text(whole + '{"prompt": 1}\n')
    with pytest.raises(ValueError, match="is damaged"):
        measured(painter, out, 1, weights="a")
    with pytest.raises(ValueError, match="no folder"):
        measured(painter, tmp_path / "none" / "drawn.jsonl", 1)
    with pytest.raises(ValueError, match="per_kind must be 1 or more"):
        measured(painter, None, 0)
    assert painter.asked == []
