"""Which tiles are chosen for which layer, and which are swept on a GPU."""

from pathlib import Path

import pytest
import torch

from bench import report, tuning, tuning_record
from bench.cases import cases
from gpn_triton.kernels import tiles, tiles_measured
from gpn_triton.neurons.reference import GATES

HALF = torch.bfloat16


def chosen(N, B, dtype=HALF, capability=90, precision="ieee", variant="full"):
    return tiles.choose(
        100, B, N, dtype, GATES[variant], 1, precision, capability=capability, strategy="stepwise"
    )


def bytes_read(tile, N, B, row, column):
    """Elements that a step's programs read, of row and column elements a row and a neuron."""
    programs = -(-B // tile.BLOCK_B) * -(-N // tile.BLOCK_N)
    return programs * (tile.BLOCK_B * row + tile.BLOCK_N * column)


@pytest.mark.parametrize("N, B", [(512, 2048), (512, 1024), (1024, 8192), (256, 2048)])
def test_backward_reads_at_most_two_thirds_of_what_forward_s_tile_would_have_it_read(N, B):
    plan = chosen(N, B)
    read = [bytes_read(tile, N, B, 3 * N, 3 * N) for tile in (plan.backward, plan.forward)]
    assert read[0] <= 2 / 3 * read[1]


@pytest.mark.parametrize("N", [160, 256, 512])
@pytest.mark.parametrize("B", [1, 32, 256])
def test_a_small_batch_has_narrow_tiles_which_more_multiprocessors_share(N, B):
    plan = chosen(N, B)
    assert plan.forward.BLOCK_N == plan.backward.BLOCK_N == 32
    assert plan.forward.BLOCK_B == plan.backward.BLOCK_B <= 64


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype, precision", [
    (HALF, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"),
])  # fmt: skip
def test_tiles_that_spill_or_wait_are_never_chosen(capability, dtype, precision):
    for N in (64, 160, 512, 1024):
        for B in (1, 32, 256, 1024, 2048, 8192):
            plan = chosen(N, B, dtype, capability, precision)
            size = plan.backward.BLOCK_B, plan.backward.BLOCK_N
            if precision == "ieee" and dtype != HALF:
                assert size in ((16, 32), (32, 32)) and not plan.backward.chained
            # 64 x 64 spills on sm_80, 128 x 64 on sm_100 and with float32 operands
            assert size != (64, 64) or capability >= 90
            assert size != (128, 64) or (capability < 100 and dtype == HALF)
            # three sums side by side spill there, or their loads wait
            if size[0] >= (64 if capability == 100 else 128):
                assert plan.backward.chained
            assert not plan.forward.chained
            # with tcgen05 the loads of four sums wait
            assert capability < 100 or plan.forward.BLOCK_B <= 32


def test_launches_overlap_from_sm_90_on_where_there_is_one_a_step():
    assert chosen(512, 256).dependent and chosen(512, 256, capability=100).dependent
    assert not chosen(512, 256, capability=80).dependent
    assert not tiles.choose(100, 256, 128, HALF, GATES["full"]).dependent
    assert not tiles.choose_cuba_lif(100, 256, 512, HALF).dependent


def test_forward_and_backward_are_swept_apart():
    (case,) = [c for c in cases("tuning", "full") if c.name == "N512-B2048-bfloat16"]
    forward, backward = (
        tuning.subjects_of(case, f"bench_tuning_{way}") for way in ("forward", "backward")
    )
    assert not any("chained" in name for name in forward)
    assert {n for n in backward if "chained" in n} == set(backward) - set(forward)
    assert "128x64x64-warps8-stages2-chained" in backward
    # both begin with what is chosen now
    assert next(iter(forward)) == next(iter(backward)) == "gpn-stepwise"


def record_of(subject, device_ms, B=256, way="forward"):
    mode = "forward" if way == "forward" else "forward+backward"
    return {
        "kind": "tuning", "group": f"tuning {way}: N512-B{B}", "subject": subject, "T": 100, "B": B,
        "hidden": [512], "dtype": "bfloat16", "device": "some GPU", "capability": 90, "mode": mode,
        "device_median_ms": device_ms,
    }  # fmt: skip


def test_a_record_s_faster_tiles_are_written_and_then_chosen(tmp_path, monkeypatch):
    found = tuning_record.faster([
        record_of("gpn-stepwise", 2.0),
        record_of("64x64x64-warps8-stages2", 1.5), record_of("32x32x64-warps4-stages2", 1.9),
        # what gains less than noise stays as it is
        record_of("gpn-stepwise", 2.0, 2048), record_of("64x32x64-warps4-stages3", 1.97, 2048),
        record_of("gpn-stepwise", 5.0, 256, "backward"),
        record_of("128x64x64-warps8-stages2-chained", 4.0, 256, "backward"),
    ])  # fmt: skip
    source = tuning_record.table(found)
    assert (
        "# measured: some GPU, T 100, B 256, bfloat16, forward: 1.5 ms, the tile before 2" in source
    )
    written = {}
    exec(source, written)
    monkeypatch.setattr(tiles_measured, "MEASURED", written["MEASURED"])
    plan = chosen(512, 300)
    assert plan.measured and plan.forward == tiles.Tile(64, 64, 64, 8, 2)
    assert plan.backward == tiles.Tile(128, 64, 64, 8, 2, chained=True)
    # of a smaller batch, another GPU or another type nothing was measured
    for other in (chosen(512, 255), chosen(512, 300, capability=80)):
        assert not other.measured and plan.forward != other.forward
    with monkeypatch.context() as patch:
        copy = tmp_path / "tiles_measured.py"
        copy.write_text(Path(tiles_measured.__file__).read_text())
        patch.setattr(tiles_measured, "__file__", str(copy))
        patch.setattr(
            report,
            "records",
            lambda contents: [
                record_of("gpn-stepwise", 2.0),
                record_of("64x64x64-warps8-stages2", 1.5),
            ],
        )
        patch.setattr(report, "read", lambda path: {})
        assert tuning_record.main(["gpu-tuning.json", "--write"]) == 0
    again = {}
    exec(copy.read_text(), again)
    assert again["MEASURED"] == {(90, "stepwise", 512, "forward"): {256: (64, 64, 64, 8, 2, False)}}
    assert "this one of gpu-tuning.json" in copy.read_text()
