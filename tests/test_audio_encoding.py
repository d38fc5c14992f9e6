"""Recordings to files of events: what is found, what is odd, what is written, what goes on."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from gpn_triton import encode, predict, train  # noqa: E402
from gpn_triton.audio import encoding, recordings  # noqa: E402
from gpn_triton.audio.encoding import Encoding, encoding_of  # noqa: E402
from gpn_triton.audio.recordings import Recording, Variation  # noqa: E402
from gpn_triton.data.sources.hdf5 import read_events  # noqa: E402
from tests.vowels import vowel, write_vowels  # noqa: E402

FEW = Encoding(channels=20)


def write(path, samples=None, rate=16_000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, vowel("a", 0, 0, 0.1) if samples is None else samples, rate, **options)
    return path


def events(path):
    store = read_events(path, use_cache=False)
    return [store.subset([k]).times.tolist() for k in range(len(store))]


def test_a_folder_lies_as_speech_commands_do(tmp_path):
    for name in ("yes/ab12_nohash_0.wav", "yes/cd34_nohash_1.wav", "no/ab12_nohash_0.flac",
                 "no/other.ogg", "_background_noise_/hum.wav"):  # fmt: skip
        write(tmp_path / name)
    (tmp_path / "validation_list.txt").write_text("yes/cd34_nohash_1.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/ab12_nohash_0.flac\n\n")
    found = {(r.path.name, r.label, r.speaker, r.part) for r in recordings.find(tmp_path)}
    assert found == {
        ("ab12_nohash_0.wav", "yes", "ab12", "train"),
        ("cd34_nohash_1.wav", "yes", "cd34", "valid"),
        ("ab12_nohash_0.flac", "no", "ab12", "test"), ("other.ogg", "no", None, "train"),
    }  # fmt: skip
    (tmp_path / "testing_list.txt").write_text("no/gone.wav\n")
    with pytest.raises(ValueError, match="testing_list.txt: names no/gone.wav, which is not there"):
        recordings.find(tmp_path)


def test_flat_folders_and_csv_files_name_label_and_speaker(tmp_path):
    write(tmp_path / "flat" / "guten_tag_jörg müller_10.wav")
    (found,) = recordings.find(tmp_path / "flat")
    assert (found.label, found.speaker, found.part) == ("guten_tag", "jörg müller", "train")
    table = tmp_path / "all.csv"
    table.write_text("path,label,split\nflat/guten_tag_jörg müller_10.wav,x,valid\n", "utf-8")
    assert recordings.find(table) == [Recording(found.path, "x", None, "valid")]
    for text, error in (
        ("file,label\na,b\n", "expected the columns path, label"),
        ("path,label,split\na,b,dev\n", "line 2: split: expected train, valid, test, got 'dev'"),
        ("path,label\na\n", "line 2: expected path, label"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=error):
            recordings.find(table)
    assert recordings.class_names([Recording(Path(), n) for n in ("10", "9", "10")]) == ("9", "10")


def test_every_odd_recording_is_encoded_or_named_in_one_line(tmp_path, capsys):
    folder = tmp_path / "reden" / "größe 1"
    write(folder / "an 8-bit ümlaut.wav", subtype="PCM_U8")
    stereo = np.stack([vowel("a", 0, 0, 0.1)] * 2, 1)
    write(folder / "stereo.wav", stereo, rate=96_000)
    write(folder / "one.wav", np.zeros(1))
    write(folder / "zero.wav", np.zeros(0))
    write(folder / "long.wav", np.zeros(8000 * 600, np.float32), rate=8000)
    write(folder / "silent.wav", np.zeros(4000))
    write(folder / "clipped.wav", np.clip(5 * vowel("i", 0, 0, 0.1), -1, 1))
    (folder / "text.wav").write_text("not a sound\n")
    (folder / "empty.wav").touch()
    out = tmp_path / "odd.h5"
    assert encode.main([str(folder.parent), "--out", str(out), "--channels", "20"]) == 0
    said = capsys.readouterr()
    assert "4 samples of 9 recordings, 1 classes, 5 left out, 2 silent or clipped" in said.out
    lines = said.err.splitlines()
    for name, words in (
        ("one", "expected at least 0.01 s, got 1 samples"), ("zero", "got 0 samples"),
        ("long", "expected up to 10 s (--max-seconds), got 600.0 s"),
        ("silent", "silent"), ("clipped", "clipped in "), ("text", "expected a sound file"),
        ("empty", "expected a sound file"),
    ):  # fmt: skip
        assert [words in line for line in lines if f"/{name}.wav" in line] == [True], name
    assert len(lines) == 7
    store = read_events(out, use_cache=False)
    assert store.class_names == ("größe 1",) and store.speakers is None
    assert encoding_of(out) == dataclasses.replace(FEW)


def test_stereo_and_other_rates_are_heard_as_one_voice(tmp_path):
    mono = vowel("a", 0, 0, 0.2).astype(np.float64)
    one = recordings.read(write(tmp_path / "a.wav", mono, subtype="DOUBLE"), 10)
    two = recordings.read(
        write(tmp_path / "b.wav", np.stack([2 * mono, 0 * mono], 1), subtype="DOUBLE"), 10
    )
    assert np.allclose(one.samples, two.samples, atol=1e-7)
    assert len(one.wave()) == 3 * len(mono)


def test_an_interrupted_encoding_goes_on_to_the_same_file(tmp_path, monkeypatch, capsys):
    for k in range(5):
        write(tmp_path / "in" / f"{k % 2}_s_{k}.wav", vowel("ai"[k % 2], k, 0, 0.1))
    found = recordings.find(tmp_path / "in")
    monkeypatch.setattr(encoding, "PART", 2)
    files = encoding.encode(found, tmp_path / "whole.h5", FEW)
    read, calls = recordings.read, []

    def stop_at_the_fourth(path, seconds):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(path, seconds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recordings, "read", stop_at_the_fourth)
        encoding.encode(found, tmp_path / "stopped.h5", FEW)
    assert not (tmp_path / "stopped.h5").exists()
    # parts of other options are not mixed with these
    with pytest.raises(ValueError, match=r"stopped.h5.parts: holds parts of other"):
        encoding.encode(found, tmp_path / "stopped.h5", Encoding(channels=21))
    capsys.readouterr()
    again = encoding.encode(found, tmp_path / "stopped.h5", FEW)
    assert "goes on after 2 recordings" in capsys.readouterr().err
    assert events(again["train"]) == events(files["train"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "stopped.h5", "whole.h5"]


def test_copies_are_drawn_from_the_seed_and_only_of_training_recordings(tmp_path):
    lines = ["path,label,speaker,split"]
    for k, part in enumerate(("train", "train", "valid")):
        write(tmp_path / f"{k}.wav", vowel("a", k, 0, 0.1))
        lines.append(f"{k}.wav,a,{k},{part}")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    found = recordings.find(tmp_path / "all.csv")
    three = dataclasses.replace(FEW, copies=2, variation=Variation(gain=20))
    files = encoding.encode(found, tmp_path / "a.h5", three)
    assert sorted(files) == ["train", "valid"] and files["train"].name == "a_train.h5"
    train, valid = (read_events(files[part], use_cache=False) for part in ("train", "valid"))
    assert len(train) == 6 and len(valid) == 1
    assert train.speakers.tolist() == [0, 0, 0, 1, 1, 1]
    own = events(files["train"])
    assert len({tuple(times) for times in own}) == 6
    again = encoding.encode(found, tmp_path / "b.h5", three)
    assert events(again["train"]) == own
    other = encoding.encode(found, tmp_path / "c.h5", dataclasses.replace(three, seed=1))
    assert events(other["train"])[1] != own[1]
    with pytest.raises(ValueError, match="copies: expected a source with a validation part"):
        encoding.encode([r for r in found if r.part == "train"], tmp_path / "d.h5", three)
    # each change does what it says
    sound = recordings.read(found[0].path, 10)
    faster = Variation(speed=0.5, snr=0)(sound, 1, 1)
    assert len(faster.samples) != len(sound.samples)
    noisy = Variation(speed=0, snr=20)(sound, 1, 1).samples - sound.samples
    ratio = 10 * np.log10(np.mean(sound.samples**2) / np.mean(noisy**2))
    assert 20 <= ratio <= 40.5


@pytest.mark.parametrize("arguments, error", [
    (["--out", "x.h5", "--gain", "3"], "gain: has no effect without --copies"),
    (["--out", "x.h5", "--channels", "0"], "channels: expected 1..65536, got 0"),
    (["--out", "x.wav"], "out: expected a name ending in .h5"),
    (["--out", "x.h5", "--max-seconds", "600"], "max_seconds: expected 0.01..590, got 600.0"),
    (["--out", "x.png", "--plot", "--copies", "1"], "copies: has no effect beside --plot"),
    (["--out", "x.h5"], "expected a folder or a CSV file, found nothing there"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode.main(["nowhere", *arguments]) == 2
    said = capsys.readouterr().err
    assert error in said and len(said.splitlines()) == 1


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.wav")
    out = tmp_path / "a.png"
    assert encode.main([str(path), "--plot", "--channels", "20", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_from_sound_to_answer(tmp_path, monkeypatch, capsys):
    """Encode, train, predict, of recordings and a speaker that training never heard."""
    write_vowels(tmp_path, speakers=3, each=5, seconds=0.1)
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "4", "--hidden", "24", "--batch-size", "4", "--lr", "0.01", "--max-time",
               "0.125", "--valid-fraction", "0.2", "--cache-dir", "cache"]  # fmt: skip
    assert train.main(["--dataset", "train", *options]) == 0
    (made,) = Path("cache").glob("train.*.h5")
    stamp = made.stat().st_mtime_ns
    monkeypatch.setattr(encoding, "encode", None)
    # a second time nothing is encoded
    assert encoding.prepare("train", "cache") == {"train": made}
    assert made.stat().st_mtime_ns == stamp
    (run,) = Path("runs").iterdir()
    (Path("new") / "text.wav").write_text("no sound")
    capsys.readouterr()
    assert predict.main([str(run), "new", "--stream"]) == 0
    said = capsys.readouterr()
    assert "left out: new/text.wav" in said.err
    lines = Path("predictions.csv").read_text().splitlines()
    assert lines[0] == "sample,label,p(a),p(i)" and len(lines) == 11
    right = sum(line.split("/")[1] == line.split(",")[1] for line in lines[1:])
    assert right >= 9
    # as the sound comes: something before a recording's last bin
    assert "new/a/s3_nohash_0.wav, 0.0" in said.out
    assert predict.main([str(run), "new/a/s3_nohash_0.wav", "--out", "-"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert line == lines[1]


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a_b_0.wav")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "soxr" else find_spec(name, *a),
    )
    assert encode.main([str(tmp_path), "--out", str(tmp_path / "x.h5")]) == 2
    said = capsys.readouterr().err
    assert said == "error: reading sound needs soxr (pip install 'gpn-triton[audio]')\n"
