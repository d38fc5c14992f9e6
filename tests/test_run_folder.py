"""A run's files are written whole or not at all, and damaged ones are told apart."""

import dataclasses
import json

import pytest
import torch

from gpn_triton.machine import files
from gpn_triton.training import run_folder
from gpn_triton.training.objective import Epoch


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, lambda f: f.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_two_checkpoints_are_kept_and_the_newest_loaded(tmp_path):
    assert run_folder.load_checkpoint(tmp_path) is None
    for step in range(4):
        run_folder.save_checkpoint(tmp_path, {"step": step, "t": torch.arange(step)}, 0, step)
    assert len(list(tmp_path.iterdir())) == run_folder.KEPT_CHECKPOINTS
    state, path = run_folder.load_checkpoint(tmp_path)
    assert state["step"] == 3 and path.name == "checkpoint-00000-000003.pt"


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, capsys):
    run_folder.save_checkpoint(tmp_path, {"step": 1}, 0, 1)
    path = run_folder.save_checkpoint(tmp_path, {"step": 2}, 0, 2)
    path.write_bytes(path.read_bytes()[:200] if damage == "half" else damage)
    assert run_folder.load_checkpoint(tmp_path)[0]["step"] == 1
    assert "cannot be read" in capsys.readouterr().out
    path.with_name("checkpoint-00000-000001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        run_folder.load_checkpoint(tmp_path)


def test_loading_a_checkpoint_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"x": Evil()}, tmp_path / "checkpoint-00000-000001.pt")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        run_folder.load_checkpoint(tmp_path)
    assert not (tmp_path / "written").exists()


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path):
    kept = [tmp_path / "checkpoint-00000-000001.pt", tmp_path / ".gitignore"]
    left = [tmp_path / ".checkpoint-00000-000002.pt.x1", tmp_path / ".result.json.ab"]
    for path in (*kept, *left):
        path.write_bytes(b"")
    run_folder.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_metrics_are_read_back_or_named(tmp_path):
    # what came later has a default
    needed = [f.name for f in dataclasses.fields(Epoch) if f.default_factory is not list]
    line = dict.fromkeys(needed, 1.0) | {"epoch": 1, "activity": [0.1, 0.2]}
    path, lacking = tmp_path / run_folder.METRICS, {**line}
    del lacking["train_loss"]
    lines = ({"class_names": []}, line, line, lacking)
    path.write_text("\n".join([*map(json.dumps, lines), "cut of"]))
    header, found = run_folder.read_metrics(tmp_path, 2, 2)
    assert header["class_names"] == [] and [epoch.epoch for epoch in found] == [1, 1]
    for epochs, layers in ((2, 1), (3, 2), (4, 2)):
        with pytest.raises(ValueError, match="metrics.jsonl cannot be read"):
            run_folder.read_metrics(tmp_path, epochs, layers)
    path.write_text("{}\n" + json.dumps({**line, "dead": [0.0]}) + "\n")
    with pytest.raises(ValueError, match="expected 1 epochs of 2 layers"):
        run_folder.read_metrics(tmp_path, 1, 2)


def test_weights_round_trip_and_foreign_ones_are_refused(tmp_path):
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    run_folder.save_weights(tmp_path / "w", model)
    run_folder.load_weights(tmp_path / "w", other)
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(ValueError, match="does not fit this network: size mismatch for weight"):
        run_folder.load_weights(tmp_path / "w", torch.nn.Linear(4, 2))
    (tmp_path / "w").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not fit this network"):
        run_folder.load_weights(tmp_path / "w", other)
    with pytest.raises(FileNotFoundError, match="weights: no such file"):
        run_folder.load_weights(tmp_path / "none", other)
