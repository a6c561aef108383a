"""Recording and editing: what is seen is what passes, and nothing stays behind."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ldm.attention import Attention, SpatialTransformer
from ldm.config import SD_V1
from ldm.observe import hooks as observe
from ldm.observe.hooks import edit, record
from ldm.speed.cpu import optimize
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from tests.helpers import (
    TRANSFORMERS_5,
    randn,
    random_stage,
    randomise,
    relative_error,
    rng,
    tiny_config,
    tiny_tokenizer,
)

CROSS = "*.cross_attention.weights"
LAYER = "mid.transformer.cross_attention"
# Sums of a few numbers of size 1 in fp32, each rounded by 6e-8.
FP32 = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def unet(device: str) -> UNet:
    unet = random_stage("unet", tiny_config())
    assert isinstance(unet, UNet)
    return unet.to(device)


@pytest.fixture
def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([981, 1])
    return randn(2, 4, 8, 8).to(device), t.to(device), randn(2, 12, 24, seed=1).to(device)


@pytest.fixture
def block(device: str) -> SpatialTransformer:
    return randomise(SpatialTransformer(16, 10, 2, norm_groups=4), rng()).to(device)


@pytest.fixture
def block_inputs(device: str) -> tuple[Tensor, Tensor]:
    return randn(2, 16, 3, 5).to(device), randn(2, 7, 10, seed=1).to(device)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


# --- What is recorded ------------------------------------------------------------------------


def test_recorded_attention_is_softmax_of_scaled_products_and_its_rows_sum_to_one(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with record(unet, f"{LAYER}.*") as seen:
        unet(*inputs)
    (weights,) = seen[f"{LAYER}.weights"]
    assert weights.shape == (2, 2, 16, 12)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), **FP32)
    q, k = seen[f"{LAYER}.to_q"][0], seen[f"{LAYER}.to_k"][0]  # (2, 16 or 12, 32)
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 16**0.5
        exponentials = scores.exp()
        by_hand = exponentials / exponentials.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(weights[:, head], by_hand, **FP32)


def test_every_named_part_can_be_seen(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with record(unet, "*.res", "mid.res?", "time_embedding", "") as seen:
        eps = unet(*inputs)
    names = ["", "time_embedding", "down.0.blocks.0.res", "down.1.blocks.0.res"]
    names += ["mid.res1", "mid.res2"]
    names += [f"up.{level}.blocks.{block}.res" for level in (0, 1) for block in (0, 1)]
    assert list(seen) == names
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(names, 1)
    assert torch.equal(seen[""][0], eps)
    assert torch.equal(seen["time_embedding"][0], unet.time_embedding(inputs[1]))
    assert torch.equal(
        seen["mid.res2"][0],
        unet.mid.res2(
            unet.mid.transformer(seen["mid.res1"][0], inputs[2]), seen["time_embedding"][0]
        ),
    )


def test_the_levels_of_a_decoder_can_be_seen(device: str) -> None:
    vae = random_stage("vae", tiny_config())
    assert isinstance(vae, AutoencoderKL)
    with record(vae.to(device), "decoder.up.*") as seen:
        vae.decode(randn(1, 4, 6, 8).to(device))
    assert seen["decoder.up.1"][0].shape == (1, 32, 12, 16)
    assert seen["decoder.up.0"][0].shape == (1, 16, 12, 16)


def test_every_call_is_kept_in_order_as_a_detached_copy(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, t, context = inputs
    with torch.enable_grad(), record(unet, "conv_in") as seen:
        for factor in (1.0, 2.0):
            unet(factor * x, t, context)
        assert len(seen["conv_in"]) == 2  # there while the run goes on
    first, second = seen["conv_in"]
    assert torch.equal(first, unet.conv_in(x))
    assert torch.equal(second, unet.conv_in(2 * x))
    assert not first.requires_grad


def test_a_copy_does_not_change_with_the_value() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    with record(model, "0") as seen:
        model(-torch.ones(3))
    assert torch.equal(seen["0"][0], -torch.ones(3))


def test_reduce_chooses_what_is_kept(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with record(unet, CROSS) as whole, record(unet, CROSS, reduce=lambda w: w[1:]) as halves:
        unet(*inputs)
    assert len(halves) == 4
    for name, (half,) in halves.items():
        assert torch.equal(half, whole[name][0][1:])
        assert half.untyped_storage().nbytes() == half.nbytes  # the rest is not held by a view


def test_reduce_must_return_a_tensor(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with (
        pytest.raises(ValueError, match="reduce must return a tensor, not float"),
        record(unet, "conv_in", reduce=lambda value: value.mean().item()),
    ):
        unet(*inputs)


def test_recording_changes_no_output(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    reference = unet(*inputs)
    with record(unet, "*"):
        watched = unet(*inputs)
    assert 0 < relative_error(watched, reference) <= 1e-5  # another path was taken
    assert torch.equal(unet(*inputs), reference)  # and left


def test_only_the_attention_that_is_named_leaves_the_fast_kernel(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fast = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or fast(*a))

    def count() -> int:
        calls.clear()
        unet(*inputs)
        return len(calls)

    assert count() == 8  # self- and cross-attention of 4 transformers
    with record(unet, "*.to_q", "*.res"):
        assert count() == 8
    with record(unet, CROSS):
        assert count() == 4
    with record(unet, f"{LAYER}.weights"):
        assert count() == 7
    assert count() == 8


def test_recordings_nest_and_overlap(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with record(unet, "conv_in") as outer:
        unet(*inputs)
        with record(unet, "conv_*") as inner:
            unet(*inputs)
        unet(*inputs)
    assert [len(v) for v in outer.values()] == [3]
    assert [len(v) for v in inner.values()] == [1, 1]
    first, second = record(unet, "conv_in"), record(unet, "conv_in")
    a, b = first.__enter__(), second.__enter__()
    unet(*inputs)
    first.__exit__(None, None, None)
    unet(*inputs)
    second.__exit__(None, None, None)
    assert (len(a["conv_in"]), len(b["conv_in"])) == (1, 2)
    assert hooks(unet) == 0


# --- Nothing stays behind ----------------------------------------------------------------------


def test_hooks_are_gone_after_the_end_and_after_an_exception(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    with record(unet, "*"):
        assert hooks(unet) > 100
        unet(*inputs)
    assert hooks(unet) == 0
    for error in (KeyError("mine"), KeyboardInterrupt()):
        # Nothing was recorded, but the exception that came first is the one that is seen.
        with pytest.raises(type(error)), record(unet, "*"):
            raise error
        assert hooks(unet) == 0


def test_hooks_are_gone_when_one_of_them_could_not_be_set(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hook: object) -> None:
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(unet.conv_out, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no more hooks"), record(unet, "conv_*"):
        pass
    assert hooks(unet) == 0


def test_hooks_are_gone_when_a_caller_leaves_a_loop(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    for _ in range(2):
        with record(unet, "conv_in") as seen:
            unet(*inputs)
            break
    assert len(seen["conv_in"]) == 1
    assert hooks(unet) == 0


# --- What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("*.cross_atention.weights", "*.cross_attention.weights"),
        ("time_embeding", "time_embedding"),
        ("mid.transformer.crossattention.weights", f"{LAYER}.weights"),
        ("down.1", "down.1.blocks.0"),  # a list of parts: it is never called
        ("down", "down.0.blocks.0"),
        ("qqqq", "time_embedding"),
    ],
)
def test_a_glob_that_names_nothing_lists_near_names(unet: UNet, glob: str, near: str) -> None:
    with pytest.raises(ValueError) as error, record(unet, "conv_in", glob):
        pytest.fail("it was accepted")
    message = str(error.value)
    assert message.startswith(f"no value is named {glob!r}; near names: ")
    assert near in message.partition("near names: ")[2].split(", ")
    assert "\n" not in message


def test_what_is_not_a_module_or_not_a_name_is_refused(unet: UNet) -> None:
    with pytest.raises(ValueError, match="say what to observe"), record(unet):
        pass
    with pytest.raises(ValueError, match="say what to observe"), record(unet, ["conv_in"]):
        pass
    with pytest.raises(ValueError, match=r"observe a module, such as pipe\.unet, not a dict"):
        record({}, "*").__enter__()


@pytest.mark.parametrize(
    ("output", "kind"),
    [(0.5, "float"), ((), "tuple"), ([None], "list"), ({"a": 1}, "dict"), (None, "NoneType")],
)
def test_a_value_without_a_tensor_is_refused(output: object, kind: str) -> None:
    part = Returns(lambda x: output)
    with (
        pytest.raises(ValueError, match=f"the module returns a {kind}, and no tensor$"),
        record(part, ""),
    ):
        part(randn(2))


def test_recording_nothing_is_an_error(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    silent = "nothing passed through conv_in, conv_out:"
    with pytest.raises(RuntimeError, match=silent), record(unet, "conv_*"):
        pass
    silent = r"nothing passed through up\.0.*, up\.0.*, up\.0.* and \d+ more:"
    with pytest.raises(RuntimeError, match=silent), record(unet, "conv_in", "up.*"):
        unet.conv_in(inputs[0])


def test_a_captured_graph_never_records_nothing(
    block: SpatialTransformer, block_inputs: tuple[Tensor, Tensor]
) -> None:
    graph = make_fx(block)(*block_inputs)  # the operations alone: it calls no part
    assert relative_error(graph(*block_inputs), block(*block_inputs)) <= 1e-5
    with pytest.raises(RuntimeError, match="captured graph"), record(block, "*.weights"):
        graph(*block_inputs)


def test_nothing_is_recorded_while_a_graph_is_being_captured(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "is_captured", lambda value: True)
    with pytest.raises(RuntimeError, match="conv_in is being captured,"), record(unet, "conv_in"):
        unet(*inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_is_refused_when_it_is_captured_and_when_it_is_replayed() -> None:
    layer, x = nn.Linear(4, 4).cuda(), torch.ones(1, 4, device="cuda")
    layer(x)  # sets up libraries, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    with pytest.raises(RuntimeError, match="captured graph"), record(layer, ""):
        graph.replay()
    with (
        pytest.raises(RuntimeError, match="is being captured"),
        record(layer, ""),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(x)


# --- Memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_v1() -> UNet:
    """Stable Diffusion v1's own UNet, on the device where tensors take no memory."""
    with torch.device("meta"):
        return UNet(SD_V1.unet)


SD_V1_INPUTS = (
    torch.empty(2, 4, 64, 64, device="meta"),
    torch.empty(2, dtype=torch.int64, device="meta"),
    torch.empty(2, 77, 768, device="meta"),
)
LARGEST = 2 * 8 * 4096 * 4096 * 4  # batch, heads, places, places, bytes


def test_sd_v1s_self_attention_is_refused_before_it_is_made_unless_asked_for_by_name(
    sd_v1: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "down.0.blocks.0.transformer.self_attention.weights"
    with record(sd_v1, name, "down.0.blocks.1.transformer.self_attention.weights") as seen:
        sd_v1(*SD_V1_INPUTS)
    assert seen[name][0].shape == (2, 8, 4096, 4096)
    assert seen[name][0].nbytes == LARGEST
    monkeypatch.setattr(
        "ldm.attention.AttentionWeights.forward", lambda *_: pytest.fail("it was made")
    )
    for reduce in (None, lambda w: w.mean(dim=1)):
        with pytest.raises(ValueError) as error, record(sd_v1, "*.weights", reduce=reduce):
            sd_v1(*SD_V1_INPUTS)
        assert str(error.value) == (
            f"{name} takes 1,073,741,824 bytes a call, more than a wildcard may (134,217,728): "
            "record it by its full name, or raise max_bytes"
        )
    assert hooks(sd_v1) == 0


def test_sd_v1s_cross_attention_is_within_the_bound(sd_v1: UNet) -> None:
    with record(sd_v1, CROSS) as seen:
        sd_v1(*SD_V1_INPUTS)
    assert len(seen) == 16
    sizes = {64: 5, 32: 5, 16: 5, 8: 1}  # layers per size
    expected = sum(n * 2 * 8 * side**2 * 77 * 4 for side, n in sizes.items())
    assert sum(value.nbytes for (value,) in seen.values()) == expected
    assert 50 * expected <= observe.MAX_BYTES  # a whole run of the default length


def test_max_bytes_bounds_what_wildcards_keep_in_all(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    one = 2 * 16 * 8 * 8 * 4  # conv_in, per call
    with (
        pytest.raises(ValueError) as error,
        record(unet, "conv_i*", max_bytes=80 * one) as seen,
    ):
        for _ in range(85):
            unet.conv_in(inputs[0])
    assert len(seen["conv_in"]) == 80
    assert str(error.value) == (
        f"with conv_in the recording would take {81 * one:,} bytes, more than "
        f"max_bytes={80 * one:,}: reduce the values, name fewer, or raise max_bytes"
    )
    for globs, bound in ((["conv_in"], 80 * one), (["conv_i*"], None)):
        with record(unet, *globs, max_bytes=bound) as seen:
            for _ in range(85):
                unet.conv_in(inputs[0])
        assert len(seen["conv_in"]) == 85
    with record(unet, "conv_i*", max_bytes=80 * one, reduce=lambda v: v[:1]) as seen:
        for _ in range(160):
            unet.conv_in(inputs[0])
    assert len(seen["conv_in"]) == 160


# --- Editing -------------------------------------------------------------------------------------


def without_token(unet: UNet, token: int, x: Tensor, context: Tensor) -> Tensor:
    """The output of the middle's cross-attention as if one token's weights were 0."""
    layer = unet.mid.transformer.cross_attention
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 4, dim=-1)
        weights[..., token] = 0
        heads.append(weights @ v[..., part])
    return layer.to_out(torch.cat(heads, dim=-1))


def test_a_token_can_be_blinded(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    mask = (torch.arange(12) != 3).to(inputs[0])
    names = []

    def blind(name: str, weights: Tensor) -> Tensor:
        names.append(name)
        return weights * mask

    plain = unet(*inputs)
    with edit(unet, f"{LAYER}.weights", by=blind), record(unet, LAYER) as seen:
        edited = unet(*inputs)
    assert names == [f"{LAYER}.weights"]
    with record(unet, "mid.transformer.norm2") as before:
        unet(*inputs)
    expected = without_token(unet, 3, before["mid.transformer.norm2"][0], inputs[2])
    torch.testing.assert_close(seen[LAYER][0], expected, **FP32)
    assert relative_error(edited, plain) > 1e-3
    assert torch.equal(unet(*inputs), plain)
    assert hooks(unet) == 0


def test_an_edit_that_returns_none_only_looks(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    plain, shapes = unet(*inputs), []
    with edit(unet, "mid.res1", by=lambda name, value: shapes.append(value.shape)):
        assert torch.equal(unet(*inputs), plain)
    assert shapes == [(2, 32, 4, 4)]


def test_edits_and_recordings_take_turns_in_their_order(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    def double(name: str, value: Tensor) -> Tensor:
        return 2 * value

    with (
        record(unet, "mid.res1") as before,
        edit(unet, "mid.res1", by=double),
        edit(unet, "mid.res1", by=double),
        record(unet, "mid.res1") as after,
    ):
        unet(*inputs)
    assert torch.equal(after["mid.res1"][0], 4 * before["mid.res1"][0])


def test_gradients_pass_an_edit(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    scale = torch.ones((), device=inputs[0].device, requires_grad=True)
    with torch.enable_grad(), edit(unet, "mid.res1", by=lambda name, value: scale * value):
        unet(*inputs).square().sum().backward()
    assert scale.grad is not None and scale.grad.abs() > 0


def test_an_edit_that_does_not_fit_or_never_happens_is_an_error(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    for by, message in (
        (lambda name, value: value[:1], r"returned \(1, 16, 8, 8\) float32 on .*, not \(2, 16"),
        (lambda name, value: value.double(), r"\(2, 16, 8, 8\) float64 on .*, not"),
        (lambda name, value: 0.0, "must return a tensor or None, not float"),
    ):
        with pytest.raises(ValueError, match=message), edit(unet, "conv_in", by=by):
            unet(*inputs)
    with (
        pytest.raises(RuntimeError, match="nothing passed"),
        edit(unet, "conv_in", by=lambda name, value: None),
    ):
        pass
    with pytest.raises(ValueError, match="near names: conv_in"):
        edit(unet, "convin", by=lambda name, value: None).__enter__()
    assert hooks(unet) == 0


# --- Parts that return several things ----------------------------------------------------------


class Returns(nn.Module):
    """A part that returns what a function makes of its input."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(x)


class Pair(NamedTuple):
    label: str
    value: Tensor


SEVERAL: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x + 1, x + 2, None),
    "tuple that begins otherwise": lambda x: (None, x + 1, x + 2),
    "named tuple": lambda x: Pair("a", x + 1),
    "list": lambda x: [x + 1],
    "mapping": lambda x: {"label": "a", "value": x + 1, "other": x + 2},
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_things_the_first_tensor_is_recorded_and_edited(kind: str) -> None:
    part, x = Returns(SEVERAL[kind]), randn(3)
    expected = SEVERAL[kind](x)
    with (
        record(part, "") as before,
        edit(part, "", by=lambda name, value: 10 * value),
        record(part, "") as after,
    ):
        found = part(x)
    assert torch.equal(before[""][0], x + 1)
    assert torch.equal(after[""][0], 10 * (x + 1))
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    assert len(found) == len(expected)
    edited = 0
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(one, other if edited else 10 * (x + 1))
            edited += 1
        else:
            assert one == other


def test_a_reconstruction_is_the_value_of_the_whole_autoencoder() -> None:
    vae = random_stage("vae", tiny_config())
    with record(vae, "") as seen:
        reconstruction, _ = vae(randn(1, 3, 8, 8))
    assert torch.equal(seen[""][0], reconstruction)


def test_every_part_of_the_text_encoder_can_be_recorded() -> None:
    text = random_stage("text", tiny_config(), tokenizer=tiny_tokenizer())
    assert isinstance(text, CLIPTextEncoder)
    plain = text(["a red house"])
    with record(text, "*") as seen:
        context = text(["a red house"])
    assert torch.equal(context, plain)
    assert set(seen) >= {"transformer", "transformer.encoder", "transformer.encoder.layers.0"}
    assert all(len(values) == 1 for values in seen.values())
    assert torch.equal(seen["transformer"][0], context)
    last = seen[f"transformer.encoder.layers.{text.config.num_layers - 1}"][0]
    assert torch.equal(seen["transformer.encoder"][0], last)
    assert torch.equal(text.transformer.final_layer_norm(last), context)


@pytest.mark.parametrize("name", ["transformer", "transformer.encoder.layers.1.self_attn"])
def test_what_the_text_encoder_returns_with_other_things_can_be_edited(name: str) -> None:
    text = random_stage("text", tiny_config())
    assert isinstance(text, CLIPTextEncoder)
    ids = torch.arange(12)[None]
    with record(text, name) as before:
        plain = text.encode(ids)
    with edit(text, name, by=lambda _, value: 2 * value), record(text, name) as after:
        edited = text.encode(ids)
    assert torch.equal(after[name][0], 2 * before[name][0])
    assert relative_error(edited, plain) > 1e-2
    assert torch.equal(text.encode(ids), plain)


def test_a_layer_of_the_text_encoder_that_returns_a_tuple_is_seen_and_edited() -> None:
    """As transformers 4 has them, whichever is here."""
    text = random_stage("text", tiny_config())
    assert isinstance(text, CLIPTextEncoder)
    ids, name = torch.arange(12)[None], "transformer.encoder.layers.1"
    with record(text, name) as expected:
        text.encode(ids)
    layer = text.get_submodule(name)
    # The first hook makes the tuple, the last takes it apart, where the encoder expects a tensor.
    with contextlib.ExitStack() as stack:
        if TRANSFORMERS_5:
            stack.callback(layer.register_forward_hook(lambda part, x, y: (y,)).remove)
        found = stack.enter_context(record(text, name))
        stack.enter_context(edit(text, name, by=lambda _, value: 2 * value))
        edited = stack.enter_context(record(text, name))
        if TRANSFORMERS_5:
            stack.callback(layer.register_forward_hook(lambda part, x, y: y[0]).remove)
        text.encode(ids)
    assert torch.equal(found[name][0], expected[name][0])
    assert torch.equal(edited[name][0], 2 * expected[name][0])


# --- Threads -----------------------------------------------------------------------------------


@contextlib.contextmanager
def elsewhere(enter: Callable[[], Any], inside: Callable[[Any], object]) -> Iterator[Future[Any]]:
    """Another thread that has entered a `with` before the body here begins, and only when the body
    has ended does something inside of it; the future is what `inside` returned."""
    entered, go_on = threading.Event(), threading.Event()

    def work() -> object:
        with torch.no_grad(), enter() as what:
            entered.set()
            assert go_on.wait(60)
            return inside(what)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        assert entered.wait(60) or future.result()
        try:
            yield future
        finally:
            go_on.set()
        future.result()


def test_a_recording_sees_nothing_of_what_another_thread_draws(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, t, context = inputs
    plain = unet(*inputs)

    def draw(seen: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        unet(2 * x, t, context)
        return seen

    with elsewhere(lambda: record(unet, "conv_in", CROSS), draw) as future:
        for _ in range(2):
            # Nor does the other's watched attention change a bit of what is drawn here.
            assert torch.equal(unet(*inputs), plain)
    seen = future.result()
    assert {len(values) for values in seen.values()} == {1}
    assert torch.equal(seen["conv_in"][0], unet.conv_in(2 * x))
    assert hooks(unet) == 0


def test_an_edit_changes_nothing_of_what_another_thread_draws(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    plain = unet(*inputs)
    names = ("mid.res1", f"{LAYER}.weights")

    def zero(name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    with edit(unet, *names, by=zero):
        edited = unet(*inputs)
    with elsewhere(lambda: edit(unet, *names, by=zero), lambda _: unet(*inputs)) as future:
        assert torch.equal(unet(*inputs), plain)
        with record(unet, "mid.res1") as seen:  # each has its own hooks on one part
            unet(*inputs)
        assert seen["mid.res1"][0].abs().max() > 0
    assert torch.equal(future.result(), edited)
    assert relative_error(edited, plain) > 1e-3
    assert hooks(unet) == 0


def test_another_threads_recording_leaves_the_fast_layers_fast(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    optimize(unet)
    plain = unet(*inputs)
    with elsewhere(lambda: record(unet, "*"), lambda _: unet(*inputs)):
        assert torch.equal(unet(*inputs), plain)
    with record(unet, "*"):
        assert not torch.equal(unet(*inputs), plain)


def test_what_only_another_thread_drew_is_not_recorded(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    def draw() -> None:
        with torch.no_grad():
            unet(*inputs)

    silent = "nothing passed through conv_in: never called in this thread, or"
    with pytest.raises(RuntimeError, match=silent), record(unet, "conv_in") as seen:
        other = threading.Thread(target=draw)
        other.start()
        other.join()
    assert seen == {"conv_in": []}


def test_a_generator_that_records_sees_what_is_drawn_between_its_steps(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Its recording is open while it waits, as any `with` is, and goes when it is closed."""

    def steps() -> Iterator[int]:
        with record(unet, "conv_in") as seen:
            while True:
                unet(*inputs)
                yield len(seen["conv_in"])

    run = steps()
    assert next(run) == 1
    with record(unet, "conv_*") as inner:
        unet(*inputs)
    assert [len(values) for values in inner.values()] == [1, 1]
    assert next(run) == 3
    run.close()
    assert hooks(unet) == 0


def test_two_threads_record_one_model_at_once(
    unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, t, context = inputs
    together = threading.Barrier(2, timeout=60)

    def draw(factor: float) -> list[Tensor]:
        with torch.no_grad(), record(unet, "conv_in") as seen:
            for _ in range(5):
                together.wait()
                unet(factor * x, t, context)
        return seen["conv_in"]

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(draw, (1.0, 2.0)))
    for factor, seen in zip((1.0, 2.0), both, strict=True):
        assert len(seen) == 5
        assert all(torch.equal(value, unet.conv_in(factor * x)) for value in seen)
    assert hooks(unet) == 0


# --- Compiled modules --------------------------------------------------------------------------


class Counting:
    """A backend of torch.compile that runs graphs as they are, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: nn.Module, example: list[Tensor]) -> object:
        def run(*inputs: Tensor) -> object:
            self.runs += 1
            return graph(*inputs)

        return run


class Words(nn.Module):
    """A projection, and cross-attention: each compiles in half the time of a whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(16, 16)
        self.cross_attention = Attention(16, 10, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.cross_attention(self.proj_in(x), context)


@pytest.fixture
def words(device: str) -> Words:
    words = randomise(Words(), rng()).to(device)
    assert isinstance(words, Words)
    return words


@pytest.fixture
def words_inputs(device: str) -> tuple[Tensor, Tensor]:
    return randn(2, 15, 16).to(device), randn(2, 7, 10, seed=1).to(device)


@pytest.mark.compile
@pytest.mark.parametrize("way", ["wrapped", "in place", "a part", "a function"])
def test_a_compiled_module_is_recorded_and_stays_compiled(
    words: Words, words_inputs: tuple[Tensor, Tensor], way: str
) -> None:
    names = (CROSS.removeprefix("*."), "cross_attention", "proj_in")
    with record(words, *names) as expected:
        words(*words_inputs)
    plain, backend = words(*words_inputs), Counting()
    observed, run = words, words
    if way == "wrapped":
        observed = run = torch.compile(words, backend=backend, fullgraph=True)
    elif way == "in place":
        words.compile(backend=backend, fullgraph=True)
    elif way == "a part":
        words.cross_attention = torch.compile(words.cross_attention, backend=backend)
    else:
        run = torch.compile(lambda *a: words(*a), backend=backend)

    for _ in range(2):  # also after a recording
        assert relative_error(run(*words_inputs), plain) <= 1e-5
        runs = backend.runs
        with record(observed, *names) as seen, record(observed, names[0]) as again:
            run(*words_inputs)
        assert backend.runs == runs > 0
        assert seen.keys() == expected.keys()
        for name, (value,) in seen.items():
            assert relative_error(value, expected[name][0]) <= 1e-5
        assert torch.equal(again[names[0]][0], seen[names[0]][0])
    run(*words_inputs)
    assert backend.runs > runs
    assert hooks(words) == 0


@pytest.mark.compile
def test_compiled_code_runs_again_only_when_the_last_observer_has_left(
    words: Words, words_inputs: tuple[Tensor, Tensor]
) -> None:
    backend = Counting()
    compiled = torch.compile(words, backend=backend)
    compiled(*words_inputs)
    runs = backend.runs
    first, second = record(compiled, "proj_in"), record(compiled, "proj_in")
    first.__enter__()
    seen = second.__enter__()
    compiled(*words_inputs)
    first.__exit__(None, None, None)
    compiled(*words_inputs)
    second.__exit__(None, None, None)
    assert len(seen["proj_in"]) == 2
    assert backend.runs == runs
    compiled(*words_inputs)
    assert backend.runs > runs


@pytest.mark.compile
def test_compiling_what_is_being_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The recording begins where torch.compile has not been loaded, or seems not to have been.
    monkeypatch.setattr(observe, "sys", types.SimpleNamespace(modules={}))
    layer, x = nn.Linear(8, 8), torch.ones(1, 8)
    compiled = torch.compile(layer, backend="eager")
    refused = "the module is being captured, and replays pass hooks by:"
    with pytest.raises(RuntimeError, match=refused), record(layer, "") as seen:
        compiled(x)
    monkeypatch.undo()
    assert torch.equal(compiled(x), layer(x))
    assert seen == {"": []}
    with record(compiled, "") as seen:
        compiled(x)
    assert len(seen[""]) == 1
