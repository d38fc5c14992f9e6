"""Options: merging of defaults, preset, file and flags, and a clear line for each mistake."""

import pytest

from gpn_triton import config
from gpn_triton.config import PRESETS, TrainConfig, parse


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "shd-small"\nlr = 0.01\nbatch-size = 8\nhidden = [64, 32]\n')
    cfg = parse(["--config", str(file), "--batch-size", "16"])
    assert (cfg.dataset, cfg.lr, cfg.batch_size, cfg.hidden) == ("shd", 0.01, 16, (64, 32))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration(preset):
    cfg = parse(["--preset", preset])
    assert cfg.dataset == preset[:3]
    assert config.from_dict(cfg.to_dict(), "round trip") == cfg


def test_amp_alone_means_bf16():
    assert parse(["--amp"]).amp == "bf16"
    assert parse(["--amp", "fp16"]).amp == "fp16"
    assert parse([]).amp is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "mnist"], "dataset: expected synthetic, shd, ssc or a file"),
        (["--hidden", "0"], r"hidden: expected sizes of at least 1, got \[0\]"),
        (["--lr", "nan"], "lr: expected float, got nan"),
        (["--lr", "0"], "lr: expected more than 0"),
        (["--dropout", "1"], "dropout: expected 0 <= value < 1"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--warmup-epochs", "20"], r"warmup_epochs: expected fewer than epochs \(20\)"),
        (["--seed", "1", "1"], "seed: expected different seeds"),
        (["--dataset", "shd", "--train-file", "a.h5"], "dataset: expected either"),
        (["--test-file", "a.h5"], "test_file: expected --train-file"),
        (["--valid-fraction", "1"], "valid_fraction: expected 0 < value < 1"),
    ],
)
def test_each_mistake_is_named(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "not valid TOML"),
        ("learning_rate = 1.0", "unknown option learning_rate"),
        ('lr = "fast"', "lr: expected float, got 'fast'"),
        ("epochs = true", "epochs: expected int, got True"),
        ('neuron = "glif"', "neuron: expected one of gpn"),
        ("hidden = [1.5]", "hidden: expected whole numbers"),
        ('preset = "none"', "preset: expected one of"),
    ],
)
def test_each_mistake_in_a_file_is_named(text, message, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(file)])


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="config: no such file: none.toml"):
        parse(["--config", "none.toml"])


@pytest.mark.parametrize("argv", [["--neuron", "glif"], ["--epochs", "two"], ["--unknown"]])
def test_argparse_refuses_unknown_flags_and_values(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(argv)
    assert exit.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert "(default: 128)" in text and "15 % of the data" in text


def test_resume_takes_its_options_from_the_run(tmp_path):
    from gpn_triton.checkpoint import write_json

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
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        parse(["--resume", str(tmp_path)])
    (old / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        parse(["--resume", str(old)])
