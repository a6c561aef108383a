"""Teaching a model one thing more: it learns, stops and goes on; the model itself stays; the files
are those that others read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import ldm
from ldm.attention import Attention
from ldm.cli import main as cli
from ldm.config import PREDICTIONS, SD_V1, SD_V2, ScheduleConfig
from ldm.pipeline import TextToImage
from ldm.schedule import NoiseSchedule, output_from
from ldm.train import teach
from ldm.train.adapters import (
    EmbeddingSettings,
    LoraSettings,
    LowRank,
    NewWord,
    lesson,
    losses,
    save_embedding,
    save_lora,
    train_embedding,
    train_lora,
)
from ldm.train.lessons import Lessons, encode_lessons, read_folder
from ldm.train.state import Optimisation, Record, TrainState
from ldm.unet import UNet
from tests.helpers import randn, rng, tiny_model

SHORT = Optimisation(steps=15, batch_size=4, learning_rate=3e-2, warmup=2, weight_decay=0.0)
CAPTIONS = ("a mill by day", "a mill at night", "the mill")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(model: Path) -> TextToImage:
    return ldm.load(model, device="cpu")


def run(
    kind: str, pipe: TextToImage, settings: Optimisation = SHORT, convolutions: bool = False
) -> tuple[TrainState, Iterator[Record]]:
    """A fresh state of a LoRA or a word, and its loop."""
    lessons = Lessons(randn(3, 4, 8, 8, seed=5), CAPTIONS)
    stages = (pipe.unet, pipe.text, pipe.schedule, pipe.config.prediction)
    if kind == "lora":
        state = TrainState(LowRank(pipe.unet, 2, None, rng(1), convolutions), settings)
        return state, train_lora(state, LoraSettings(settings, rank=2), lessons, *stages)
    state = TrainState(NewWord(pipe.text, "a", 2), settings)
    recipe = EmbeddingSettings(settings, vectors=2)
    return state, train_embedding(state, recipe, lessons, "mill", *stages)


@torch.no_grad()
def outputs(pipe: TextToImage, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the text encoder says of a prompt, and the UNet of noise."""
    context = pipe.text(["a red house"]) if context is None else context
    return context, pipe.unet(randn(1, 4, 8, 8, seed=3), torch.tensor([700]), context)


def weights(pipe: TextToImage) -> dict[str, Tensor]:
    stages = {"unet": pipe.unet, "text": pipe.text}
    return {f"{s}.{k}": v.clone() for s, m in stages.items() for k, v in m.state_dict().items()}


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_it_learns_and_the_model_stays_as_it_is(kind: str, pipe: TextToImage) -> None:
    """Held against the step's own loss with nothing learnt: noise differs from step to step."""
    before, drawn = weights(pipe), outputs(pipe)
    gains = []
    _, untaught = run(kind, pipe, dataclasses.replace(SHORT, learning_rate=1e-12))
    _, records = run(kind, pipe)
    for record, other in zip(records, untaught, strict=True):
        gains.append(1 - record.figures["loss"] / other.figures["loss"])
        if record.step in (1, SHORT.steps):  # in between, too, it draws as ever
            assert all(map(torch.equal, outputs(pipe), drawn))
    assert len(gains) == SHORT.steps and abs(gains[0]) < 1e-4
    assert min(gains[-5:]) > 0.002, gains
    after = weights(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pipe.text.added_tokens == 0 and not list(pipe.unet.buffers())


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_a_resumed_run_equals_one_that_never_stopped(
    kind: str, pipe: TextToImage, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SHORT, steps=4)
    whole, records = run(kind, pipe, settings)
    last = list(records)[-1]
    stopped, records = run(kind, pipe, settings)
    list(islice(records, 2))
    stopped.save(tmp_path / "state.pt")
    resumed, records = run(kind, pipe, settings)
    resumed.load(tmp_path / "state.pt")
    assert list(records)[-1].figures == last.figures
    ours, theirs = whole.ema.state_dict(), resumed.ema.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_unet_that_is_right_costs_nothing_and_another_does(prediction: str) -> None:
    """By what is predicted; at a schedule's end in pure noise as well, where eps is not."""
    zero_snr = ScheduleConfig(zero_terminal_snr=prediction != "eps")
    state = TrainState(nn.Linear(1, 1), dataclasses.replace(SHORT, batch_size=8))
    lessons = Lessons(randn(3, 4, 8, 8), CAPTIONS)
    chosen, batch = lesson(state, lessons, NoiseSchedule(zero_snr))
    assert torch.equal(batch.x0, lessons.latents[chosen])
    right = output_from(prediction, batch.x0, batch.noise, batch.alpha_bar)
    for output, is_right in ((right, True), (right + 0.5, False)):
        loss, mse = losses(batch, lambda *_, y=output: y, right, prediction)  # type: ignore[misc,arg-type]
        assert mse == pytest.approx(0.0 if is_right else 0.25, abs=1e-6)
        assert (loss < 1e-6) if is_right else (0.01 < loss < 10)


# ------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention", "all"])
def test_a_lora_that_is_loaded_computes_what_was_trained(
    convolutions: bool, pipe: TextToImage, tmp_path: Path
) -> None:
    state, records = run("lora", pipe, dataclasses.replace(SHORT, steps=3), convolutions)
    list(records)
    before = outputs(pipe)
    with state.ema.beside(pipe.unet):
        trained = outputs(pipe)
    save_lora(tmp_path / "mill.safetensors", state.ema)
    lora = pipe.load_lora(tmp_path / "mill.safetensors")
    assert all(map(torch.equal, outputs(pipe), trained))
    assert not torch.equal(trained[1], before[1])
    assert lora.layers == len(state.ema.keys)


def test_a_word_that_is_loaded_reads_as_it_was_trained(pipe: TextToImage, tmp_path: Path) -> None:
    from ldm.train.adapters import embedded, spelt

    state, records = run("embedding", pipe, dataclasses.replace(SHORT, steps=3))
    list(records)
    text = pipe.text
    ids, index = spelt(text.require_tokenizer(), text.config, "mill", 2, ["a mill by day"])
    with torch.no_grad(), embedded(text, state.ema.vectors, index):
        trained = text.encode(ids)
    save_embedding(tmp_path / "any name.safetensors", "mill", state.ema.vectors)
    assert pipe.load_embedding(tmp_path / "any name.safetensors") == "mill"
    assert torch.equal(pipe.text(["a mill by day"]), trained)
    assert not torch.equal(pipe.text(["a house by day"]), trained)


def test_a_lora_begins_as_nothing_and_depends_on_its_generator(pipe: TextToImage) -> None:
    first, again, other = (LowRank(pipe.unet, 3, 6.0, rng(seed)) for seed in (1, 1, 2))
    before = outputs(pipe)
    with first.beside(pipe.unet):
        assert all(map(torch.equal, outputs(pipe), before))
    one, two, three = (model.state_dict() for model in (first, again, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    downs = [key for key in one if "lora_down" in key]
    assert len(downs) == 4 * sum(isinstance(m, Attention) for m in pipe.unet.modules())
    assert not any(torch.equal(one[key], three[key]) for key in downs)
    assert {float(value) for key, value in one.items() if key.endswith("alpha")} == {6.0}


@pytest.mark.parametrize(("config", "width"), [(SD_V1, 768), (SD_V2, 1024)], ids=["1", "2"])
def test_of_stable_diffusion_it_has_the_shapes_that_others_train(config, width: int) -> None:
    """16 transformers of two attentions of four projections, in kohya's names."""
    with torch.device("meta"):
        unet = UNet(config.unet)
    state = LowRank(unet, 8, None, rng()).state_dict()
    assert len(state) == 16 * 2 * 4 * 3
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert state[f"{key}.lora_down.weight"].shape == (8, width)
    assert state[f"{key}.lora_up.weight"].shape == (640, 8)
    assert f"{key.replace('to_k', 'to_out_0')}.alpha" in state


def test_diffusers_reads_both_files(pipe: TextToImage, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    lora = LowRank(pipe.unet, 2, None, rng())
    save_lora(tmp_path / "lora.safetensors", lora)
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(
        load_file(tmp_path / "lora.safetensors")
    )
    assert len(theirs) == 2 * len(lora.keys) and len(alphas) == len(lora.keys)
    assert all(key.startswith("unet.") for key in theirs)

    vectors = randn(2, 24)
    save_embedding(tmp_path / "word.safetensors", "<mill>", vectors)
    found = load_file(tmp_path / "word.safetensors")
    read = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings
    tokens, rows = read([None], [found], SimpleNamespace(get_vocab=dict))
    assert tokens == ["<mill>"] and torch.equal(rows[0], vectors)


# ----------------------------------------------------------------------------------- the lessons


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures with captions, one of another shape."""
    folder = tmp_path / "mills"
    folder.mkdir()
    for name, size in {"one": (16, 16), "two": (40, 20)}.items():
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a mill,\n{name} \n")
    (folder / ".hidden").write_text("no picture")
    return folder


def test_a_folder_is_read_with_its_captions(folder: Path, pipe: TextToImage) -> None:
    Image.new("L", (16, 16)).save(folder / "three.jpg")
    told = read_folder(folder, "the mill")
    assert [(path.name, caption) for path, caption in told] == [
        ("one.png", "a mill, one"),
        ("three.jpg", "the mill"),
        ("two.png", "a mill, two"),
    ]
    lessons = encode_lessons(pipe, *zip(*told, strict=True))
    assert lessons.latents.shape == (3, 4, 8, 8) and lessons.captions[1] == "the mill"
    assert torch.equal(lessons.latents[0], lessons.latents[2])  # its middle is as red
    with pytest.raises(ValueError, match="2 pictures need as many captions, not 1"):
        encode_lessons(pipe, [folder / "one.png"] * 2, ["a mill"])


TEACH = {
    "lora": ["train", "lora"],
    "embedding": ["train", "embedding", "--word", "mill", "--start", "a"],
}


def teach_with(model: Path, kind: str, *args: object) -> int:
    return cli.main([*TEACH[kind], "--weights", str(model), "--device", "cpu", *map(str, args)])


KINDS = {
    "lora": ["--rank", "3", "--convolutions"],
    "embedding": ["--vectors", "2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_teaches_stops_and_goes_on(
    kind: str, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    own = KINDS[kind]
    start = ("--pictures", folder, "--out", out)
    assert teach_with(model, kind, *start, *own, "--steps", "2", "--learning-rate", "0.01") == 0
    path = out / f"{kind}.safetensors"
    assert capsys.readouterr().out == f"{path}\n"
    assert {child.name for child in out.iterdir()} == {
        f"{kind}{end}" for end in (".pt", ".jsonl", ".safetensors")
    }
    first = path.read_bytes()
    pipe = ldm.load(model, device="cpu")
    if kind == "lora":
        assert pipe.load_lora(path).layers == len(load_file(path)) // 3
        assert len(next(v for k, v in load_file(path).items() if "lora_down" in k)) == 3
    else:
        assert pipe.load_embedding(path) == "mill" and pipe.text.added_tokens == 2
    assert teach_with(model, kind, *start, *own) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert teach_with(model, kind, *start, "--resume") == 0  # at its end; and it knows its width
    assert path.read_bytes() == first


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "no pictures": ("lora", [], "needs --pictures"),
    "no folder": ("lora", ["--pictures", "nowhere"], "no folder of pictures at 'nowhere'"),
    "an empty folder": ("lora", ["--pictures", "empty"], "no picture in 'empty'"),
    "no picture": ("lora", ["--pictures", "notes"], "notes.md' is not a picture"),
    "no caption": ("lora", ["--pictures", "bare"], "write one.txt beside it, or pass one"),
    "an empty caption": ("lora", ["--pictures", "blank"], "one.txt is no caption"),
    "no rank": ("lora", ["--pictures", "mills", "--rank", "0"], "rank must be 1 to 1024"),
    "no alpha": ("lora", ["--pictures", "mills", "--alpha", "nan"], "alpha must be above 0"),
    "no steps": ("lora", ["--pictures", "mills", "--steps", "0"], "must be 1 or more"),
    "nothing to resume": ("lora", ["--pictures", "mills", "--resume"], "nothing to resume"),
    "a word for a LoRA": ("lora", ["--word", "mill"], "--word is for ldm train embedding"),
    "a rank for a word": ("embedding", ["--rank", "2"], "--rank is for ldm train lora"),
    "no vectors": (
        "embedding",
        ["--pictures", "mills", "--vectors", "76"],
        "vectors must be 1 to 75",
    ),
    "a known word": (
        "embedding",
        ["--pictures", "mills", "--word", "a"],
        "the vocabulary has the word 'a' already",
    ),
    "a word that captions lack": (
        "embedding",
        ["--pictures", "mills", "--word", "boat"],
        "the word 'boat' is not in the caption 'a mill, one'",
    ),
    "a word with a dot": ("embedding", ["--pictures", "mills", "--word", "a.b"], "without a dot"),
    "an unknown start": (
        "embedding",
        ["--pictures", "mills", "--start", "windmill"],
        "a known word of one token, not from 'windmill'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taught_is_one_line_before_any_work(
    name: str,
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, args, told = REFUSED[name]
    there = folder.parent
    for other in ("empty", "notes", "bare", "blank"):
        (there / other).mkdir()
        if other != "empty":
            (there / other / "one.png").write_bytes((folder / "one.png").read_bytes())
    (there / "notes" / "notes.md").write_text("a mill")
    (there / "notes" / "one.txt").write_text("a mill")
    (there / "blank" / "one.txt").write_text(" \n")
    monkeypatch.chdir(there)
    monkeypatch.setattr(TextToImage, "from_plans", lambda *_, **__: pytest.fail("work started"))
    assert teach_with(model, kind, *args, "--out", "run") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and told in said[0]
    assert not (there / "run").exists()


@pytest.mark.parametrize(("option", "value"), [("--pictures", "x"), ("--ema", "no")])
def test_options_of_teaching_are_for_teaching(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "clip", option, value, "--out", str(tmp_path / "run")]) == 2
    assert f"{option} is for ldm train lora and embedding" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_reads_a_picture_beside_its_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="reads 9 channels, a picture beside the latents"):
        teach.check_model(ldm.SD_V1_INPAINTING)


def test_a_checkpoint_of_a_model_of_another_width_is_refused(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    settings = EmbeddingSettings().optimisation
    TrainState(nn.ParameterDict({"vectors": nn.Parameter(randn(2, 768))}), settings).save(
        out / "embedding.pt"
    )
    before = (out / "embedding.pt").read_bytes()
    assert teach_with(model, "embedding", "--pictures", folder, "--out", out, "--resume") == 2
    assert "vectors is [2, 768] of float32, not [2, 24]" in capsys.readouterr().err
    assert (out / "embedding.pt").read_bytes() == before and len(list(out.iterdir())) == 1
