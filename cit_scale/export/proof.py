"""Measures an exported file before it is said to be done: what it says of images, beside what the student says.

Figures of real exports are in docs/measurements/exports.md.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World
from cit_scale.errors import BadDataError, RefusedError
from cit_scale.inference.classifier import Classifier
from cit_scale.inference.judges import Judged
from cit_scale.inference.turns import Answers, classify_all, classify_images, unusable_text

MOST_LOSS = 0.1  # points of accuracy, beyond which a loss that is no chance is refused
SIGNIFICANT = 0.05

CPU = torch.device("cpu")  # where both are compared, whatever the machine has

# How far logits may differ, over the largest of the student's: what the arithmetic of each form explains.
TOLERANCES = {"float32": 1e-4, "fp16": 0.05, "int8": 0.5}
RESIZED = 0.05  # where the file, or who opens it, resizes images by another program

LATENCY_BATCHES = (1, 32)
WARM_UP_CALLS = 3  # TorchScript compiles in the second


@dataclass(frozen=True)
class Said:
    """What a classifier says of N images, those that it can use. samples: (N,), their indices. logits: (N, K). labels:
    (N,). first: the first one, as the classifier takes it.
    """

    samples: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    first: Tensor

    @property
    def correct(self) -> np.ndarray:
        return self.logits.argmax(axis=1) == self.labels

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.correct.mean())


@dataclass(frozen=True)
class Proof:
    """A file beside the student, on N images.

    student_top1, top1: percent. changed: images of which the two say another class. difference: the largest of two
    logits, of the same image by both, or of one by the file, alone and among others. scale: the student's largest.
    tolerance: how much of it the difference may be. p_value: of McNemar's exact test, that both are right as often.
    latency_ms, student_latency_ms: median of a call on one thread, by batch size.
    """

    images: int
    student_top1: float
    top1: float
    changed: int
    difference: float
    scale: float
    tolerance: float
    p_value: float
    latency_ms: dict[int, float]
    student_latency_ms: dict[int, float]

    def complaint(self) -> str | None:
        """Why the file should not be used; None if nothing speaks against it."""
        if self.student_top1 - self.top1 > MOST_LOSS and self.p_value < SIGNIFICANT:
            return (
                f"top-1 falls from {self.student_top1:.2f} to {self.top1:.2f} % on {self.images} images, which is no "
                f"chance (McNemar's exact test, p = {self.p_value:.2g})"
            )
        if not self.difference <= self.tolerance * self.scale:  # NaN, too
            return (
                f"its logits differ by up to {self.difference:.3g} from the student's, whose largest is "
                f"{self.scale:.3g}: more than the {100 * self.tolerance:g} % which its arithmetic explains; "
                f"{self.changed} of {self.images} images change their class"
            )
        return None


def listen(classifier: Classifier, source: Source, judged: Judged, threads: int) -> Said:
    """Classify all images of an evaluation set, each made ready as the classifier asks for. Raises BadDataError."""
    logits: list[np.ndarray] = []
    samples: list[int] = []
    reasons: list[str] = []

    def take(answers: Answers) -> bool:
        samples.extend(answers.good)
        reasons.extend(reason for _, reason in answers.unusable)
        if answers.logits:
            logits.append(list(answers.logits.values())[-1])  # of all heads
        return True

    items = iter(judged.samples.tolist())
    classify_all(items, source.read, classifier, World(), take, threads=threads, device=CPU)
    if not samples:
        raise BadDataError(f"none of {len(reasons)} images can be used: {unusable_text(reasons)}")
    label_of = dict(zip(judged.samples.tolist(), judged.labels, strict=True))
    labels = np.array([label_of[sample][0] for sample in samples])
    first = classifier.prepare(source.read(samples[0]))
    return Said(np.array(samples), np.concatenate(logits), labels, first)


def prove(
    student: Said,
    file: Said,
    classifier: Classifier,
    tolerance: float,
    latency_ms: dict[int, float],
    student_latency_ms: dict[int, float],
) -> Proof:
    """Compare a file with the student. classifier: the file, which is asked about one image alone, too.

    Raises RefusedError where one of the two has no finite answer for an image, and the other has.
    """
    if not np.array_equal(student.samples, file.samples):
        raise RefusedError(
            f"the file has an answer for {len(file.samples)} images, and the student for {len(student.samples)}; the "
            "others could not be made ready, or the answer is not finite"
        )
    alone = list(classify_images(classifier, [file.first]).values())[-1][0]
    differences = np.abs(student.logits - file.logits).max(), np.abs(alone - file.logits[0]).max()
    return Proof(
        images=len(student.labels),
        student_top1=student.top1,
        top1=file.top1,
        changed=int((student.logits.argmax(axis=1) != file.logits.argmax(axis=1)).sum()),
        difference=float(np.max(differences)),
        scale=float(np.abs(student.logits).max()),
        tolerance=tolerance,
        p_value=mcnemar(int((file.correct & ~student.correct).sum()), int((student.correct & ~file.correct).sum())),
        latency_ms=latency_ms,
        student_latency_ms=student_latency_ms,
    )


def mcnemar(gained: int, lost: int) -> float:
    """p of McNemar's exact test, two-sided: of a fair coin that falls ``gained`` to ``lost``, or less evenly.

    McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 1947.
    """
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, heads) for heads in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def refuse_loss(proof: Proof, what: str, *, allowed: bool) -> None:
    """Raise RefusedError if something speaks against the file, unless that is allowed."""
    complaint = proof.complaint()
    if complaint is not None and not allowed:
        raise RefusedError(f"{what} is not kept: {complaint}; --allow-loss keeps it")


def latency_ms(classifier: Classifier, image: Tensor, calls: int = 20) -> dict[int, float]:
    """Median milliseconds of a call on one thread, by batch size, after some calls that do not count.

    A file for single images is called once for each image of a batch.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as files of onnxruntime are opened
    found = {}
    try:
        for size in LATENCY_BATCHES:
            images = [image] * size
            times = []
            for _ in range(WARM_UP_CALLS + (calls if size == 1 else max(calls // 4, 1))):
                began_at = time.perf_counter()
                classify_images(classifier, images)
                times.append(1e3 * (time.perf_counter() - began_at))
            found[size] = statistics.median(times[WARM_UP_CALLS:])
    finally:
        torch.set_num_threads(threads)
    return found
