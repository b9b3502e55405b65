"""The whole trainer on a few real digits: one command, its run folder, its refusals, its interruptions."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from stream_cases import photo
from tiny_run import RECIPE, recipe_with

from cit_scale import train
from cit_scale.errors import CannotWriteError
from cit_scale.train import main

REPOSITORY = Path(__file__).parents[1]

# Everything the real recipe does, in seconds: both teachers are trained first, on real digits.
TINY = recipe_with(
    teachers={
        "conv": {**RECIPE["teachers"]["conv"], "recipe": "teacher.yaml"},
        "inv": {
            "model": "rednet26",
            "kwargs": {"layers": [1, 1, 1, 1], "base_width": 16, "stem_width": 16},
            "recipe": "teacher.yaml",
        },
    },
    data={"train": "digits", "decode_threads": 4},
    mixing={"group_size": 8},
    optim={"lr_batch_size": 128, "ema_decay": None},
    train={"global_batch_size": 128, "micro_batch_size": 32},
)
TEACHER = {
    "name": "teacher",
    "augment": TINY["augment"],
    "optim": TINY["optim"],
    "train": TINY["train"] | {"epochs": 1},
}
STEPS_PER_EPOCH = 11  # 1,797 digits, a fifth held out, global batches of 128


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path, cache):
    """Arguments that run the tiny recipe in a folder of the test's own."""
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(yaml.safe_dump(TEACHER))
    recipe = yaml.safe_dump(TINY).replace("recipe: teacher.yaml", f"recipe: {teacher}")
    (tmp_path / "tiny.yaml").write_text(recipe)
    runs = tmp_path / "runs"
    return ["--config", str(tmp_path / "tiny.yaml"), "--runs_dir", str(runs), "--data.cache_dir", str(cache)]


def lengthen(arguments, epochs):
    folder = Path(arguments[1]).parent
    for file in ("tiny.yaml", "teacher.yaml"):
        recipe = yaml.safe_load((folder / file).read_text())
        recipe["train"]["epochs"] = epochs
        (folder / file).write_text(yaml.safe_dump(recipe))


def run_dir(arguments):
    return Path(arguments[arguments.index("--runs_dir") + 1]) / "tiny"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(arguments, *, ranks=1, **kwargs):
    """The trainer as users start it, in a process group of its own."""
    program = Path(sys.executable).with_name("deepspeed")
    command = [str(program), "--num_accelerators", str(ranks), str(REPOSITORY / "cit_scale" / "train.py"), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **kwargs
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.mark.slow
def test_one_command_trains_teachers_and_student_and_leaves_a_run_that_describes_itself(tiny, capsys):
    assert main(tiny) == 0
    folder = run_dir(tiny)
    for run in (folder, folder / "teachers" / "conv", folder / "teachers" / "inv"):
        for file in ("config.yaml", "env.json", "metrics.jsonl", "student.safetensors", "results.json", "tensorboard"):
            assert (run / file).exists(), f"{run / file} is missing"
        assert not list(run.rglob("*.partial"))

    results = json.loads((folder / "results.json").read_text())
    assert results["eval_images"] == 359
    assert results["steps"] == 2 * STEPS_PER_EPOCH
    assert results["images_per_s"] > 0
    assert set(results["accuracy"]["student"]["top1"]) == {"cls", "conv", "inv", "average"}
    assert set(results["teachers"]) == {"conv", "inv"}

    records = metrics(folder)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    losses = [record for record in records if "loss" in record]
    for record in losses:
        assert record["loss"] == pytest.approx(
            record["loss_label"] + record["loss_conv"] + record["loss_inv"], rel=1e-5
        )
    assert losses[-1]["loss_label"] < losses[0]["loss_label"]
    assert [record["step"] for record in records if "top1_average" in record] == [STEPS_PER_EPOCH]

    shown = capsys.readouterr().out
    for line in ("teacher conv (resnet10t)", "teacher inv (rednet26)", "student, average", str(folder)):
        assert line in shown

    # A finished run started again does nothing and says the same.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(tiny) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "student, average" in capsys.readouterr().out

    # Other settings in the same folder are refused; --fresh keeps the old run beside the new one.
    assert main([*tiny, "--optim.lr", "0.5"]) == 7
    assert "optim.lr: 0.002 -> 0.5" in capsys.readouterr().err
    assert main([*tiny, "--fresh", "--train.epochs", "1"]) == 0
    assert (folder.parent / "tiny.1" / "results.json").exists()
    assert json.loads((folder / "results.json").read_text())["steps"] == STEPS_PER_EPOCH


def test_a_run_without_teachers_is_plain_supervised_training(tiny):
    assert main([*tiny, "--teachers", "null", "--student.name", "resnet10t", "--student.kwargs", "{}"]) == 0
    results = json.loads((run_dir(tiny) / "results.json").read_text())
    assert set(results["accuracy"]["student"]["top1"]) == {"cls"}
    assert results["teachers"] == {}


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--train.epohcs", "3"], 2, "did you mean train.epochs?"),
        (["--train.global_batch_size", "100"], 2, "the nearest that do: 96, 104"),
        (["--student.kwargs.num_classes", "7"], 2, "it follows from the data set"),
        (["--augment.policy", "rand-m9-x3"], 2, "rand-m9-x3"),
        (["--data.cache_dir", "/proc/none"], 3, "name another folder by --data.cache_dir"),
        (["--runs_dir", "/proc/none"], 6, "another --runs_dir"),
        (["--train.global_batch_size", "2048"], 2, "2048"),
        (["--data.train", "/no/such/folder"], 3, "/no/such/folder"),
        (
            ["--student.name", "dla34"],
            2,
            "error: student.name=dla34: DLA has no linear classifier on pooled features",
        ),
        (["--student.name", "cit_tiny_patch16_225"], 2, "the nearest are cit_tiny_patch16_224"),
        (["--student.name", "resnet18", "--student.weights", "x", "--teachers", "null"], 3, "weights x do not exist"),
        (["--teachers=null", "--student.name=inception_v3"], 2, "error: student.name=inception_v3: it cannot take"),
        (["--teachers.conv={model: resnet10t.new, recipe: digits_teacher}"], 2, "teachers.conv.model=resnet10t.new: "),
        (["--teachers.conv={model: inception_v3, recipe: digits_teacher}"], 2, "teachers.conv.model=inception_v3: it"),
        (["--teachers.conv", "{model: regnety_0020, recipe: digits_teacher}"], 2, "no model is called 'regnety_0020'"),
        (["--teachers.conv.weights", "/no/such/file"], 3, "/no/such/file"),
        (["--teachers.conv.recipe", "null"], 2, "--teachers.conv.weights FILE"),
        (["--engine.ds_config", "zero9"], 2, "zero9"),
        (["--deepspeed_config", "contradicts.json"], 2, "gradient_clipping"),
        (["--student.kwargs.drop_path_rate", "x"], 2, "timm.create_model"),
        (["--local_rank", "3"], 2, "leave the flag to the launcher"),
    ],
)
def test_a_users_mistake_is_one_line_and_its_exit_code_before_anything_is_written(
    tiny, arguments, code, expected, capsys, tmp_path
):
    (tmp_path / "contradicts.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    arguments = [str(tmp_path / value) if value == "contradicts.json" else value for value in arguments]
    assert main([*tiny, *arguments]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert not run_dir(tiny).exists()


def test_a_teacher_of_another_class_count_is_refused(tiny, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    assert main([*tiny, "--teachers.conv.weights", str(tmp_path / "seven.safetensors")]) == 2
    assert "have 7 classes, the data set has 10" in capsys.readouterr().err


def test_help_and_print_config_leave_with_0(capsys):
    for flag, expected in (("--help", "--train.epochs"), ("--print_config", "global_batch_size: 64")):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_a_users_mistake_through_the_launcher_is_exit_code_2_and_said_once(tiny):
    code, output = finish(launch([*tiny, "--train.global_batch_size", "100"], ranks=2))
    assert code == 2
    assert output.count("error: train.global_batch_size=100") == 1
    assert "Traceback" not in output


def wait_for_step(folder, step, process):
    """Block until the run in ``folder`` has logged ``step``."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        path = folder / "metrics.jsonl"
        if path.exists() and (path.read_text() or "\n").count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} did not reach step {step}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ranks", "interruptions"),
    [
        (1, [("teachers/inv", 3, signal.SIGTERM, False)]),
        (
            2,
            [
                ("teachers/inv", 3, signal.SIGTERM, False),  # kill: in a teacher's training
                ("", 2, signal.SIGINT, True),  # Ctrl-C: the terminal signals the whole group
                ("", 6, signal.SIGKILL, True),  # kill -9, as a lost machine
            ],
        ),
    ],
)
def test_a_run_interrupted_by_every_signal_ends_bit_for_bit_as_one_that_was_not(tiny, ranks, interruptions):
    """interruptions: the folder of the run that is trained then, its step, the signal, whether to the whole group."""
    lengthen(tiny, epochs=2)  # long enough for a signal to arrive in the middle
    code, output = finish(launch([*tiny, "--name", "calm"], ranks=ranks))
    assert code == 0, output
    assert "Warning:" not in output, "a warning of a library's, which nobody who trains can act on"
    calm, folder = run_dir(tiny).with_name("calm"), run_dir(tiny)

    def interrupt(place, step, signum, *, group):
        process = launch(tiny, ranks=ranks)
        wait_for_step(place, step, process)
        (os.killpg if group else os.kill)(process.pid, signum)
        code, output = finish(process)
        assert code != 0, output
        assert ("stopped after step" in output) == (signum != signal.SIGKILL), output
        assert not (place / "results.json").exists()

    for place, step, signum, group in interruptions:
        interrupt(folder / place, step, signum, group=group)
    code, output = finish(launch(tiny, ranks=ranks))
    assert code == 0, output
    assert re.search(r"continues after step", output)

    for part in ("", "teachers/conv", "teachers/inv"):
        expected, found = (load_file(run / part / "student.safetensors") for run in (calm, folder))
        assert expected.keys() == found.keys()
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert not different, f"{part}: {different}"
    last = [record["loss"] for record in metrics(folder) if "loss" in record]
    assert last == [record["loss"] for record in metrics(calm) if "loss" in record]


def test_a_way_out_by_the_same_command_leaves_out_fresh(tiny, monkeypatch, capsys):
    """The same command would set aside what was reached."""

    def fail(*arguments):
        raise CannotWriteError("the disk is full; the same command continues there")

    monkeypatch.setattr(train, "run", fail)
    assert main([*tiny, "--fresh"]) == CannotWriteError.exit_code
    assert capsys.readouterr().err == "error: the disk is full; the same command continues there (without --fresh)\n"
    assert main(tiny) == CannotWriteError.exit_code
    assert "--fresh" not in capsys.readouterr().err


# --- Bad images ---


def photos_of_two_classes(folder, count=24):
    """Photos in two classes; each of them is good."""
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(90, 120, seed=i)).save(path)


def spoil(folder):
    """Every kind of file that people have among their images. Returns those that nothing can be learned from."""
    good = (folder / "class0" / "00.jpg").read_bytes()
    image = Image.open(io.BytesIO(good))
    table = good.index(b"\xff\xc4")  # of Huffman codes
    kinds = {
        "zero.jpg": b"",
        "text.jpg": b"not an image",
        "cut.jpg": good[: len(good) // 2],
        "table.jpg": good[: table + 6] + b"\xff" * 12 + good[table + 18 :],
        "bomb.png": bomb(20_000, 20_000),
    }
    for name, data in kinds.items():
        (folder / "class1" / name).write_bytes(data)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.convert("CMYK").save(folder / "class0" / "cmyk.jpg")
    image.convert("P").save(folder / "class0" / "palette.png")
    image.convert("RGBA").save(folder / "class0" / "alpha.png")
    image.resize((1, 40)).save(folder / "class0" / "thin.png")
    image.save(folder / "class0" / "turned.jpg", exif=turned)
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "class0" / "deep.png")
    (folder / "class0" / "folder.jpg").mkdir()
    return sorted(f"class1/{name}" for name in kinds)


def bomb(width, height):
    """A PNG that says it has so many pixels, and has none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def on_photos(arguments, folder):
    """The tiny recipe, without teachers, on these images."""
    sizes = ["--train.global_batch_size", "16", "--train.micro_batch_size", "8", "--optim.lr_batch_size", "16"]
    return [*arguments, "--teachers", "null", "--data.train", str(folder), *sizes]


def bad_images(folder):
    return [line.split("\t")[0] for line in (folder / "bad_images.tsv").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_over_all_kinds_of_bad_images_finishes_and_names_each(tiny, tmp_path, ranks):
    photos_of_two_classes(tmp_path / "set")
    bad = spoil(tmp_path / "set")
    code, output = finish(launch(on_photos(tiny, tmp_path / "set"), ranks=ranks))
    assert code == 0, output
    assert [os.path.relpath(name, tmp_path / "set") for name in bad_images(run_dir(tiny))] == bad
    assert "5 images cannot be used and are replaced by others" in output
    assert json.loads((run_dir(tiny) / "results.json").read_text())["eval_images"] >= 1


def test_more_bad_images_than_allowed_stop_the_run_which_goes_on_when_more_are_allowed(tiny, tmp_path, capsys):
    photos_of_two_classes(tmp_path / "set")
    arguments = on_photos(tiny, tmp_path / "set")
    (tmp_path / "set" / "class0" / "00.jpg").write_bytes((tmp_path / "set" / "class0" / "02.jpg").read_bytes()[:-900])
    (tmp_path / "set" / "class1" / "01.jpg").write_bytes((tmp_path / "set" / "class1" / "03.jpg").read_bytes()[:-900])
    assert main([*arguments, "--data.max_bad_images", "1"]) == 4
    error = capsys.readouterr().err
    assert re.search(
        r"error: 2 images cannot be used, more than data.max_bad_images=1; their list: \S+bad_images.tsv", error
    )
    assert list((run_dir(tiny) / "ckpt").iterdir())
    assert main([*arguments, "--data.max_bad_images", "2"]) == 0
    assert "continues after step" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_images_that_another_rank_meets_in_the_last_step_stop_the_run(tiny, tmp_path):
    """What a rank has met is said a step later, and there is none."""
    photos_of_two_classes(tmp_path / "set", 20)  # a fifth is held out: one step
    arguments = on_photos(tiny, tmp_path / "set")
    for image in sorted((tmp_path / "set").glob("class0/*.jpg"))[:6]:
        image.write_bytes(image.read_bytes()[:-900])
    code, output = finish(launch([*arguments, "--train.epochs", "1", "--data.max_bad_images", "1"], ranks=2))
    assert code == 4, output
    assert "images cannot be used, more than data.max_bad_images=1" in output
    assert not (run_dir(tiny) / "results.json").exists()


def test_more_bad_images_in_the_index_than_allowed_are_refused_before_anything_is_written(tiny, tmp_path, capsys):
    photos_of_two_classes(tmp_path / "set")
    spoil(tmp_path / "set")
    assert main([*on_photos(tiny, tmp_path / "set"), "--data.max_bad_images", "2"]) == 4
    assert "error: 3 images cannot be used, more than data.max_bad_images=2: " in capsys.readouterr().err
    assert not run_dir(tiny).exists()
