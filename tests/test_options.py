"""Options: merging of defaults, preset, file and flags, and a clear line for each mistake."""

import pytest

from gpn_triton.training.options import OPTIONS, TrainConfig
from gpn_triton.training.parser import parse
from gpn_triton.training.presets import PRESETS
from gpn_triton.training.run_folder import write_json


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "shd-small"\nlr = 0.01\nbatch-size = 8\nhidden = [64, 32]\n')
    cfg = parse(["--config", str(file), "--batch-size", "16"])
    assert (cfg.dataset, cfg.lr, cfg.batch_size, cfg.hidden) == ("shd", 0.01, 16, (64, 32))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset):
    cfg = parse(["--preset", preset])
    assert cfg.dataset == ("synthetic" if preset == "best" else preset[:3])
    assert (cfg.binning == "authors") == (preset == "shd-authors")
    assert TrainConfig(**cfg.to_dict()) == cfg


def test_amp_alone_means_bf16(tmp_path):
    (tmp_path / "on.toml").write_text("amp = true\n")
    (tmp_path / "off.toml").write_text("amp = false\n")
    assert parse(["--amp"]).amp == parse(["--config", str(tmp_path / "on.toml")]).amp == "bf16"
    assert parse(["--amp", "fp16"]).amp == "fp16"
    assert parse([]).amp is parse(["--config", str(tmp_path / "off.toml")]).amp is None


@pytest.mark.parametrize(("argv", "message"), [
    ("--dataset mnits", "dataset: expected synthetic, recall, adding, shd, .* or a file"),
    ("--hidden 0", r"hidden: expected sizes of at least 1, got \[0\]"),
    ("--lr nan", "lr: expected float, got nan"),
    ("--lr 0", "lr: expected more than 0"),
    ("--dropout 1", "dropout: expected 0 <= value < 1"),
    ("--epochs 0", "epochs: expected at least 1, got 0"),
    ("--warmup-epochs 20", r"warmup_epochs: expected fewer than epochs \(20\)"),
    ("--accumulate 65", r"accumulate: expected at most batch_size \(64\)"),
    ("--seed 1 1", "seed: expected different seeds"),
    ("--dataset shd --train-file a.h5", "dataset: expected either"),
    ("--test-file a.h5", "test_file: expected --train-file"),
    ("--valid-fraction 1", "valid_fraction: expected 0 < value < 1"),
    # what binning and augmentation refuse, by the option's name
    ("--max-time 0", "max_time: expected"),
    ("--event-drop 1", "event_drop: expected 0 <= value < 1"),
    ("--binning authors --channel-bin 5", "channel_bin: the authors' binning knows only 1"),
    # what the parser refuses
    ("--neuron glif", "--neuron: invalid choice: 'glif'"),
    ("--epochs two", "--epochs: invalid int value: 'two'"),
    ("--epoch 3", "unknown option --epoch; did you mean --epochs"),
    ("--unheard=3", r"unknown option --unheard \(--help"),
    ("shd", "unexpected argument shd"),
])  # fmt: skip
def test_each_mistake_is_named_in_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("lr = ", "not valid TOML"),
    ("epoch = 1", "unknown option 'epoch'; did you mean epochs"),
    ('lr = "fast"', "lr: expected float, got 'fast'"),
    ("epochs = true", "epochs: expected int, got True"),
    ('neuron = "glif"', "neuron: expected one of gpn"),
    ("hidden = [1.5]", "hidden: expected whole numbers"),
    ('preset = "none"', "preset: expected one of"),
    ("preset = [1]", "preset: expected one of"),
    ('resume = "auto"', "resume: is a flag only: remove it from"),
    ('eval-only = "run"', "eval_only: is a flag only"),
    ('config = "other.toml"', "config: is a flag only"),
])  # fmt: skip
def test_each_mistake_in_a_file_is_named(text, message, tmp_path):
    file = tmp_path / "run.toml"
    with pytest.raises(FileNotFoundError, match="config: no such file: .*run.toml"):
        parse(["--config", str(file)])
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(file)])


def test_help_shows_a_dozen_options_and_help_all_every_one_with_its_default(capsys):
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit:
            parse([flag])
        texts[flag] = capsys.readouterr().out
        assert not exit.value.code
    shown = [f"--{f.name} ".replace("_", "-") for f in OPTIONS]
    lines = texts["--help"].splitlines()
    assert sum(line.strip().startswith(flag) for line in lines for flag in shown) == 12
    assert all(f"\n  {flag}" in texts["--help-all"] for flag in shown)
    for text in ("(default: 128)", "(default: 0)", "--preset NAME", "shd-small"):
        assert text in texts["--help"]
    for text in (f.metadata["help"] for f in OPTIONS):
        assert text[0].isupper() and text.endswith(".") and len(text.split()) >= 4
    assert "15 % of the data" in " ".join(texts["--help-all"].split())


def test_resume_takes_its_options_from_the_run(tmp_path):
    old, new = tmp_path / "a", tmp_path / "b"
    for folder in (old, new):
        folder.mkdir()
        write_json(folder / "config.json", TrainConfig(lr=0.5).to_dict())
    write_json(new / "result.json", {})
    assert parse(["--resume", str(new)]).lr == 0.5
    auto = parse(["--resume", "auto", "--out", str(tmp_path), "--device", "cpu"])
    assert (auto.resume, auto.lr, auto.device) == (str(old), 0.5, "cpu")
    with pytest.raises(ValueError, match="resume: takes its options from .* remove --lr"):
        parse(["--resume", str(old), "--lr", "1"])
    with pytest.raises(ValueError, match="eval_only: takes its options from .* remove --profile"):
        parse(["--eval-only", str(old), "--profile", "1"])
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        parse(["--resume", str(tmp_path)])
    (old / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        parse(["--resume", str(old)])
