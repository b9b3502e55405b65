"""Every format of ``cit-scale export`` for some runs: accuracy, difference of logits, latency, size.

python -m cit_scale.bench.exports runs/pets runs/pets/teachers/inv
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from cit_scale.bench.measure import machine_text, table
from cit_scale.distributed.world import World
from cit_scale.export.proof import Proof
from cit_scale.export.write import Form, export, megabytes
from cit_scale.inference.classifier import open_network

FORMS = (
    Form("onnx"),
    Form("onnx", "fp16"),
    Form("onnx", "int8"),
    Form("onnx", any_size=True),
    Form("pt2"),
    Form("torchscript"),
    Form("timm"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders")
    arguments = parser.parse_args()
    print(f"{machine_text(torch.device('cpu'))}\n")
    header = ["run", "file", "top-1 %", "changed", "largest difference", "of", "ms for 1", "ms for 32", "MB", "refused"]
    rows = []
    for run in arguments.runs:
        for number, form in enumerate(FORMS):
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / form.file_name("student"))
                path, proof = export(open_network(run, World()), form, out=out, allow_loss=True)
                if number == 0:
                    rows.append(_row(run, "the student", proof, proof.student_top1, proof.student_latency_ms, "", ""))
                size = f"{megabytes(path):.2f}"
                complaint = "yes" if proof.complaint() else ""
                name = "timm folder" if form.kind == "timm" else path.name
                rows.append(_row("", name, proof, proof.top1, proof.latency_ms, size, complaint))
            print(" | ".join(rows[-1]), flush=True)
    print(f"\n{table(header, rows)}")


def _row(
    run: str, name: str, proof: Proof, top1: float, latency_ms: dict[int, float], size: str, refused: str
) -> list[str]:
    is_file = bool(size)
    differs = [str(proof.changed), f"{proof.difference:.1e}", f"{proof.scale:.1f}"] if is_file else ["", "", ""]
    return [run, name, f"{top1:.2f}", *differs, f"{latency_ms[1]:.1f}", f"{latency_ms[32]:.0f}", size, refused]


if __name__ == "__main__":
    main()
