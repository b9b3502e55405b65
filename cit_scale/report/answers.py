"""What the networks of a run say of every image of a data set: one pass, of which the report's figures are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np

from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World, first_on_each_node, run_on_all_ranks
from cit_scale.errors import BadDataError
from cit_scale.inference.evaluate import known_images
from cit_scale.inference.scores import ImageScores, Scores, joined, score_images, summarize
from cit_scale.inference.turns import Answers, classify_all, unusable_text
from cit_scale.report.measures import kl_divergence
from cit_scale.report.networks import (
    FEATURES_OF_HEAD,
    FEATURES_OF_TEACHER,
    HEAD,
    TEACHER,
    RunNetworks,
    probing_classifier,
)

T = TypeVar("T")

OWN_SET = "the run's own evaluation set"

MOST_FEATURES = 2000  # images whose features are compared, spread over the data set: their Gram matrices are that wide


@dataclass(frozen=True)
class NetworkAnswers:
    """What one network says of N images. All (N,).

    choice: the class with the highest logit. prob: its probability. nll: negative log-likelihood of the label. in_five:
    whether the label is among the five highest. entropy: of the probabilities, over log K: 0 sure, 1 no idea.
    """

    choice: np.ndarray
    prob: np.ndarray
    nll: np.ndarray
    in_five: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class Survey:
    """The answers of a run's networks to N images.

    data: of the images, in words. source, samples: the images, and their indices there (N,). labels: (N,). classes: of
    the networks. heads, teachers: by name; ``whole`` among the heads stands for the student. divergences: by teacher
    and head, KL(teacher || head) of each image in nats. head_features, teacher_features: by name, (F, C) of some
    images. unusable: images that could not be used, with the reasons. left_out: images of unknown classes.
    """

    data: str
    source: Source
    samples: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    heads: Mapping[str, NetworkAnswers]
    teachers: Mapping[str, NetworkAnswers]
    whole: str
    divergences: Mapping[tuple[str, str], np.ndarray]
    head_features: Mapping[str, np.ndarray]
    teacher_features: Mapping[str, np.ndarray]
    unusable: Mapping[str, str]
    left_out: int

    @property
    def student(self) -> NetworkAnswers:
        return self.heads[self.whole]

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether the student is right, (N,)."""
        return self.student.choice == self.labels

    def scores(self, said: NetworkAnswers) -> Scores:
        """The scores of ``cit-scale evaluate``."""
        images = ImageScores(said.choice == self.labels, said.in_five, said.nll, said.prob)
        return summarize(images, self.labels)


@dataclass
class _Collected:
    samples: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    said: dict[str, list[NetworkAnswers]] = field(default_factory=dict)
    divergences: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)


def ask_networks(
    networks: RunNetworks,
    world: World,
    *,
    open_set: Callable[[], Source],
    data: str | None = None,
    only_known: bool = False,
    batch_size: int | None = None,
    threads: int = 4,
    should_continue: Callable[[], bool] = lambda: True,
) -> Survey | None:
    """Collective. Ask all networks about a data set. Returns the answers on rank 0; None on the others, and once
    ``should_continue`` returns False on rank 0.

    data, only_known, batch_size, threads: as ``evaluate_classifier`` takes them. Raises as it does.
    """
    classifier = run_on_all_ranks(world, lambda: probing_classifier(networks, world.device))
    source = first_on_each_node(world, open_set)
    judged = run_on_all_ranks(world, lambda: known_images(source, classifier, only_known))
    label_of = dict(zip(judged.samples.tolist(), judged.labels, strict=True))
    featured = set(judged.samples[spread_places(len(judged.samples), MOST_FEATURES)].tolist())
    collected = _Collected()
    is_whole = True

    def take(answers: Answers) -> bool:
        nonlocal is_whole
        collected.reasons |= dict(answers.unusable)
        if answers.good:
            _add(collected, answers, np.array([label_of[sample][0] for sample in answers.good]), featured)
        is_whole = should_continue()
        return is_whole

    items = iter(judged.samples.tolist())
    classify_all(items, source.read, classifier, world, take, batch_size=batch_size, threads=threads)

    def whole() -> Survey | None:
        if not world.is_main or not is_whole:
            return None
        unusable = {source.name(sample): reason for sample, reason in collected.reasons.items()}
        if not collected.samples:
            raise BadDataError(f"none of {len(judged.samples)} images can be used: {unusable_text(unusable.values())}")
        said = {key: joined(parts) for key, parts in collected.said.items()}
        features = {key: np.concatenate(parts) for key, parts in collected.features.items()}
        return Survey(
            data=data or OWN_SET,
            source=source,
            samples=np.array(collected.samples),
            labels=np.array([label_of[sample][0] for sample in collected.samples]),
            classes=classifier.classes,
            heads=_of_kind(HEAD, said),
            teachers=_of_kind(TEACHER, said),
            whole=networks.whole,
            divergences={pair: np.concatenate(parts) for pair, parts in collected.divergences.items()},
            head_features=_of_kind(FEATURES_OF_HEAD, features),
            teacher_features=_of_kind(FEATURES_OF_TEACHER, features),
            unusable=unusable,
            left_out=len(source) - len(judged.samples),
        )

    return run_on_all_ranks(world, whole)


def spread_places(count: int, most: int) -> np.ndarray:
    """``most`` places of ``count``, evenly spread; all, if there are no more."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _of_kind(kind: str, found: Mapping[str, T]) -> dict[str, T]:
    """The entries of one kind, by name."""
    start = f"{kind} "
    return {key.removeprefix(start): each for key, each in found.items() if key.startswith(start)}


def _add(collected: _Collected, answers: Answers, labels: np.ndarray, featured: set[int]) -> None:
    """Add a batch. labels: of its good images."""
    collected.samples += answers.good
    logits = {key: each for key, each in answers.logits.items() if key.startswith((f"{HEAD} ", f"{TEACHER} "))}
    for key, each in logits.items():
        collected.said.setdefault(key, []).append(summarize_answers(each, labels))
    heads, teachers = _of_kind(HEAD, logits), _of_kind(TEACHER, logits)
    for teacher, theirs in teachers.items():
        for head, ours in heads.items():
            collected.divergences.setdefault((teacher, head), []).append(kl_divergence(theirs, ours))
    chosen = [sample in featured for sample in answers.good]
    for key, features in answers.logits.items():
        if key not in logits:
            collected.features.setdefault(key, []).append(features[chosen])


def summarize_answers(logits: np.ndarray, labels: np.ndarray) -> NetworkAnswers:
    """logits: (B, K). labels: (B,). Of equal logits the first counts as higher."""
    scores = score_images(logits, [(label,) for label in labels.tolist()])
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    likelihoods = np.exp(logits)
    total = likelihoods.sum(axis=1)
    # Entropy of p = exp(z) / Z: log Z - sum of p z.
    entropy = np.log(total) - (likelihoods * logits).sum(axis=1) / total
    return NetworkAnswers(
        choice=logits.argmax(axis=1),
        prob=scores.confidence,
        nll=scores.nll,
        in_five=scores.in_five,
        entropy=np.maximum(entropy, 0) / np.log(max(logits.shape[1], 2)),
    )
