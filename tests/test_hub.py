"""A run folder is pushed with huggingface_hub's own tools, and opened from there by this project and by timm."""

import json
import os
import subprocess
import sys

import hub_server
import pytest

# In a process of its own: the library reads its settings when it is imported.
PUSH = """
import sys, huggingface_hub
api = huggingface_hub.HfApi(token="hf_anything")
api.create_repo("own/pets")
these = ["config.json", "README.md", "student.safetensors"]  # as in docs/using.md
api.upload_folder(repo_id="own/pets", folder_path=sys.argv[1], allow_patterns=these)
"""
OPEN = """
import json, sys, timm, torch
import cit_scale.models
from cit_scale.distributed.world import World
from cit_scale.inference.classifier import open_classifier
images = torch.linspace(0, 255, 2 * 3 * 16 * 16).to(torch.uint8).view(2, 3, 16, 16)
ours = open_classifier("hf-hub:own/pets", World())
model = timm.create_model("hf-hub:own/pets", pretrained=True).eval()
config = timm.data.resolve_data_config(model=model)
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    theirs = model((images / 255 - mean) / std)
print(json.dumps({
    "classes": ours.classes,
    "timms": list(model.pretrained_cfg["label_names"]),
    "ours": ours.classify(images)["average"].tolist(),
    "theirs": theirs.tolist(),
}))
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    """``process(code, endpoint, *arguments)``: what a Python program prints that talks to a hub."""

    def run(code, endpoint, *arguments):
        env = {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


def test_a_run_folder_is_pushed_and_opened_again(calm, process, tmp_path):
    run_dir = calm("plain").run_dir
    (tmp_path / "hub").mkdir()
    with hub_server.serve(tmp_path / "hub") as endpoint:
        process(PUSH, endpoint, run_dir)
        pushed = tmp_path / "hub" / "own" / "pets"
        assert (pushed / "student.safetensors").read_bytes() == (run_dir / "student.safetensors").read_bytes()
        assert (pushed / "README.md").read_text() == (run_dir / "README.md").read_text()
        names = sorted(str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file())
        assert names == ["README.md", "config.json", "student.safetensors"]
        found = json.loads(process(OPEN, endpoint))
    description = json.loads((run_dir / "config.json").read_text())
    assert found["classes"] == found["timms"] == description["label_names"]
    flat = [value for which in ("ours", "theirs") for row in found[which] for value in row]
    half = len(flat) // 2
    assert flat[:half] == pytest.approx(flat[half:], abs=1e-5)
