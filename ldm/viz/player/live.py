"""A page that holds the model itself, and draws: what `ldm explain --live` writes.

The exported graphs (`ldm.export`) and ONNX Runtime Web (`runtime.py`) stand in one HTML file, which
opens from a disk and asks nothing of any network. Its policy allows its own style and script by
their hashes, the runtime, which it makes of its own bytes (`blob:`), and WebAssembly; nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.config import ModelConfig
from ldm.export.writing import check_installed, exported
from ldm.files import check_writable, write_text
from ldm.settings import Settings
from ldm.version import ldm_version
from ldm.viz.player.encoding import sha256
from ldm.viz.player.runtime import runtime_files

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

MODULES = ("normals", "tokenizer", "sampling", "engine", "live")
"""The files of `model/`, in the order in which they are joined to one script."""


def check_live(config: ModelConfig, settings: Settings, path: Path) -> None:
    """A ValueError in one line, before any work, for a run that the page cannot draw, a path that
    cannot be written, or libraries that are not there."""
    check_installed()
    if settings.sampler != "ddim" or settings.eta or settings.like or settings.spacing:
        raise ValueError("a live page draws by ddim alone, with eta 0 and on its own grid")
    if (settings.height, settings.width) != (config.image_size, config.image_size):
        raise ValueError(f"a live page draws pictures of {config.image_size}x{config.image_size}")
    if settings.num_images != 1:
        raise ValueError("a live page draws one picture at a time")
    plain = Settings.of(
        config,
        settings.prompt,
        steps=settings.steps,
        sampler=settings.sampler,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompts[0],
        seed=settings.seed,
    )
    if dataclasses.replace(settings, negative_prompt=plain.negative_prompt) != plain:
        raise ValueError("a live page draws from noise, with one guidance scale for all steps")
    check_writable(path)


def explain_live(
    pipe: TextToImage, settings: Settings, path: Path, runtime: Mapping[str, bytes] | None = None
) -> None:
    """Write a page in which this model draws; it begins with the run of these settings.

    Args:
        pipe: the model, on a CPU in float32.
        settings: of one picture, as `check_live` wants them.
        path: the page, NAME.html; it appears whole or not at all.
        runtime: the files of `runtime_files`; None takes them from the cache or fetches them.

    Raises:
        ValueError, OSError: as `check_live`, `exported` and `runtime_files` say.
    """
    check_live(pipe.config, settings, path)
    runtime = runtime_files() if runtime is None else runtime
    write_text(path, live_html(model_files(pipe) | dict(runtime), pipe.config, settings))


def model_files(pipe: TextToImage) -> dict[str, bytes]:
    """The exported files that the page needs, and the words that the model knows, if it is told."""
    needed = exported(pipe)
    del needed["unet_insides.onnx"]
    words = pipe.text.require_tokenizer().words
    if words is not None:
        needed["words.json"] = json.dumps(sorted(words)).encode()
    return needed


def live_html(content: Mapping[str, bytes], config: ModelConfig, settings: Settings) -> str:
    """The page of these files, a pure function."""
    assets = files("ldm.viz.player") / "model"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    style = asset("page.css")
    script = "\n".join(joinable(asset(f"{name}.js")) for name in MODULES)
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src '{sha256(style)}'; "
        f"script-src '{sha256(script)}' 'wasm-unsafe-eval' blob:; base-uri 'none'; "
        "form-action 'none'",
        "style": style,
        "script": script,
        "version": html.escape(ldm_version()),
        "model": html.escape(config.name),
        "prompt": html.escape(settings.prompt),
        "negative_prompt": html.escape(settings.negative_prompts[0]),
        "seed": str(settings.seed),
        "steps": str(settings.steps),
        "most_steps": str(config.schedule.num_train_timesteps),
        "guidance_scale": f"{settings.guidance_scale:g}",
        "files": "\n".join(
            f'<script type="text/plain" data-file="{html.escape(name)}">{packed(one)}</script>'
            for name, one in content.items()
        ),
    }
    # In one pass: what a prompt says is never taken for a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], asset("page.html"))


def joinable(module: str) -> str:
    """A module's text as a part of one script that has all of them."""
    return re.sub(r"^export ", "", module, flags=re.MULTILINE)


def packed(content: bytes) -> str:
    """Bytes as text for a page: gzip in base64, the same for the same bytes."""
    return base64.b64encode(gzip.compress(content, compresslevel=9, mtime=0)).decode()
