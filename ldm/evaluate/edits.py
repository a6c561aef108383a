"""Pictures edited, held against the right answer.

Of a scene of this world the right answer to an edit is known: the same scene with one thing changed
(`Scene.edited`), rendered. So each way to edit is given the picture of a scene, what it shows in
words, and the same words with one of them changed; and of what comes out is asked

- did what should change do so, as the reader has it (`ldm.worlds.reader`)?
- did the rest not: are all other names as they were, and how far are the pixels from those of the
  right answer, outside the thing's own mask (`Scene.masks`)?

"do nothing" and "draw anew" are the two ends between which an edit is worth something, and "the
answer, decoded" is the best that can come out of this autoencoder.

    print(evaluate_edits(ldm.load()).as_markdown())
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ldm.evaluate.distribution_tables import markdown
from ldm.evaluate.prompts import EVALUATION_STREAM, lower_bound
from ldm.inputs import Inputs
from ldm.observe.edits import CROSS_ATTENTION, aligned
from ldm.observe.edits import replace as looking_where
from ldm.observe.hooks import record
from ldm.observe.maps import Word, group_words
from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.worlds.distribution import ATTRIBUTES, continuous
from ldm.worlds.reader import read
from ldm.worlds.scenes import Mask, Scene, training_scene

if TYPE_CHECKING:
    from PIL.Image import Image

THINGS: dict[str, tuple[str, ...]] = {  # what is changed -> the masks that may change with it
    "house": ("house",),
    "house_position": ("house",),
    "tree": ("tree",),
    "sky": ("sky", "sun", "moon"),
}
MOVED: dict[str, tuple[str, ...]] = {  # and the numbers
    "house_position": ("house_x",),
    "tree": ("tree_x", "tree_height"),
    "sky": ("light_y",),
}
STRENGTHS = (0.5, 0.75)
SHARE = 0.8
"""Of the steps in which prompt-to-prompt looks where the first picture's words looked."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A scene, and the same with one thing changed.

    Attributes:
        name: of the attribute that changes.
        before, after: the scenes.
        size: of their pictures, in pixels.
        seed: of the noise of those who draw some.
    """

    name: str
    before: Scene
    after: Scene
    size: int
    seed: int

    @property
    def picture(self) -> Image:
        """What is edited."""
        return self.before.render(self.size)

    @property
    def answer(self) -> Image:
        """What should come out."""
        return self.after.render(self.size)

    @property
    def mask(self) -> Mask:
        """Where the thing is, or was before: (size, size) bool."""
        masks = [scene.masks(self.size) for scene in (self.before, self.after)]
        parts = [one[thing] for one in masks for thing in THINGS[self.name] if thing in one]
        return np.logical_or.reduce(parts)


@dataclass(frozen=True)
class Judged:
    """One picture that was edited.

    Attributes:
        method, name: what edited it, and which attribute.
        changed: does it show the new value?
        kept: how many of the other attributes are as they were, and should be.
        inside, outside: root mean square difference from the right answer, in grey levels, where
            the thing is or was, and elsewhere.
    """

    method: str
    name: str
    changed: bool
    kept: int
    inside: float
    outside: float

    @property
    def right(self) -> bool:
        """Every attribute is as in the right answer."""
        return self.changed and self.kept == OTHERS


OTHERS = len(ATTRIBUTES) - 1


@dataclass(frozen=True)
class Score:
    """Pictures of one method: how many, how many of them were changed and are right all over, how
    many other attributes were kept, of how many; and the mean differences."""

    method: str
    name: str
    total: int
    changed: int
    right: int
    kept: int
    others: int
    inside: float
    outside: float

    @classmethod
    def of(cls, judged: Sequence[Judged], name: str = "all") -> Score:
        """The score of one method's pictures; there is one at least."""
        total = len(judged)
        return cls(
            judged[0].method,
            name,
            total,
            changed=sum(one.changed for one in judged),
            right=sum(one.right for one in judged),
            kept=sum(one.kept for one in judged),
            others=OTHERS * total,
            inside=math.sqrt(sum(one.inside**2 for one in judged) / total),
            outside=math.sqrt(sum(one.outside**2 for one in judged) / total),
        )


@dataclass(frozen=True)
class EditResults:
    """All pictures, and what they were drawn with."""

    judged: Sequence[Judged]
    settings: dict[str, float | str]

    def scores(self, name: str | None = None) -> list[Score]:
        """Of each method, over all edits or those of one attribute: most often right first, then
        nearest to the rest."""
        found: dict[str, list[Judged]] = {}
        for one in self.judged:
            if name in (None, one.name):
                found.setdefault(one.method, []).append(one)
        scores = [Score.of(group, name or "all") for group in found.values()]
        return sorted(scores, key=lambda score: (-score.right / score.total, score.outside))

    @property
    def names(self) -> list[str]:
        """The attributes that were changed."""
        return list(dict.fromkeys(one.name for one in self.judged))

    def as_dict(self) -> dict[str, Any]:
        """For programs: the scores over all edits, and by the attribute that changes."""
        scores = [*self.scores(), *(one for name in self.names for one in self.scores(name))]
        return {"settings": self.settings, "scores": [asdict(one) for one in scores]}

    def as_markdown(self) -> str:
        """For people: the leaderboard, and how often each is right by what changes."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        heads = ["method", "right all over", "changed", "rest kept", "off inside", "off outside"]
        rows = []
        for score in self.scores():
            bound = lower_bound(score.right, score.total)
            rows.append(
                [
                    score.method,
                    f"{score.right} / {score.total} (at least {bound:.0%})",
                    f"{score.changed / score.total:.0%}",
                    f"{score.kept / score.others:.1%}",
                    f"{score.inside:.1f}",
                    f"{score.outside:.1f}",
                ]
            )
        by_name = {name: {s.method: s for s in self.scores(name)} for name in self.names}
        parts = []
        for method in (score.method for score in self.scores()):
            each = [by_name[name][method] for name in self.names]
            parts.append([method, *(f"{s.right} / {s.total}, {s.outside:.1f}" for s in each)])
        return "\n\n".join(
            [
                f"Pictures edited, by how often every name is as it should be ({settings}); "
                "off: from the right answer, in grey levels:",
                markdown(heads, rows),
                "Right all over, and off outside, by what should change:",
                markdown(["method", *self.names], parts),
            ]
        )


def evaluate_edits(
    pipe: TextToImage,
    *,
    per_kind: int = 24,
    names: Sequence[str] = tuple(THINGS),
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
) -> EditResults:
    """Edit pictures of `per_kind` scenes for each attribute in `names`, in every way. Settings that
    are None are the model's own; inversion, and what begins with it, takes "ddim" for its sampler.

    Raises:
        ValueError: before the first picture, for settings that `Settings.of` refuses, steps too few
            for a strength of 0.5, or an attribute that is not in `THINGS`.
    """
    if per_kind < 1:
        raise ValueError(f"per_kind must be 1 or more, not {per_kind}")
    for name in names:
        if name not in THINGS:
            raise ValueError(f"no edits of {name!r}: there are those of {', '.join(THINGS)}")
    settings = Settings.of(
        pipe.config,
        "what the scenes show",
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        seed=seed,
    )
    replace(settings, strength=min(STRENGTHS)).walk(pipe.schedule)  # or it leaves no step
    edits = [
        one for name in names for one in edits_of(name, per_kind, pipe.config.image_size, seed)
    ]
    judged = []
    for edit in tqdm(edits, desc="editing", unit="picture", disable=None):  # None: on a terminal
        run = replace(settings, seed=edit.seed)
        judged += [judge(edit, method, image) for method, image in edited(pipe, edit, run)]
    told: dict[str, float | str] = {
        name: getattr(settings, name) for name in ("sampler", "steps", "guidance_scale")
    }
    return EditResults(judged, {"per_kind": per_kind, **told, "seed": seed})


# --- What is asked ------------------------------------------------------------------------------


def edits_of(name: str, count: int, size: int, seed: int) -> list[Edit]:
    """Edits of one attribute, of scenes of the training world to others of it, in which nothing
    else moves: a tree that comes to a house's side makes it step aside, and is passed over."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 6, list(THINGS).index(name)])
    found: list[Edit] = []
    while len(found) < count:
        before = training_scene(rng)
        of_a_house = name in ("house", "house_position")
        if (of_a_house and before.house == "none") or (name == "tree" and before.ground == "sea"):
            continue  # there is none, or can be none
        values = set(ATTRIBUTES[name]) - {getattr(before, name), *(["none"] if of_a_house else [])}
        after = before.edited(**{name: str(rng.choice(sorted(values)))})
        if not after.held_out and moved(before, after) <= set(MOVED.get(name, ())):
            found.append(Edit(name, before, after, size, seed + len(found)))
    return found


def moved(before: Scene, after: Scene) -> set[str]:
    """The numbers in which two scenes differ."""
    numbers = continuous(before.attributes)
    return {
        number
        for number in numbers
        if not math.isclose(getattr(before, number), getattr(after, number), abs_tol=1e-9)
    }


def in_words(names: Mapping[str, str]) -> str:
    """All that a scene shows, always in the same words: an edit changes one place of them."""
    at = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
    when = {"day": "by day", "sunset": "at sunset", "night": "at night"}[names["sky"]]
    on = {"grass": "green grass", "sand": "sand", "snow": "snow", "sea": "the sea"}[names["ground"]]
    lamp = "moon" if names["sky"] == "night" else "sun"
    light = f"no {lamp}" if names["light"] == "none" else f"the {lamp} {at[names['light']]}"
    tree = "no tree" if names["tree"] == "none" else f"a tree {at[names['tree']]}"
    rest = f"{light}, {tree} and a {names['horizon']} horizon"
    if names["house"] == "none":
        return f"{on} {when} with no house, {rest}"
    house = f"a {names['house_size']} {names['house']} house {at[names['house_position']]}"
    return f"{house} on {on} {when} with {rest}"


# --- How it is done -----------------------------------------------------------------------------


def edited(pipe: TextToImage, edit: Edit, run: Settings) -> Iterator[tuple[str, Image]]:
    """What each method makes of an edit's picture: (method, picture)."""
    source, target = in_words(edit.before.attributes), in_words(edit.after.attributes)
    asked = replace(run, prompts=(target,))
    yield "do nothing", edit.picture
    yield "the answer, decoded", pipe.decode(pipe.encode(edit.answer))[0]
    yield "draw anew", pipe.draw(asked)[0]
    for strength in STRENGTHS:
        given = Inputs.of(image=edit.picture)
        yield f"img2img {strength:g}", pipe.draw(replace(asked, strength=strength), given)[0]
    given = Inputs.of(image=edit.picture, mask=mask_picture(edit.mask))
    yield "inpainting", pipe.draw(replace(asked, strength=1.0), given)[0]

    for step in pipe.invert(edit.picture, source, steps=run.steps):
        noise = step.x_prev
    backwards, given = replace(asked, sampler="ddim"), Inputs(latents=noise)
    yield "inversion", pipe.draw(backwards, given)[0]
    with record(pipe.unet, CROSS_ATTENTION) as maps:
        for _ in pipe.run(replace(backwards, prompts=(source,), guidance_scale=1.0), given):
            pass
    places = aligned(words_of(pipe, source), words_of(pipe, target))
    with looking_where(pipe.unet, maps, share=SHARE, places=places):
        yield "prompt-to-prompt", pipe.draw(backwards, given)[0]


def words_of(pipe: TextToImage, prompt: str) -> tuple[Word, ...]:
    """The words of a prompt, as the pipeline reads it."""
    (ids,) = pipe.text.tokenize([prompt]).tolist()
    return group_words(pipe.text.require_tokenizer(), ids)


def mask_picture(mask: Mask) -> Image:
    """White where a mask is True."""
    from PIL import Image

    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))


def judge(edit: Edit, method: str, image: Image) -> Judged:
    """A picture, held against the right answer."""
    seen, wanted = read(image), edit.after.attributes
    kept = sum(seen[name] == value for name, value in wanted.items() if name != edit.name)
    pixels = [np.asarray(one, dtype=np.float64) for one in (image, edit.answer)]
    squared = ((pixels[0] - pixels[1]) ** 2).mean(axis=2)  # (size, size)
    inside, outside = (
        math.sqrt(squared[where].mean()) if where.any() else 0.0
        for where in (edit.mask, ~edit.mask)
    )
    return Judged(method, edit.name, seen[edit.name] == wanted[edit.name], kept, inside, outside)
