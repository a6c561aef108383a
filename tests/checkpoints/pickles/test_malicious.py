"""No pickle is ever run, and none takes more than it may."""

from __future__ import annotations

import contextlib
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoints.pickles.limits import PURSE
from ldm.errors import CheckpointError, UnreadableError
from tests.checkpoints import malicious
from tests.checkpoints.malicious import (
    CONTAINERS,
    GREEDY,
    LEGACY_HEAD,
    MALICIOUS,
    legacy_sections,
    pickle_of,
    registered_extensions,
    table,
    tensor,
    zip_file,
)
from tests.checkpoints.pickles.helpers import (
    assert_same,
    read,
    refusal,
    save,
)
from tests.helpers import a_million_dicts


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


@pytest.mark.slow
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
    monkeypatch.setattr("ldm.checkpoints.pickles.limits.PURSE", PURSE // 10)
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
