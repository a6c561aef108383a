"""The player: one run as one HTML file, to scrub through, step by step, in any browser.

    from ldm.viz.player import explain
    explain(pipe, "a red house on green grass at night", "run.html", steps=50, seed=0)
    explain(pipe, "a red house", "guidance.html", compare={"guidance_scale": 1.0})

A run is filmed (`film`): its trace, and the pictures that its latents decode to. `player_html` is
a pure function of films: text, numbers and pictures go into one page, with the style and the
script that lie beside this file in `assets/`. The page asks nothing of any network, and a
Content-Security-Policy keeps it so. What a step's sentence says, and which steps of two runs stand
side by side, is decided here, where it can be tested; the script only shows it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.files import check_writable, write_text
from ldm.observe.traces import Trace, all_settings, trace

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import TextToImage

COMPARABLE = (
    *("prompt", "steps", "guidance_scale", "negative_prompt"),
    *("sampler", "eta", "seed", "like"),
)
MOST_FRAMES = 100
SMALL_PICTURE = 256  # pixels along the longer side: up to here a page has SMALL_BYTES
SMALL_BYTES, LARGE_BYTES = 5_000_000, 25_000_000


@dataclass(frozen=True, eq=False)
class Film:
    """A run, and what it looks like.

    Attributes:
        run: the whole trace.
        frames: the steps that are shown, rising.
        x, x0: of each frame, the noisy latents and their clean estimate, decoded.
        picture: what the run ended in.
    """

    run: Trace
    frames: tuple[int, ...]
    x: tuple[Image, ...]
    x0: tuple[Image, ...]
    picture: Image


@dataclass(frozen=True)
class Fineness:
    """How finely a page keeps what it shows.

    Attributes:
        picture_side: pixels along the longer side of a picture, at most.
        quality: WebP's, 0 to 100; None is lossless.
        map_side: rows or columns of an attention map, at most.
    """

    picture_side: int
    quality: int | None
    map_side: int


# From the finest down; a page takes the first that fits into its bytes.
FINENESSES = (
    Fineness(picture_side=SMALL_PICTURE, quality=None, map_side=64),
    Fineness(picture_side=512, quality=90, map_side=64),
    Fineness(picture_side=512, quality=80, map_side=32),
    Fineness(picture_side=384, quality=75, map_side=32),
    Fineness(picture_side=256, quality=70, map_side=16),
    Fineness(picture_side=128, quality=60, map_side=8),
)


def explain(
    pipe: TextToImage,
    prompt: str,
    path: str | Path,
    *,
    compare: Mapping[str, Any] | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> None:
    """Draw one picture, and write a page that shows how it came out of the noise.

    Args:
        pipe: the model.
        prompt: of one picture.
        path: the page, NAME.html; it appears whole or not at all.
        compare: what a second run has different, to be watched beside the first: any of
            `COMPARABLE`, e.g. {"prompt": "a blue house"} or {"guidance_scale": 1.0, "steps": 20}.
        max_bytes: what the page may weigh, see `player_html`.
        progress: draw a bar of the work on stderr.
        settings: those of `pipe.denoise`.

    Raises:
        ValueError: before any step is taken, for an argument out of its range, a second run that is
            the first again, or a path where nothing can be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"the page must end in .html, not {path}")
    asked = [{"prompt": prompt, **settings}]
    if compare is not None:
        asked.append(asked[0] | check_compare(compare))
    for one in asked:
        check_run(pipe, one)
    if len(asked) == 2 and complete(pipe, asked[0]) == complete(pipe, asked[1]):
        raise ValueError("the second run would be the first again: change something in it")
    check_writable(path)

    if progress:
        from tqdm import tqdm

        work = sum(work_of(complete(pipe, one)["steps"]) for one in asked)
        with tqdm(total=work, unit="step") as bar:
            films = [film(pipe, on_work=bar.update, **one) for one in asked]
    else:
        films = [film(pipe, **one) for one in asked]
    page = player_html(films, pipe.schedule.alpha_bar.tolist(), max_bytes=max_bytes)
    write_text(path, page)


def check_compare(compare: Mapping[str, Any]) -> dict[str, Any]:
    """What a second run has different, or a ValueError in one line."""
    unknown = [str(name) for name in compare if name not in COMPARABLE]
    if unknown or not compare:
        named = f"cannot compare by {', '.join(unknown)}" if unknown else "nothing to compare"
        raise ValueError(f"{named}: there are {', '.join(COMPARABLE)}")
    return dict(compare)


def check_run(pipe: TextToImage, asked: Mapping[str, Any]) -> None:
    """A ValueError in one line for the first setting that is out of its range: `denoise` says it
    at the call, and takes no step until it is asked for one."""
    if not isinstance(asked["prompt"], str) or asked.get("num_images", 1) != 1:
        raise ValueError("a page shows one picture: explain each on its own")
    pipe.denoise(**asked).close()


def complete(pipe: TextToImage, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run was asked for, defaults included; sizes as they were given."""
    settings = {name: value for name, value in asked.items() if name != "prompt"}
    return {"prompt": asked["prompt"], **all_settings(pipe, asked["prompt"], settings, (0, 0))}


def film(
    pipe: TextToImage, prompt: str, *, on_work: Callable[[], object] | None = None, **settings: Any
) -> Film:
    """Trace a run, and decode what it is shown by.

    Args:
        pipe, prompt, settings: as for `ldm.trace`.
        on_work: called after every step and every decoded picture, `work_of` times in all.
    """

    def done(*_: object) -> None:
        if on_work is not None:
            on_work()

    hook = pipe.unet.register_forward_hook(done)
    try:
        run = trace(pipe, prompt, **settings)
    finally:
        hook.remove()
    frames = shown_frames(len(run))

    def decode(latents: Tensor) -> Image:
        (image,) = pipe.decode(latents)
        done()
        return image

    return Film(
        run,
        frames,
        x=tuple(decode(run.x[i : i + 1]) for i in frames),
        x0=tuple(decode(run.x0[i : i + 1]) for i in frames),
        picture=decode(run.latents),
    )


def work_of(steps: int) -> int:
    """How often a film of so many steps says that it has done something."""
    return steps + 2 * len(shown_frames(steps)) + 1


def shown_frames(steps: int, most: int = MOST_FRAMES) -> tuple[int, ...]:
    """The steps that a page shows: all of them, or so many evenly spaced, first and last included.

    A page of a thousand decoded steps would be slow to make and slow to open.
    """
    if steps <= most:
        return tuple(range(steps))
    return tuple(round(i * (steps - 1) / (most - 1)) for i in range(most))


# --- What happens at a step ----------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """What can be said of one step in numbers; norms are over all numbers of the latents.

    Attributes:
        noise: the share of the variance of x that is noise, 1 - alpha_bar.
        moved: ||x0 - x0 of the step before|| / ||x0 of the step before||; None at the first step.
        prompt_change: ||eps_cond - eps_uncond|| / ||eps_uncond||; None without guidance.
        x, eps, x0, difference: the norms, the last of eps_cond - eps_uncond.
    """

    noise: float
    moved: float | None
    prompt_change: float | None
    x: float
    eps: float
    x0: float
    difference: float | None


def numbers(run: Trace, step: int) -> Numbers:
    """The numbers of one step, 0 to S - 1."""
    moved, prompt_change, difference = None, None, None
    if step > 0:
        before = run.x0[step - 1]
        moved = float((run.x0[step] - before).norm() / before.norm())
    if run.eps_cond is not None and run.eps_uncond is not None:
        difference = float((run.eps_cond[step] - run.eps_uncond[step]).norm())
        prompt_change = difference / float(run.eps_uncond[step].norm())
    return Numbers(
        noise=1.0 - run.alpha_bar[step],
        moved=moved,
        prompt_change=prompt_change,
        x=float(run.x[step].norm()),
        eps=float(run.eps[step].norm()),
        x0=float(run.x0[step].norm()),
        difference=difference,
    )


def sentence(run: Trace, step: int) -> str:
    """What happens at a step, in plain words and true of its numbers."""
    told = numbers(run, step)
    return " ".join(
        [
            f"Step {step + 1} of {len(run)}: {noise_words(told.noise)}.",
            moved_words(told.moved),
            guidance_words(run, told.prompt_change),
            ending_words(run, step),
        ]
    ).strip()


def noise_words(noise: float) -> str:
    """How much of x is noise."""
    shares = f"{percent(noise)} noise, {percent(1 - noise)} picture"
    if noise > 0.9:
        return f"nearly nothing but noise ({shares})"
    if noise > 0.5:
        return f"more noise than picture ({shares})"
    if noise > 0.1:
        return f"more picture than noise ({shares})"
    return f"nearly clean ({shares})"


def moved_words(moved: float | None) -> str:
    """How far the clean estimate moved since the step before."""
    if moved is None:
        return "The model makes its first guess of the finished picture."
    changed = f"The guess of the finished picture changed by {percent(moved)}"
    if moved > 0.5:
        return f"{changed}: it is being redrawn."
    if moved > 0.15:
        return f"{changed}: it is taking shape."
    if moved > 0.03:
        return f"{changed}: it is being refined."
    return f"{changed}: hardly at all."


def guidance_words(run: Trace, prompt_change: float | None) -> str:
    """How strong the guidance is."""
    if prompt_change is None:
        return "There is no guidance: the model is asked with the prompt alone."
    scale = run.settings["guidance_scale"]
    instead = (
        "Put in the negative prompt's place, the" if run.settings["negative_prompt"] else "The"
    )
    return (
        f"{instead} prompt changes the predicted noise by {percent(prompt_change)}; guidance makes "
        f"that {scale:g} times as much: {percent(abs(scale) * prompt_change)}."
    )


def ending_words(run: Trace, step: int) -> str:
    """What is special about the way to the next step, if anything is."""
    is_last = step == len(run) - 1
    noisy = run.settings["eta"] > 0 or (run.settings["sampler"] == "ddpm" and not is_last)
    words = ["Fresh noise is added on the way to the next step."] if noisy and not is_last else []
    if is_last:
        words.append("This is the last step: it leaves the picture.")
    return " ".join(words)


def percent(share: float) -> str:
    """0.0713 -> "7.1%", 0.995 -> "99.5%": three digits near the ends, two between."""
    digits = 3 if share > 0.99 else 2
    return f"{float(f'{100 * share:.{digits}g}'):g}%"


# --- Two runs side by side -----------------------------------------------------------------------


def timeline(films: Sequence[Film]) -> list[tuple[int, ...]]:
    """For every position of the slider, the frame of each film. The film with the most frames
    leads; the other is shown at the frame whose timestep is nearest."""
    times = [[one.run.t[i] for i in one.frames] for one in films]
    leader = max(times, key=len)
    return [tuple(nearest(t, row) for row in times) for t in leader]


def nearest(t: int, times: Sequence[int]) -> int:
    """The place of the timestep that is nearest to t, the noisier one of two."""
    return min(range(len(times)), key=lambda i: abs(times[i] - t))


def alignment_words(films: Sequence[Film]) -> str:
    """How two runs are aligned, where that is not step by step."""
    if len(films) == 1 or films[0].run.t == films[1].run.t:
        return ""
    counts = [len(one.run) for one in films]
    leader = "AB"[max((0, 1), key=lambda i: len(films[i].frames))]
    return (
        f"The runs take {counts[0]} and {counts[1]} steps. The slider follows run {leader}; the "
        "other is shown at its step nearest in noise."
    )


def apart(first: Film, second: Film, positions: Sequence[tuple[int, ...]]) -> list[float]:
    """At every position, ||x0 of the second - x0 of the first|| / ||x0 of the first||."""
    pairs = [(first.run.x0[first.frames[i]], second.run.x0[second.frames[j]]) for i, j in positions]
    return [float((b - a).norm() / a.norm()) for a, b in pairs]


def headings(films: Sequence[Film]) -> list[str]:
    """What each run is called: of two, what it has different."""
    asked = [{"prompt": one.run.prompt, **one.run.settings} for one in films]
    names = [name for name in COMPARABLE if any(one[name] != asked[0][name] for one in asked)]
    return [", ".join(setting_words(name, one[name]) for name in names) for one in asked]


def setting_words(name: str, value: Any) -> str:
    """A setting in words: ("guidance_scale", 7.5) -> "guidance scale 7.5"."""
    if name == "prompt":
        return f"“{value}”"
    if name == "sampler":
        return str(value).upper()
    if name == "steps":
        return f"{value} steps" if value != 1 else "1 step"
    if name == "negative_prompt":
        return f"negative prompt “{value}”" if value else "no negative prompt"
    if name == "like":
        return f"as {value} draws" if value else "as ldm draws"
    return f"{name.replace('_', ' ')} {value:g}" if name != "seed" else f"seed {value}"


# --- The page ------------------------------------------------------------------------------------


def player_html(
    films: Sequence[Film], alpha_bar: Sequence[float], *, max_bytes: int | None = None
) -> str:
    """One self-contained page of one film, or of two of the same picture size, side by side.

    Args:
        films: one or two.
        alpha_bar: of the model's noise schedule, `pipe.schedule.alpha_bar.tolist()`.
        max_bytes: what the page may weigh: pictures and attention maps are kept as finely as fits,
            and at the very least as the last of `FINENESSES`. None is 5 MB for pictures of up to
            256 pixels, 25 MB for larger ones.

    Raises:
        ValueError: there are no films or too many, two that do not fit together, or latents that
            are not finite.
    """
    if not 1 <= len(films) <= 2:
        raise ValueError(f"a page shows one run or two, not {len(films)}")
    if len({(one.picture.size, one.run.x.shape[1:]) for one in films}) > 1:
        raise ValueError("two runs can be compared only at one picture size")
    if not all(one.run.x.isfinite().all() and one.run.x0.isfinite().all() for one in films):
        raise ValueError("the model's numbers are not finite: there is nothing to show")
    is_small = max(films[0].picture.size) <= SMALL_PICTURE
    if max_bytes is None:
        max_bytes = SMALL_BYTES if is_small else LARGE_BYTES
    # Large pictures without loss would be most of any page.
    for fineness in FINENESSES[0 if is_small else 1 : -1]:
        if picture_bytes(films, fineness, every=10) > max_bytes:
            continue  # the pictures of every tenth step foretell it
        page = page_of(films, alpha_bar, fineness)
        if len(page.encode()) <= max_bytes:
            return page
    return page_of(films, alpha_bar, FINENESSES[-1])


def picture_bytes(films: Sequence[Film], fineness: Fineness, every: int) -> int:
    """About what the pictures take, from those of every so manyth frame."""
    return every * sum(
        len(picture_uri(image, fineness))
        for one in films
        for images in (one.x, one.x0)
        for image in images[every // 2 :: every]
    )


def page_of(films: Sequence[Film], alpha_bar: Sequence[float], fineness: Fineness) -> str:
    """The page, as fine as asked."""
    import ldm

    positions = timeline(films)
    data = {
        "runs": [film_data(one, fineness) for one in films],
        "headings": headings(films) if len(films) > 1 else [""],
        "timeline": positions,
        "apart": apart(films[0], films[1], positions) if len(films) > 1 else None,
        "schedule": schedule_curve(alpha_bar),
        "t_max": len(alpha_bar) - 1,
    }
    assets = files("ldm.viz.player")
    style = (assets / "player.css").read_text(encoding="utf-8")
    script = (assets / "player.js").read_text(encoding="utf-8")
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src '{sha256(style)}'; "
        f"script-src '{sha256(script)}'; base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": script_safe(data),
        "version": html.escape(ldm.__version__),
        "prompt": html.escape(" / ".join(dict.fromkeys(one.run.prompt for one in films))),
        "facts": html.escape(" · ".join(facts(films))),
        "pictures": "".join(
            f'<img src="{picture_uri(one.picture, fineness)}" alt="{html.escape(alt)}">'
            for one, alt in zip(films, picture_words(films), strict=True)
        ),
        "alignment": html.escape(" ".join(filter(None, (alignment_words(films), left_out(films))))),
        "calls": "\n".join(html.escape(python_call(one.run)) for one in films),
    }
    template = (assets / "player.html").read_text(encoding="utf-8")
    # In one pass: what a prompt says is never taken for a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def facts(films: Sequence[Film]) -> list[str]:
    """The settings of a run, or those that two share, for the line below the prompt."""
    s = films[0].run.settings
    names = ["steps", "sampler", "guidance_scale", "seed"]
    names += [name for name in ("eta", "negative_prompt", "like") if s[name]]
    shared = [name for name in names if all(one.run.settings[name] == s[name] for one in films)]
    size = f"{s['width']}x{s['height']} pixels"
    return [films[0].run.model, *(setting_words(name, s[name]) for name in shared), size]


def picture_words(films: Sequence[Film]) -> list[str]:
    """What the finished pictures are, in words."""
    if len(films) == 1:
        return ["The picture that this run ended in"]
    return [f"The picture that run {letter} ended in" for letter in "AB"]


def left_out(films: Sequence[Film]) -> str:
    """Which steps are not shown, if any are not."""
    words = [
        f"Of {len(one.run)} steps {len(one.frames)} are shown, evenly spaced."
        for one in films
        if len(one.frames) < len(one.run)
    ]
    return " ".join(dict.fromkeys(words))


def python_call(run: Trace) -> str:
    """The call that draws the run's picture again."""
    settings = {name: value for name, value in run.settings.items() if value is not None}
    return f"pipe({run.prompt!r}, {', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def film_data(one: Film, fineness: Fineness) -> dict[str, Any]:
    """All that the script shows of a run."""
    run = one.run
    kinds = ["start", *["word"] * (len(run.words) - 2), "end"]
    return {
        "words": [
            {"text": word.text, "kind": kind} for word, kind in zip(run.words, kinds, strict=True)
        ],
        "steps": len(run),
        "frames": [
            {
                "step": i,
                "t": run.t[i],
                "t_prev": run.t_prev[i],
                "alpha_bar": run.alpha_bar[i],
                "sentence": sentence(run, i),
                **dataclasses.asdict(numbers(run, i)),
            }
            for i in one.frames
        ],
        "x": [picture_uri(image, fineness) for image in one.x],
        "x0": [picture_uri(image, fineness) for image in one.x0],
        "guidance": guidance_maps(one),
        "attention": [
            attention_maps(one, resolution, fineness.map_side) for resolution in run.resolutions
        ],
        "latent_size": list(run.x.shape[2:]),
    }


def guidance_maps(one: Film) -> dict[str, Any] | None:
    """At each place of the latents, the length of eps_cond - eps_uncond over the channels; None
    without guidance. Bytes, of which 255 stands for the largest of the step, its peak."""
    run = one.run
    if run.eps_cond is None or run.eps_uncond is None:
        return None
    lengths = (run.eps_cond - run.eps_uncond)[list(one.frames)].float().norm(dim=1)  # (F, h, w)
    peaks = lengths.amax(dim=(1, 2))
    levels = (lengths / peaks.clamp(min=1e-30)[:, None, None]).mul(255).round().byte()
    return {
        "rows": levels.shape[1],
        "columns": levels.shape[2],
        "peaks": peaks.tolist(),
        "levels": base64_of(levels),
    }


def attention_maps(one: Film, resolution: tuple[int, int], map_side: int) -> dict[str, Any]:
    """What share of each place's attention goes to each word: the mean over the layers of one size,
    the sum over the word's tokens, so that at each place the words sum to 1.

    Every map, (F + 1, W, rows, columns) of them with the mean over all steps as the last, has its
    own peak, (F + 1, W), which its byte 255 stands for.
    """
    run, (rows, columns) = one.run, resolution
    layers = [maps for maps in run.maps.values() if maps.shape[1:3] == resolution]
    mean = torch.stack([maps.float() for maps in layers]).mean(dim=0)  # (S, rows, columns, L)
    shares = torch.stack([mean[..., list(w.tokens)].sum(dim=-1) for w in run.words], dim=1)
    shown = torch.cat([shares[list(one.frames)], shares.mean(dim=0, keepdim=True)])
    kept = (min(rows, map_side), min(columns, map_side))
    shown = F.adaptive_avg_pool2d(shown, kept)  # (F + 1, W, rows, columns)
    peaks = shown.amax(dim=(2, 3))
    levels = (shown / peaks.clamp(min=1e-30)[..., None, None]).mul(255).round().byte()
    return {
        "label": f"{rows}x{columns}",
        "layers": len(layers),
        "rows": kept[0],
        "columns": kept[1],
        "peaks": base64_of(peaks),
        "levels": base64_of(levels),
    }


def schedule_curve(alpha_bar: Sequence[float], points: int = 101) -> list[tuple[int, float]]:
    """The noise's share at evenly spaced timesteps, [(t, 1 - alpha_bar), ...], t rising."""
    last = len(alpha_bar) - 1
    places = dict.fromkeys(round(i * last / (points - 1)) for i in range(points))
    return [(t, 1.0 - alpha_bar[t]) for t in places]


def picture_uri(image: Image, fineness: Fineness) -> str:
    """A picture as a data: URI, no larger than asked."""
    small = image.convert("RGB")
    small.thumbnail((fineness.picture_side, fineness.picture_side))
    file = io.BytesIO()
    if fineness.quality is None:
        small.save(file, "WEBP", lossless=True)
    else:
        small.save(file, "WEBP", quality=fineness.quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def base64_of(tensor: Tensor) -> str:
    """The bytes of a tensor, little-endian as every browser's typed arrays are."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def script_safe(data: object) -> str:
    """JSON that can stand in a <script> element: nothing in it can close the element, or open a
    comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def sha256(source: str) -> str:
    """The name by which a Content-Security-Policy allows this text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
