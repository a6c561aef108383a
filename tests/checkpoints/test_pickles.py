"""PyTorch checkpoints: real ones are read as torch reads them, and none is ever run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickle
import struct
import sys
import time
import tracemalloc
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.archive import MappedFile
from ldm.errors import CheckpointError, TruncatedError, UnreadableError, UnsafePickleError
from ldm.checkpoints.pickles import PURSE, TorchPickle, read_torch_legacy, read_torch_zip
from tests.checkpoints import malicious
from tests.helpers import a_million_dicts, randn
from tests.checkpoints.malicious import (
    CONTAINERS,
    GREEDY,
    LEGACY_HEAD,
    MALICIOUS,
    STORED,
    call,
    group,
    legacy_file,
    legacy_sections,
    listed,
    name,
    number,
    pickle_of,
    registered_extensions,
    storage,
    table,
    tensor,
    text,
    zip_file,
)

READERS = {"zip": read_torch_zip, "legacy": read_torch_legacy}


@pytest.fixture(params=["zip", "legacy"])
def container(request: pytest.FixtureRequest) -> str:
    return request.param


def save(content: object, path: Path, container: str, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # legacy saving reads private parts of TypedStorage
        zipped = container == "zip"
        torch.save(content, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def read(path: Path, container: str) -> TorchPickle:
    return READERS[container](MappedFile(path))


def read_bytes(data: bytes, container: str, tmp_path: Path) -> TorchPickle:
    path = tmp_path / "weights"
    path.write_bytes(data)
    return read(path, container)


def bits(tensor: Tensor) -> Tensor:
    row_by_row = tensor.detach().clone(memory_format=torch.contiguous_format)
    return row_by_row.reshape(-1).view(torch.uint8)


def assert_same(pickled: TorchPickle, expected: Mapping[str, Tensor]) -> None:
    """The same keys in the same order, and for each the same type, shape and bytes."""
    assert list(pickled.entries) == list(expected)
    for key, value in expected.items():
        mapped = pickled.entries[key].map()
        assert (mapped.dtype, mapped.shape) == (value.dtype, value.shape), key
        assert torch.equal(bits(mapped), bits(value)), key


def refusal(
    data: bytes, container: str, tmp_path: Path, error: type[CheckpointError] = UnreadableError
) -> str:
    """What the error says behind the file's name."""
    with pytest.raises(error) as raised:
        read_bytes(data, container, tmp_path)
    assert type(raised.value) is error
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'weights'} ") and message.isprintable()
    return message.removeprefix(f"{tmp_path / 'weights'} ")


# --- What torch writes -----------------------------------------------------------------------


def state_dict() -> OrderedDict[str, Tensor]:
    state = OrderedDict(a=randn(3, 4), b=randn(5, seed=1))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        dict,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {"state_dict": state}},
        lambda state: {"epoch": 3, "state_dict": {"version": "1", "state_dict": state}},
    ],
    ids=["bare", "a dict", "wrapped", "wrapped twice", "among others"],
)
def test_a_state_dict_has_the_same_keys_however_it_is_wrapped(
    tmp_path: Path, container: str, wrap: Callable[[Any], object]
) -> None:
    path = save(wrap(state_dict()), tmp_path / "w.ckpt", container)
    pickled = read(path, container)
    assert_same(pickled, state_dict())
    assert pickled.stubs == ()


def test_what_is_beside_a_state_dict_has_its_way_as_a_key(tmp_path: Path, container: str) -> None:
    moments = {"step": 7, "exp_avg": randn(2, 3)}
    content = {
        "optimizer_states": [{"state": {12: moments}, "param_groups": [{"params": [0, 1]}]}],
        "state_dict": {"w": randn(2, seed=1), "state_dict": randn(3, seed=2)},
        "model": {"state_dict": {"w": randn(4, seed=3)}},
        "pair": (randn(1, seed=4), [randn(1, seed=5)]),
    }
    pickled = read(save(content, tmp_path / "w.ckpt", container), container)
    assert_same(
        pickled,
        {
            "optimizer_states.0.state.12.exp_avg": moments["exp_avg"],
            "w": content["state_dict"]["w"],
            "state_dict": content["state_dict"]["state_dict"],
            "model.state_dict.w": content["model"]["state_dict"]["w"],
            "pair.0": content["pair"][0],
            "pair.1.0": content["pair"][1][0],
        },
    )


def test_a_tensor_alone_has_no_key(tmp_path: Path, container: str) -> None:
    assert_same(read(save(randn(3), tmp_path / "w", container), container), {"": randn(3)})


def test_nothing_saved_is_nothing_read(tmp_path: Path, container: str) -> None:
    assert read(save({}, tmp_path / "w", container), container) == TorchPickle({}, ())


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, container: str, protocol: int) -> None:
    noise = torch.randint(0, 2, (16 * 12,), generator=torch.Generator().manual_seed(0))
    content = {str(dtype): noise.to(torch.uint8).view(dtype)[:6].clone() for dtype in DTYPES}
    content |= {f"{key}, 2-d": value.reshape(2, 3) for key, value in content.items()}
    path = save(content, tmp_path / "w", container, pickle_protocol=protocol)
    pickled = read(path, container)
    assert_same(pickled, content)
    if container == "zip":  # torch writes the newest types into the old container, but not back
        assert_same(pickled, torch.load(path, weights_only=False))
    assert len(pickled.entries) == 2 * len(DTYPES) and pickled.stubs == ()


def test_views_of_one_storage_are_read_as_views(tmp_path: Path, container: str) -> None:
    base = randn(4, 6)
    content = {
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "inner": base[1:3, 2:5],
        "steps": base[::2, ::3],
        "permuted": base.view(2, 2, 6).permute(2, 0, 1),
        "whole": base,
        "one": base[3, 5],
        "none": base[4:],
        "none, deep": base[:, :0].t(),
        "single": base[:, 1:2].t(),
    }
    path = save(content, tmp_path / "w", container)
    pickled = read(path, container)
    assert_same(pickled, content)
    assert_same(pickled, torch.load(path, weights_only=False))
    whole = pickled.entries["whole"]
    assert pickled.entries["row"].offset == whole.offset + 2 * 6 * 4
    assert whole.stride is None and pickled.entries["transposed"].stride == (1, 6)
    assert path.stat().st_size < 2 * 4 * base.numel() + 4000  # so they did share it


def test_no_dimensions_and_no_elements(tmp_path: Path, container: str) -> None:
    content = {"scalar": torch.tensor(2.5), "none": torch.zeros(0), "deep": torch.zeros(3, 0, 2)}
    assert_same(read(save(content, tmp_path / "w", container), container), content)


def test_a_tensor_with_two_names_is_one_entry(tmp_path: Path, container: str) -> None:
    shared = randn(3)
    pickled = read(save({"a": shared, "b": shared}, tmp_path / "w", container), container)
    assert pickled.entries["a"] is pickled.entries["b"]


def test_parameters_are_tensors(tmp_path: Path, container: str) -> None:
    plain = nn.Parameter(randn(2, 3))
    frozen = nn.Parameter(randn(4), requires_grad=False)
    tagged = nn.Parameter(randn(5))
    tagged.note = "an attribute"  # type: ignore[attr-defined]
    attributed = randn(6)
    attributed.note = {"any": "thing"}  # type: ignore[attr-defined]
    content = {"plain": plain, "frozen": frozen, "tagged": tagged, "attributed": attributed}
    content["grown"] = randn(3).requires_grad_()
    pickled = read(save(content, tmp_path / "w", container), container)
    assert_same(pickled, content)
    assert pickled.stubs == ()


class Labelled(Tensor):
    """A tensor of another class, with the same bytes."""


def test_a_subclass_is_read_as_a_tensor_and_named(tmp_path: Path, container: str) -> None:
    path = save({"w": randn(3).as_subclass(Labelled)}, tmp_path / "w", container)
    pickled = read(path, container)
    assert_same(pickled, {"w": randn(3)})
    assert pickled.stubs == (f"{__name__}.Labelled",)


def test_tensors_of_a_gpu_are_read_where_there_is_none(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = save(state_dict(), tmp_path / "w", container)
    assert b"cuda:0" in path.read_bytes()
    assert_same(read(path, container), state_dict())


@pytest.fixture
def lightning() -> Iterator[types.ModuleType]:
    """A module that is there when a checkpoint is written, and not when it is read."""
    module = types.ModuleType("pytorch_lightning")
    for attribute in ("ModelCheckpoint", "AttributeDict"):
        base = dict if attribute == "AttributeDict" else object
        made = type(attribute, (base,), {"__module__": "pytorch_lightning"})
        setattr(module, attribute, made)
    sys.modules["pytorch_lightning"] = module
    yield module
    sys.modules.pop("pytorch_lightning", None)


def test_a_training_checkpoint_is_read_without_its_code(
    tmp_path: Path, container: str, lightning: Any
) -> None:
    callback = lightning.ModelCheckpoint()
    callback.best_model_score = randn(1)
    state = state_dict()
    path = save(
        {
            "epoch": 4,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state,
            "callbacks": {
                lightning.ModelCheckpoint: {"best_model_score": randn(1), "dirpath": "/a"},
                "object": callback,
            },
            "optimizer_states": [
                {"state": {0: {"step": 1, "exp_avg": randn(2)}}, "param_groups": [{"lr": 1e-4}]}
            ],
            "lr_schedulers": [{"milestones": collections.Counter([3]), "last": np.float64(0.5)}],
            "hyper_parameters": lightning.AttributeDict(lr=1e-4, weights=randn(2)),
            "args": argparse.Namespace(seed=1, name="x" * 3000),
            "rng": np.arange(3),
            "big": 1 << 3000,
            "numbers": {1, 2, 3},
            "frozen": frozenset([1]),
            "default": collections.defaultdict(list, {"w": randn(2, seed=3)}),
        },
        tmp_path / "w.ckpt",
        container,
    )
    del sys.modules["pytorch_lightning"]
    pickled = read(path, container)
    score = "callbacks.pytorch_lightning.ModelCheckpoint.best_model_score"
    moment = "optimizer_states.0.state.0.exp_avg"
    expected = {**state, score: randn(1), moment: randn(2), "default.w": randn(2, seed=3)}
    assert_same(pickled, expected)
    # numpy's own names have moved; of the others each is there, once, in the order of the file.
    assert [stub for stub in pickled.stubs if not stub.startswith(("numpy", "_codecs"))] == [
        "pytorch_lightning.ModelCheckpoint",
        "collections.Counter",
        "pytorch_lightning.AttributeDict",
        "argparse.Namespace",
        "__builtin__.set",
        "__builtin__.frozenset",
        "__builtin__.list",
    ]
    assert any(stub.startswith("numpy") and stub.endswith("scalar") for stub in pickled.stubs)
    assert "pytorch_lightning" not in sys.modules


def short(value: str) -> bytes:
    """A string as Python 2 wrote it."""
    return pickle.SHORT_BINSTRING + bytes([len(value)]) + value.encode()


def python_2_tensor(key: str, of: bytes) -> bytes:
    kind = name("torch", of.decode())
    identity = group(short("storage"), kind, short(key), short("cpu"), number(2), pickle.NONE)
    sizes = call(name("torch", "Size"), group(number(2)))
    arguments = (identity + pickle.BINPERSID, number(0), sizes, group(number(1)))
    return call(name("torch._utils", "_rebuild_tensor"), *arguments)


def test_a_file_of_python_2_is_read(tmp_path: Path) -> None:
    """Strings of bytes, long integers as text, an OrderedDict made from a list of its pairs."""
    pairs = listed(
        pickle.EMPTY_LIST
        + pickle.MARK
        + short("w")
        + python_2_tensor("94", b"FloatStorage")
        + pickle.APPENDS,
        listed(short("count"), pickle.INT + b"9007199254740993\n"),
        listed(short("done"), pickle.INT + b"01\n"),
    )
    state = call(name("collections", "OrderedDict"), pairs)
    body = pickle.EMPTY_DICT + short("state_dict") + state + pickle.SETITEM
    keys = pickle.PROTO + b"\x02" + listed(short("94")) + pickle.STOP
    path = tmp_path / "w"
    path.write_bytes(
        legacy_sections(*LEGACY_HEAD, pickle.PROTO + b"\x02" + body + pickle.STOP, keys)
    )
    expected = torch.load(path, weights_only=False)["state_dict"]
    assert expected["count"] == 9007199254740993 and expected["done"] is True
    assert_same(read(path, "legacy"), {"w": expected["w"]})
    assert torch.equal(expected["w"], torch.tensor([1.5, -2.5]))


def test_a_key_has_an_end(tmp_path: Path, container: str) -> None:
    content = {"a" * 249: {"b" * 250: randn(1)}, "c" * 501: 1.0, "d" * 300: {"e" * 300: [2]}}
    path = save(content, tmp_path / "w", container)
    assert list(read(path, container).entries) == ["a" * 249 + "." + "b" * 250]
    for key in ("a" * 501, "a" * 100_000):
        data = save({key: randn(1)}, tmp_path / "long", container).read_bytes()
        assert "longer than 500" in refusal(data, container, tmp_path)
    data = save({"a" * 250: {"b" * 250: randn(1)}}, tmp_path / "long", container).read_bytes()
    assert "longer than 500" in refusal(data, container, tmp_path)


def test_long_strings_and_numbers_cost_nothing(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be no names: an array that was pickled as text may take megabytes."""
    monkeypatch.setattr("ldm.checkpoints.pickles.PURSE", 100_000)
    long = {"text": "x" * 200_000, "bytes": b"x" * 200_000, "number": 1 << 1_600_000}
    path = save({**long, "w": randn(1)}, tmp_path / "w", container)
    assert_same(read(path, container), {"w": randn(1)})


def test_a_key_that_no_terminal_should_see_is_escaped(tmp_path: Path, container: str) -> None:
    content = {"a\x1b[2J\nb": randn(1), "grün": randn(1, seed=1), None: {("x",): randn(1, seed=2)}}
    pickled = read(save(content, tmp_path / "w", container), container)
    assert list(pickled.entries) == ["a\\x1b[2J\\nb", "grün", "a nonetype.a tuple"]


def test_reading_keeps_no_page_and_opens_nothing_else(tmp_path: Path, container: str) -> None:
    """The bytes of tensors are not looked at: a file that is all hole but for them is as quick."""
    path = save({"w": torch.zeros(1 << 22)}, tmp_path / "w", container)
    file = MappedFile(path)
    entry = READERS[container](file).entries["w"]
    assert resident_pages(file) <= 1  # the file's last page, if it is not a whole one
    entry.map()[0] = 3.0
    assert torch.load(path, weights_only=True)["w"][0] == 0


def resident_pages(file: MappedFile) -> int:
    """In how many pages of the mapping this process has something of its own, or of the file's."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell which pages are in memory")
    lines = iter(smaps.read_text().splitlines())
    for line in lines:
        if line.endswith(str(file.path)):
            return next(int(row.split()[1]) for row in lines if row.startswith("Rss:")) // 4
    raise AssertionError("the file is not mapped")


# --- What does not rebuild a tensor ----------------------------------------------------------


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (quantised, "QInt8Storage"),
        (lambda: torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "torch._utils._rebuild_tensor_v2"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "torch.bits8"),
    ],
    ids=["quantised", "sparse", "sparse rows", "meta", "conjugated", "bits"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_another_kind_is_refused_by_name(
    tmp_path: Path, container: str, make: Callable[[], Tensor], said: str
) -> None:
    data = save({"w": make()}, tmp_path / "saved", container).read_bytes()
    assert said in refusal(data, container, tmp_path, UnsafePickleError)


def test_a_storage_in_the_hands_of_a_stranger_is_refused_by_name(
    tmp_path: Path, container: str
) -> None:
    called = call(name("foreign", "rebuild"), storage(), number(0))
    built = call(name("foreign", "Tensor")) + group(storage(), number(0)) + pickle.BUILD
    for fragment, who in ((called, "foreign.rebuild"), (built, "foreign.Tensor")):
        said = refusal(CONTAINERS[container](fragment), container, tmp_path, UnsafePickleError)
        assert who in said


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path: Path, container: str) -> None:
    data = save(nn.Linear(2, 3), tmp_path / "saved", container).read_bytes()
    said = refusal(data, container, tmp_path, UnsafePickleError)
    assert "inside of objects" in said and "torch.nn.modules.linear.Linear" in said


def test_a_class_of_torch_that_is_called_is_a_stub(tmp_path: Path, container: str) -> None:
    """Only where it is an argument is it understood."""
    data = CONTAINERS[container](table(w=tensor(), other=call(name("torch", "Tensor"), number(3))))
    pickled = read_bytes(data, container, tmp_path)
    assert list(pickled.entries) == ["w"] and pickled.stubs == ("torch.Tensor",)


def test_a_rebuilding_of_rebuildings_is_refused(tmp_path: Path, container: str) -> None:
    """Python's stack would end before the pickle does."""
    again = name("torch._tensor", "_rebuild_from_type_v2")
    args = group(again, name("torch", "Tensor"), pickle.EMPTY_TUPLE, pickle.NONE)
    for _ in range(2000):
        args = group(again, name("torch", "Tensor"), args, pickle.NONE)
    data = CONTAINERS[container](again + args + pickle.REDUCE)
    assert "_rebuild_from_type_v2" in refusal(data, container, tmp_path, UnsafePickleError)


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (text("0"), "outside of its pickle"),
        (group(text("module"), text("a")), "outside of its pickle"),
        (group(text("storage"), name("os", "system"), text("0"), text("cpu"), number(2)), "os.sys"),
        (
            group(
                *(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu")),
                *(number(2), group(text("1"), number(0), number(1))),
            ),
            "outside of its pickle",
        ),
    ],
    ids=["text", "another kind", "of a global", "a view"],
)
def test_a_persistent_id_of_another_kind_is_refused(
    tmp_path: Path, container: str, identity: bytes, said: str
) -> None:
    data = CONTAINERS[container](identity + pickle.BINPERSID)
    assert said in refusal(data, container, tmp_path, UnsafePickleError)


# --- Malicious pickles -----------------------------------------------------------------------


def beside_a_tensor(fragment: bytes) -> bytes:
    return table(evil=fragment, w=tensor())


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_malicious_pickle_is_never_run(tmp_path: Path, container: str, kind: str) -> None:
    marker = tmp_path / "marker"
    fragment = MALICIOUS[kind](marker)
    data = CONTAINERS[container](beside_a_tensor(fragment))
    path = tmp_path / "weights"
    path.write_bytes(data)

    try:
        pickled = read(path, container)
    except CheckpointError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
    else:
        assert_same(pickled, {"w": torch.tensor([1.5, -2.5])})
        assert pickled.stubs
    assert not marker.exists()

    with contextlib.suppress(Exception), registered_extensions():
        torch.load(path, weights_only=False)
    assert marker.exists(), "torch did not run it either: this test could not fail"


@pytest.mark.parametrize("section", range(5))
def test_every_pickle_of_a_legacy_file_is_data(tmp_path: Path, section: int) -> None:
    marker = tmp_path / "marker"
    pickles = [*LEGACY_HEAD, pickle_of(table()), pickle.dumps([], 2)]
    pickles[section] = pickle_of(malicious.by_os_system(marker))
    path = tmp_path / "weights"
    path.write_bytes(legacy_sections(*pickles))
    if section in (2, 3):  # of what is not needed, it is dropped
        assert read(path, "legacy").stubs == ("os.system",)
    else:
        refusal(path.read_bytes(), "legacy", tmp_path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists()


# --- Too much --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GREEDY)
def test_a_greedy_pickle_is_given_up_soon(tmp_path: Path, kind: str) -> None:
    data = zip_file(GREEDY[kind]())
    started = time.process_time()
    refusal(data, "zip", tmp_path)
    # It holds about a million instructions, or calls, which may cost a hundred times a dict each.
    assert time.process_time() - started < 100 * a_million_dicts()


@pytest.mark.parametrize("kind", GREEDY)
def test_a_greedy_pickle_gets_no_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than 64 MB and twice its size; here a tenth of that, with a tenth of the purse."""
    monkeypatch.setattr("ldm.checkpoints.pickles.PURSE", PURSE // 10)
    data = zip_file(GREEDY[kind]())
    (tmp_path / "weights").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UnreadableError):
        read(tmp_path / "weights", "zip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (64e6 + 2 * len(data)) / 10


def test_the_largest_real_checkpoint_is_far_from_the_limits(tmp_path: Path) -> None:
    """Weights, EMA weights and both moments of Adam; twice, and there is still room."""

    def training_state() -> dict[str, Any]:
        names = [f"model.diffusion_model.input_blocks.{n}.1.attn1.to_q.weight" for n in range(1130)]
        weights = {key: torch.zeros(1, 1, 1, 1) for key in names}
        ema = {f"model_ema.{key.replace('.', '')}": torch.zeros(1, 1) for key in names[:688]}
        moments = {n: {"avg": torch.zeros(1), "avg_sq": torch.zeros(1)} for n in range(688)}
        return {"state_dict": weights | ema, "optimizer_states": [{"state": moments}]}

    path = save([training_state(), training_state()], tmp_path / "w", "zip")
    assert len(read(path, "zip").entries) == 2 * (1130 + 688 + 2 * 688)


# --- Damaged files ---------------------------------------------------------------------------


def test_a_legacy_file_that_is_cut_off_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = save(state_dict(), tmp_path / "whole", "legacy").read_bytes()
    first = len(whole) - 2 * 8 - (12 + 5) * 4  # where the first storage begins
    for length in range(1, len(whole)):
        said = refusal(whole[:length], "legacy", tmp_path, TruncatedError)
        assert f"found {length:,} bytes" in said
        assert (f"expected {len(whole):,} bytes" in said) == (length >= first), length


def test_a_zip_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    whole = save(state_dict(), tmp_path / "whole", "zip").read_bytes()
    for length in (*range(4, len(whole), 16), *range(len(whole) - 40, len(whole))):
        said = refusal(whole[:length], "zip", tmp_path, TruncatedError)
        assert f"found {length:,} bytes" in said


def test_bytes_behind_the_last_storage_do_no_harm(tmp_path: Path) -> None:
    data = legacy_file(table(w=tensor())) + b"more"
    assert list(read_bytes(data, "legacy", tmp_path).entries) == ["w"]


TWO = group(number(2))
ONE = group(number(1))
VIEWS = {
    "longer than its storage": tensor(shape=group(number(3))),
    "behind its storage": tensor(offset=number(1)),
    "a stride too long": tensor(stride=TWO),
    "a stride of 0": tensor(shape=group(number(2), number(2)), stride=group(number(0), number(1))),
    "petabytes out of one number": tensor(shape=group(number(1 << 50)), stride=group(number(0))),
    "a negative size": tensor(shape=group(number(-1))),
    "a negative stride": tensor(offset=number(1), stride=group(number(-1))),
    "a negative offset": tensor(offset=number(-1), shape=ONE),
    "a huge size": tensor(shape=group(number(1 << 100)), stride=group(number(0))),
    "a huge offset": tensor(offset=number(1 << 70)),
    "a huge stride": tensor(stride=group(number(1 << 62))),
    "a size that is True": tensor(shape=group(pickle.NEWTRUE)),
    "an offset that is False": tensor(offset=pickle.NEWFALSE),
    "a size that is 2.0": tensor(shape=group(pickle.BINFLOAT + struct.pack(">d", 2.0))),
    "a size that is text": tensor(shape=group(text("2"))),
    "sizes in a list": tensor(shape=listed(number(2))),
    "no strides": tensor(stride=pickle.NONE),
    "more strides than sizes": tensor(stride=group(number(1), number(1))),
    "too many dimensions": tensor(shape=group(*[number(1)] * 65), stride=group(*[number(1)] * 65)),
    "no elements, and more than can be counted": tensor(
        shape=group(number(0), number(1 << 31), number(1 << 31)), stride=group(*[number(1)] * 3)
    ),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_must_lie_in_its_storage(tmp_path: Path, container: str, kind: str) -> None:
    said = refusal(CONTAINERS[container](table(w=VIEWS[kind])), container, tmp_path)
    assert "describes a tensor" in said


@pytest.mark.parametrize("numel", [3, 1 << 54, -1, 1 << 90])
def test_a_storage_must_lie_in_its_file(tmp_path: Path, container: str, numel: int) -> None:
    data = CONTAINERS[container](table(w=tensor(storage(numel=numel))))
    missing = container == "legacy" and 0 < numel < 1 << 60
    said = refusal(data, container, tmp_path, TruncatedError if missing else UnreadableError)
    assert ("expected" in said) == missing


def test_a_storage_has_one_type_and_one_size(tmp_path: Path, container: str) -> None:
    for other in (storage("IntStorage"), storage(numel=1)):
        data = CONTAINERS[container](table(a=tensor(), b=tensor(other, shape=ONE)))
        assert "storage '0' in two ways" in refusal(data, container, tmp_path)


def test_the_type_of_a_storage_counts_its_bytes(tmp_path: Path) -> None:
    """8 bytes are two floats, and one double: not two."""
    one = zip_file(table(w=tensor(storage("DoubleStorage", numel=1), shape=ONE)))
    assert_same(
        read_bytes(one, "zip", tmp_path),
        {"w": torch.frombuffer(bytearray(STORED), dtype=torch.float64)},
    )
    two = zip_file(table(w=tensor(storage("DoubleStorage"))))
    assert "8 bytes in data/0, whose tensors need 16" in refusal(two, "zip", tmp_path)


def test_two_tensors_with_one_key_are_refused(tmp_path: Path, container: str) -> None:
    clash = table(a=table(b=tensor()), **{"a.b": tensor()})
    wrapped = table(w=tensor(), state_dict=table(w=tensor()))
    for content, key in ((clash, "a.b"), (wrapped, "w")):
        assert f"key '{key}'" in refusal(CONTAINERS[container](content), container, tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        pickle.STOP,
        pickle.POP,
        pickle.TUPLE,
        pickle.NONE + pickle.TUPLE2,
        pickle.NONE * 2 + pickle.TUPLE3,
        pickle.BINGET + b"\0",
        pickle.NONE + b"q\2h\1",
        pickle.EMPTY_DICT + pickle.NONE + pickle.APPEND,
        pickle.EMPTY_LIST + b"NNs",
        pickle.EMPTY_DICT + b"(Nu",
        pickle.NONE + pickle.NONE + pickle.APPEND,
        pickle.NONE + b"NNs",
        pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE,
        name("os", "system") + pickle.NONE + pickle.REDUCE,
        pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL,
        text("o\ns") + text("system") + pickle.STACK_GLOBAL,
        name("o\x1bs", "system"),
        name("o" * 300, "system"),
        pickle.INT + b"1_0\n",
        pickle.INT + b"1" * 150 + b"x\n",
        pickle.PROTO + b"\x7f" + pickle.NONE,
        pickle.NEXT_BUFFER,
        pickle.DUP,
        pickle.PERSID + b"0\n",
        b"\xff",
        pickle.MARK + pickle.OBJ,
        call(name("collections", "OrderedDict"), listed(pickle.NONE)),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, container: str, body: bytes) -> None:
    data = zip_file(body) if container == "zip" else legacy_file(body, keys=())
    assert "holds a pickle" in refusal(data, container, tmp_path)


def test_a_pickle_that_is_not_of_torch_is_refused(tmp_path: Path) -> None:
    assert "no magic number" in refusal(pickle.dumps({"a": 1}, 2), "legacy", tmp_path)
    other = pickle.dumps(malicious.LEGACY_MAGIC, 2) + pickle.dumps(1002, 2)
    assert "unknown version" in refusal(other, "legacy", tmp_path)


def test_the_storages_of_a_legacy_file_are_those_of_its_tensors(tmp_path: Path) -> None:
    content = table(w=tensor())
    for keys in ((), ("1",), ("0", "0"), ("0", "1")):
        assert "other storages" in refusal(legacy_file(content, keys), "legacy", tmp_path)
    wrong = legacy_file(content)[: -8 - 8] + struct.pack("<q", 1) + STORED
    assert "1 numbers in storage '0' for 2" in refusal(wrong, "legacy", tmp_path)


# --- Zip archives ----------------------------------------------------------------------------


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()), compression=zipfile.ZIP_DEFLATED)
    assert "stored uncompressed" in refusal(data, "zip", tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    for order in (b"big", b"", b"middle"):
        data = zip_file(table(w=tensor()), {"byteorder": order})
        assert "not little-endian" in refusal(data, "zip", tmp_path)


def test_a_file_from_before_the_byte_order_was_noted_is_little_endian(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor())).replace(b"archive/byteorder", b"archive/otherfile")
    assert_same(read_bytes(data, "zip", tmp_path), {"w": torch.tensor([1.5, -2.5])})


def test_a_script_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.script(nn.Linear(2, 3)).save(str(path))
    assert "TorchScript" in refusal(path.read_bytes(), "zip", tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "none of PyTorch's: it has 0"),
        (["word/document.xml"], "none of PyTorch's: it has 0"),
        (["a/data.pkl", "b/data.pkl"], "none of PyTorch's: it has 2"),
    ],
)
def test_an_archive_of_something_else_is_refused(
    tmp_path: Path, names: list[str], said: str
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for record in names:
            archive.writestr(record, b"")
    assert said in refusal(buffer.getvalue(), "zip", tmp_path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor(storage(key="1"))))
    assert "no record data/1" in refusal(data, "zip", tmp_path)


# An entry of the central directory begins with a signature. At 8 are its flags, at 20 and 24 its
# sizes (in the archive and outside of it), at 42 the offset of its local header, at 46 its name.
CENTRAL = b"PK\x01\x02"


def central(data: bytes, record: str) -> int:
    """Where the central directory's entry for a record begins."""
    return data.rindex(record.encode()) - 46


def changed(data: bytes, at: int, form: str, value: int) -> bytes:
    new = struct.pack(form, value)
    return data[:at] + new + data[at + len(new) :]


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()))
    entry, other = central(data, "archive/data/0"), central(data, "archive/data.pkl")
    assert data[entry : entry + 4] == CENTRAL
    other_header = struct.unpack_from("<I", data, other + 42)[0]
    for at, form, value, said in (
        (8, "<H", 1, "encrypted"),
        (20, "<I", 4, "two sizes"),
        (42, "<I", other_header, "begins inside of another"),
        (42, "<I", other_header + 1, "begins inside of another"),
        (42, "<I", len(data), "damaged zip archive"),
        (42, "<I", 0xFFFFFFF0, "damaged zip archive"),
    ):
        assert said in refusal(changed(data, entry + at, form, value), "zip", tmp_path), said
    grown = changed(changed(data, entry + 20, "<I", 1 << 30), entry + 24, "<I", 1 << 30)
    assert "outside of the file" in refusal(grown, "zip", tmp_path)
    shrunk = changed(changed(data, entry + 20, "<I", 7), entry + 24, "<I", 7)
    assert "7 bytes in data/0" in refusal(shrunk, "zip", tmp_path)
    header = struct.unpack_from("<I", data, entry + 42)[0]
    assert "has no header" in refusal(changed(data, header, "<B", 0), "zip", tmp_path)


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO(zip_file(table(w=tensor())))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", STORED)
    assert "there twice" in refusal(buffer.getvalue(), "zip", tmp_path)


def test_a_directory_without_end_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()), {f"data/x{n}": b"" for n in range(20_000)})
    started = time.process_time()
    assert "lists more than" in refusal(data, "zip", tmp_path)
    assert time.process_time() - started < 10 * a_million_dicts()


def test_an_archive_behind_four_gigabytes_is_read(tmp_path: Path) -> None:
    """From there on a directory needs longer offsets (zip64). Most of this file is a hole."""
    path = tmp_path / "weights"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(table(w=tensor())))
        archive.start_dir += 5 << 30
        archive.writestr("archive/data/0", STORED)
    assert path.stat().st_size > 5 << 30
    if path.stat().st_blocks * 512 > 1 << 20:
        path.unlink()
        pytest.skip("this file system has no holes")
    pickled = read(path, "zip")
    assert pickled.entries["w"].offset > 5 << 30
    assert_same(pickled, {"w": torch.tensor([1.5, -2.5])})
    path.unlink()


def test_the_folder_of_an_archive_may_have_any_name(tmp_path: Path) -> None:
    for folder in ("model", "v1-5 pruned", "グリーン"):
        path = save(state_dict(), tmp_path / f"{folder}.pt", "zip")
        assert_same(read(path, "zip"), state_dict())
