"""The model card, the best weights, and what else a finished run leaves for whoever comes next."""

import json
import shutil

import pytest
import yaml
from tiny_run import TinyRun

from cit_scale.checkpoint.store import SCORES, SCORES_EMA
from cit_scale.run.card import plain
from cit_scale.run.results import command_line, export_best


@pytest.fixture(scope="module")
def kept(tiny_inputs, tmp_path_factory):
    """A tiny run that keeps its best checkpoints."""
    run = TinyRun(tiny_inputs, tmp_path_factory.mktemp("kept"), "plain", ("--train.keep_best", "1"))
    run.finish()
    return run


def test_the_best_weights_lie_there_by_name(kept):
    results = json.loads((kept.run_dir / "results.json").read_text())
    for name, file, scores in (
        ("student", "student_best.safetensors", SCORES),
        ("student ema", "student_ema_best.safetensors", SCORES_EMA),
    ):
        found = {int(step): top1 for step, top1 in json.loads((kept.run_dir / "ckpt" / scores).read_text()).items()}
        found[results["steps"]] = results["accuracy"][name]["top1"]["average"]
        best = results["best"][name]
        assert best["top1"] == max(found.values()) == found[best["step"]]
        saved = kept.checkpoint(best["step"]) / file.replace("_best", "")
        assert (kept.run_dir / file).read_bytes() == saved.read_bytes()


def test_the_best_is_the_newest_of_equals_and_only_where_a_checkpoint_is(kept, tmp_path):
    run_dir = shutil.copytree(kept.run_dir, tmp_path / "run")
    steps = sorted(int(path.name[5:]) for path in (run_dir / "ckpt").glob("step_*"))
    (run_dir / "ckpt" / SCORES).write_text(json.dumps({str(steps[0]): 50.0, str(steps[-1]): 50.0, "1": 99.0}))
    accuracy = {"student": {"top1": {"cls": 1.0, "average": 20.0}}}
    assert export_best(run_dir, steps[-1] + 1, accuracy)["student"]["step"] == steps[-1]
    (run_dir / "ckpt" / SCORES).write_text(json.dumps({str(steps[0]): 50.0, "1": 99.0}))
    best = export_best(run_dir, steps[-1], accuracy)
    assert best["student"] == {"file": "student_best.safetensors", "step": steps[0], "top1": 50.0}


def test_without_keep_best_there_are_none(calm):
    run_dir = calm("plain").run_dir
    assert json.loads((run_dir / "results.json").read_text())["best"] == {}
    assert not (run_dir / "student_best.safetensors").exists()


def test_the_card_says_what_the_run_is(kept):
    text = (kept.run_dir / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "timm"
    results = json.loads((kept.run_dir / "results.json").read_text())
    assert f"| student, average | {results['accuracy']['student']['top1']['average']:.2f} |" in text
    assert f"resnet10t ({results['teachers']['conv']['top1']:.2f} %)" in text
    assert 'timm.create_model("local-dir:FOLDER", pretrained=True)' in text
    start = json.loads((kept.run_dir / "env.json").read_text())[0]
    assert f"\n```\n{start['command']}\n```\n" in text
    assert (start["commit"] is None) or f"Made by CiT-Scale at commit {start['commit']}, with" in text
    best = results["best"]["student"]
    assert f"`{best['file']}` (step {best['step']}, {best['top1']:.2f} %)" in text


def test_a_licence_that_the_user_has_set_stays(kept, tmp_path):
    from cit_scale.run.networks import licence_of

    run_dir = shutil.copytree(kept.run_dir, tmp_path / "run")
    assert licence_of(run_dir) == "other"
    description = json.loads((run_dir / "config.json").read_text())
    description["pretrained_cfg"]["license"] = "mit"
    (run_dir / "config.json").write_text(json.dumps(description))
    assert licence_of(run_dir) == "mit"


def test_names_in_a_card_are_no_markup():
    assert plain("a|b") == "a\\|b"
    assert plain("*x* `y` <b> [z](http://a.b)") == "\\*x\\* \\`y\\` &lt;b&gt; \\[z\\](http&#58;//a.b)"
    assert "\n" not in plain("a\nb")
    assert plain("cat_1") == "cat\\_1"


def test_a_command_is_noted_as_it_was_typed():
    argv = ["/x/cit_scale/train.py", "--local_rank=0", "--config", "own", "--data.train", "my photos"]
    assert command_line(argv) == "python cit_scale/train.py --config own --data.train 'my photos'"
    assert command_line(["/usr/bin/cit-scale", "train", "--config", "own"]) == "cit-scale train --config own"
    assert command_line(["/x/cit_scale/__main__.py", "train"]) == "cit-scale train"


def test_the_closing_table_names_the_next_two_commands(kept, capsys):
    from cit_scale.run.results import print_table

    print_table(kept.run_dir, json.loads((kept.run_dir / "results.json").read_text()))
    printed = capsys.readouterr().out
    assert f"cit-scale predict {kept.run_dir} IMAGES" in printed
    assert f"cit-scale export {kept.run_dir} --to onnx" in printed
    assert "best weights      student_best.safetensors" in printed
