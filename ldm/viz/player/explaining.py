"""From prompts to a page on the disk: what `ldm explain` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import ModelConfig
from ldm.files import check_writable, write_text
from ldm.inputs import Inputs, asked
from ldm.settings import Settings
from ldm.viz.player.captions import COMPARABLE
from ldm.viz.player.film import film, work_of
from ldm.viz.player.page import player_html

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

Asked = tuple[Settings, Inputs]
"""A run that is to be shown."""


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
        settings: the keywords of `pipe(...)`.

    Raises:
        ValueError: before any step is taken, for an argument out of its range, a second run that is
            the first again, or a path where nothing can be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"the page must end in .html, not {path}")
    runs = runs_asked(pipe.config, prompt, compare=compare, **settings)
    check_writable(path)
    explain_runs(pipe, runs, path, max_bytes=max_bytes, progress=progress)


def runs_asked(
    config: ModelConfig,
    prompt: str,
    *,
    compare: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[Asked, ...]:
    """The runs of a page, one or two, as `explain` is asked for them; the model is not needed.

    Raises:
        ValueError: as there.
    """
    wanted: list[dict[str, Any]] = [{"prompt": prompt, **settings}]
    if compare is not None:
        unknown = [str(name) for name in compare if name not in COMPARABLE]
        if unknown or not compare:
            named = f"cannot compare by {', '.join(unknown)}" if unknown else "nothing to compare"
            raise ValueError(f"{named}: there are {', '.join(COMPARABLE)}")
        wanted.append(wanted[0] | dict(compare))
    runs = tuple(asked(config, keywords.pop("prompt"), keywords) for keywords in wanted)
    if any(run.num_images != 1 for run, _ in runs):
        raise ValueError("a page shows one picture: explain each on its own")
    if len(runs) == 2 and runs[0][0] == runs[1][0]:
        raise ValueError("the second run would be the first again: change something in it")
    return runs


def explain_runs(
    pipe: TextToImage,
    runs: Sequence[Asked],
    path: Path,
    *,
    max_bytes: int | None = None,
    progress: bool = False,
) -> None:
    """Draw one run or two, and write their page; other arguments as in `explain`."""
    from tqdm import tqdm

    work = sum(work_of(len(inputs.walk(run, pipe.schedule).grid)) for run, inputs in runs)
    with tqdm(total=work, unit="step", disable=not progress) as bar:
        films = [film(pipe, run, inputs, on_work=bar.update) for run, inputs in runs]
    page = player_html(films, pipe.schedule.alpha_bar.tolist(), max_bytes=max_bytes)
    write_text(path, page)
