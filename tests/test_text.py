"""The text encoder; the parity tests hold its arithmetic to transformers'."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

from ldm.config import HORIZON, SD_V1, TextConfig
from ldm.prompts import Reading
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from tests.helpers import (
    assert_stage_agrees_across_dtypes,
    random_stage,
    randomise,
    relative_error,
    rng,
    text_in_fp64,
    tiny_config,
)

TINY = tiny_config().text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["a red house on green grass at night", "the white house by the lake"]
    return Tokenizer.train(texts * 5, vocab_size=TINY.vocab_size)


def tiny(tokenizer: Tokenizer | None = None, device: str = "cpu") -> CLIPTextEncoder:
    return random_stage("text", tiny_config(), tokenizer=tokenizer).to(device)


def some_ids(device: str = "cpu") -> Tensor:
    ids = torch.randint(0, TINY.bos_token_id, (2, TINY.max_length), generator=rng(1))
    return ids.to(device)


# --- Prompts to ids --------------------------------------------------------------------------


def test_prompts_are_wrapped_and_filled_with_the_end_token(
    tokenizer: Tokenizer, device: str
) -> None:
    ids = tiny(tokenizer, device).tokenize(["the house", ""])
    words = tokenizer.encode("the house")
    bos, eos = TINY.bos_token_id, TINY.eos_token_id
    assert ids.dtype == torch.int64 and ids.device.type == device
    fill = TINY.max_length - 1 - len(words)
    assert ids.tolist() == [[bos, *words, *[eos] * fill], [bos, *[eos] * (TINY.max_length - 1)]]


def test_prompt_that_just_fits_does_not_warn(tokenizer: Tokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tiny(tokenizer).tokenize(["1" * (TINY.max_length - 2)])
    assert (ids == TINY.eos_token_id).sum() == 1


def test_long_prompt_is_cut_and_warns_with_the_lost_words(tokenizer: Tokenizer) -> None:
    prompt = "1 " * (TINY.max_length - 2) + "the red café"
    lost = len(tokenizer.encode("the red café"))
    with pytest.warns(UserWarning, match=f"{lost} tokens too long.*'the red café'"):
        ids = tiny(tokenizer).tokenize([prompt])
    bos, eos, one = TINY.bos_token_id, TINY.eos_token_id, tokenizer.encode("1")[0]
    assert ids.tolist() == [[bos, *[one] * (TINY.max_length - 2), eos]]


def test_one_string_for_a_list_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="list of prompts"):
        tiny(tokenizer).tokenize("a house")


def test_what_is_no_list_of_prompts_is_refused(tokenizer: Tokenizer) -> None:
    text = tiny(tokenizer)
    with pytest.raises(ValueError, match=r"token ids are for encode\(ids\)"):
        text(some_ids())
    for wrong in ([], [1, 2], ["a house", None]):
        with pytest.raises(ValueError, match="prompts must be a list of strings, not"):
            text(wrong)


@pytest.mark.parametrize(
    "ids, match",
    [
        (["a house"], r"ids must be a tensor of int64.*not list"),
        (torch.zeros(1, 4), r"ids must be a tensor of int64.*not torch.float32"),
        (torch.zeros(4, dtype=torch.int64), r"ids must be \(B, 12\) or fewer places, not \(4,\)"),
        (torch.zeros(1, 13, dtype=torch.int64), r"ids must be \(B, 12\) or fewer.*not \(1, 13\)"),
        (torch.zeros(0, 12, dtype=torch.int64), r"ids must be \(B, 12\) or fewer.*not \(0, 12\)"),
        (torch.tensor([[3, -1]]), "ids must be between 0 and 529, not -1"),
        (torch.tensor([[530, 3]]), "ids must be between 0 and 529, not 530"),
    ],
)
def test_what_are_no_token_ids_are_refused(ids: object, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        random_stage("text", tiny_config()).encode(ids)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_there_are_ids_only() -> None:
    text = tiny()
    assert text.encode(some_ids()).shape == (2, TINY.max_length, TINY.hidden_size)
    with pytest.raises(ValueError, match="no tokenizer"):
        text(["a house"])
    with pytest.raises(ValueError, match="no tokenizer"):
        text.token_strings(some_ids())


@pytest.mark.parametrize("change", ["vocab_size", "bos_token_id", "eos_token_id"])
def test_tokenizer_of_another_vocabulary_is_refused(tokenizer: Tokenizer, change: str) -> None:
    step = 1 if change == "vocab_size" else -1
    config = dataclasses.replace(TINY, **{change: getattr(TINY, change) + step})
    with pytest.raises(ValueError, match=str(getattr(config, change))):
        CLIPTextEncoder(config, tokenizer)


def test_token_strings_show_where_words_end(tokenizer: Tokenizer) -> None:
    text = tiny(tokenizer)
    rows = text.token_strings(text.tokenize(["the house"]))
    assert rows[0][:4] == ["<|startoftext|>", "the</w>", "house</w>", "<|endoftext|>"]
    assert len(rows[0]) == TINY.max_length


@torch.no_grad()
def test_prompts_to_context_is_tokenize_then_encode(tokenizer: Tokenizer, device: str) -> None:
    text = tiny(tokenizer, device)
    prompts = ["the red house", "a lake at night"]
    context = text(prompts)
    assert context.shape == (2, TINY.max_length, TINY.hidden_size)
    assert torch.equal(context, text.encode(text.tokenize(prompts)))


# --- Other ways to read a prompt -------------------------------------------------------------

LONG = Reading(long_prompts=True)
WEIGHING = Reading(weighting=True)


@torch.no_grad()
def test_left_out_layers_are_those_of_a_shorter_encoder() -> None:
    """Its final norm takes the states before the layers that are left out."""
    text = tiny()
    shorter = CLIPTextEncoder(dataclasses.replace(TINY, num_layers=1)).eval()
    shorter.load_state_dict({k: v for k, v in text.state_dict().items() if ".layers.1." not in k})
    assert torch.equal(text.encode(some_ids(), clip_skip=1), shorter.encode(some_ids()))
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"^clip_skip must be between 0 and 1, not {wrong}$"):
            text.encode(some_ids(), clip_skip=wrong)


@torch.no_grad()
def test_brackets_weigh_the_states_of_the_words_within(tokenizer: Tokenizer, device: str) -> None:
    text = tiny(tokenizer, device)
    plain = text(["the red house at night"])
    assert torch.equal(text(["the red house at night"], WEIGHING), plain)
    before, red = tokenizer.encode("the"), tokenizer.encode("red")
    start = 1 + len(before)
    expected = plain.clone()
    expected[:, start : start + len(red)] *= 1.5
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(text(["the (red:1.5) house at night"], WEIGHING), expected)


def test_brackets_are_text_unless_asked(tokenizer: Tokenizer) -> None:
    text, red = tiny(tokenizer), tokenizer.encode("red")
    ids, weights = text.read("(red:1.5)")
    brackets = tokenizer.encode("(red:1.5)")
    assert ids[0, 1 : 1 + len(brackets)].tolist() == brackets
    assert weights.unique().tolist() == [1.0]
    ids, weights = text.read("(red:1.5)", WEIGHING)
    assert torch.equal(ids, text.tokenize(["red"]))
    rest = TINY.max_length - 1 - len(red)
    assert weights.tolist() == [[1.0, *[1.5] * len(red), *[1.0] * rest]]


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks_and_nothing_is_left_out(tokenizer: Tokenizer) -> None:
    text, room = tiny(tokenizer), TINY.max_length - 2
    first, second = "1 " * room, "the red house"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, weights = text.read(first + second, LONG)
        context = text([first + second], LONG)
    assert torch.equal(ids, text.tokenize([first, second]))
    assert torch.equal(weights, torch.ones(2, TINY.max_length))
    apart = text([first, second])  # (2, L, D)
    assert torch.equal(context, apart.reshape(1, 2 * TINY.max_length, TINY.hidden_size))
    with pytest.warns(UserWarning, match="'the red house'"):
        assert torch.equal(text([first + second]), text([first]))


@torch.no_grad()
def test_a_short_prompt_is_filled_with_chunks_of_no_words(tokenizer: Tokenizer) -> None:
    text, room = tiny(tokenizer), TINY.max_length - 2
    long = "1 " * (room + 1)
    context = text(["the house", long], LONG)
    assert context.shape == (2, 2 * TINY.max_length, TINY.hidden_size)
    assert torch.equal(text.read("the house", LONG, 2)[0], text.tokenize(["the house", ""]))
    assert torch.equal(text(["the house"], LONG, chunks=2), text(["the house", long], LONG)[:1])
    assert text(["the house"], LONG).shape[1] == TINY.max_length
    counts = {0: 1, 1: 1, room: 1, room + 1: 2, 3 * room: 3}
    assert {n: text.chunks("1 " * n, LONG) for n in counts} == counts


@torch.no_grad()
def test_each_chunk_keeps_its_own_mean(tokenizer: Tokenizer) -> None:
    text, room = tiny(tokenizer), TINY.max_length - 2
    long = "(" + "1 " * room + ":1.2) the (house:2)"
    both = Reading(weighting=True, long_prompts=True)
    apart = text(["(" + "1 " * room + ":1.2)", "the (house:2)"], WEIGHING)
    assert torch.equal(text([long], both), apart.reshape(1, -1, TINY.hidden_size))


# --- Ids to context --------------------------------------------------------------------------


@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_everything_from_it_on(device: str) -> None:
    text = tiny(device=device)
    ids = some_ids(device)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % TINY.bos_token_id
    before, after = text.encode(ids), text.encode(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    differences = (before - after)[:, 5:].abs().amax(dim=-1)  # (B, L - 5)
    assert differences.min() > 1e-4


@torch.no_grad()
def test_padding_is_seen() -> None:
    """No padding mask: the places after the prompt attend to the fill, and differ by it."""
    text = tiny()
    ids = some_ids()
    ids[:, 6:] = TINY.eos_token_id
    refilled = ids.clone()
    refilled[:, 8] = 3
    assert relative_error(text.encode(refilled)[:, 9:], text.encode(ids)[:, 9:]) > 1e-2


@torch.no_grad()
def test_context_is_the_last_state_after_the_final_layer_norm() -> None:
    text = tiny()
    norm = text.transformer.final_layer_norm
    normalised = (text.encode(some_ids()) - norm.bias) / norm.weight
    # A layer norm's output has mean 0 and variance 1 but for eps and fp32 rounding.
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    variance = normalised.var(-1, correction=0)
    torch.testing.assert_close(variance, torch.ones(2, 12), rtol=0, atol=1e-4)


@torch.no_grad()
def test_encoder_is_a_pre_norm_transformer_with_quick_gelu(device: str) -> None:
    """The whole encoder, written out (CLIP section 2.4), from its parameters."""
    text = tiny(device=device)
    p = {name: parameter.double() for name, parameter in text.named_parameters()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"transformer.{name}.weight"].T + p[f"transformer.{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * p[f"transformer.{name}.weight"] + p[f"transformer.{name}.bias"]

    ids = some_ids(device)
    h = p["transformer.embeddings.token_embedding.weight"][ids]
    h = h + p["transformer.embeddings.position_embedding.weight"]
    future = torch.ones(12, 12, device=device).triu(1).bool()
    for i in range(TINY.num_layers):
        layer = f"encoder.layers.{i}"
        x = norm(f"{layer}.layer_norm1", h)
        q, k, v = (
            linear(f"{layer}.self_attn.{a}_proj", x).view(2, 12, 2, 12).transpose(1, 2)
            for a in "qkv"
        )
        scores = (q @ k.transpose(2, 3) / 12**0.5).masked_fill(future, -torch.inf)
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 24)
        h = h + linear(f"{layer}.self_attn.out_proj", x)
        x = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", h))
        h = h + linear(f"{layer}.mlp.fc2", x * torch.sigmoid(1.702 * x))
    # The encoder's fp32 rounding through two layers, on outputs of size 1; measured 1e-6. GELU and
    # quick GELU differ by up to 2e-2.
    expected = norm("final_layer_norm", h)
    torch.testing.assert_close(text.encode(ids).double(), expected, rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter(device: str) -> None:
    text = tiny(device=device)
    text.encode(some_ids(device)).square().sum().backward()
    # A layer norm's output has a fixed sum of squares but for weight and bias: so those two of the
    # last one have a gradient, and what comes before it has a small one.
    for key, parameter in text.named_parameters():
        if key.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query: softmax does not see it
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


# --- Construction ----------------------------------------------------------------------------


# Horizon's by hand: (695 + 40) 128 for the embeddings, 4 layers of 4 (128^2 + 128) for attention,
# 2 128 512 + 512 + 128 for the MLP and 4 128 for two norms, and 2 128 for the last norm.
@pytest.mark.parametrize(
    "config, count", [(SD_V1.text, 123_060_480), (HORIZON.text, 887_808)], ids=["sd-v1", "horizon"]
)
def test_number_of_parameters(config: TextConfig, count: int) -> None:
    with torch.device("meta"):
        text = CLIPTextEncoder(config)
    assert sum(p.numel() for p in text.parameters()) == count


@torch.no_grad()
def test_rebuild_buffers_completes_a_model_built_on_meta(device: str) -> None:
    whole = tiny(device=device)
    with torch.device("meta"):
        text = CLIPTextEncoder(TINY)
    text.load_state_dict(whole.state_dict(), strict=True, assign=True)
    assert any(b.is_meta for b in text.buffers())  # what is to be repaired
    text.rebuild_buffers()
    assert not any(b.is_meta for b in text.buffers())
    assert text.state_dict().keys() == whole.state_dict().keys()
    ids = some_ids(device)
    assert torch.equal(text.eval().encode(ids), whole.encode(ids))


@torch.no_grad()
def test_keys_and_context_are_the_same_with_transformers_4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 5.6, CLIPTextModel held the transformer as `text_model`; later it is the model
    itself. Whichever is installed, the other is played here."""
    import transformers

    real = transformers.CLIPTextModel
    expected = tiny()

    class Other(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            self.text_model = real(config)

    class Flat:
        def __new__(cls, config) -> nn.Module:
            return real(config).text_model

    is_wrapped = hasattr(real(transformers.CLIPTextConfig(num_hidden_layers=1)), "text_model")
    monkeypatch.setattr(transformers, "CLIPTextModel", Flat if is_wrapped else Other)
    other = tiny()
    assert "transformer.final_layer_norm.weight" in other.state_dict()
    assert other.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(other.encode(some_ids()), expected.encode(some_ids()))
    assert other.device == torch.device("cpu")


# --- Precision -------------------------------------------------------------------------------


@text_in_fp64
def test_half_precision_stays_close(device: str) -> None:
    # fp32: rounding through two layers. Half precision: bfloat16 rounds each of a dozen results by
    # up to 2^-9 = 0.2 %, and the largest error among all outputs is some four times the usual one;
    # measured 2.4 % of the std in bfloat16, 7e-7 in fp32.
    assert_stage_agrees_across_dtypes(
        lambda text, ids: text.encode(ids), (some_ids(),), tiny(), device, fp32=1e-5, half=0.1
    )


@pytest.mark.compile
@torch.no_grad()
def test_compiled_encoder_equals_eager(device: str) -> None:
    config = dataclasses.replace(tiny_config(), text=dataclasses.replace(TINY, num_layers=1))
    text = random_stage("text", config).to(device)
    ids = some_ids(device)
    compiled = torch.compile(text.encode, backend="inductor")
    # Fused kernels add in another order: fp32 rounding, on outputs of size 1.
    torch.testing.assert_close(compiled(ids), text.encode(ids), rtol=0, atol=1e-5)


def test_randomise_draws_every_parameter_of_a_fresh_encoder() -> None:
    """The helper that all stage tests rest on."""
    first = randomise(CLIPTextEncoder(TINY), rng(0)).state_dict()
    again = randomise(CLIPTextEncoder(TINY), rng(0)).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
