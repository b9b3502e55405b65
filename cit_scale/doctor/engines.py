"""Two training steps with each engine, which have to have the gradient norms of the plain one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from cit_scale.batch import Batch
from cit_scale.bench.step_ways import OurStep, Task, Way, draw_batch, freeze_teachers, prepare
from cit_scale.config import MixingConfig, StudentConfig, TeacherConfig
from cit_scale.distributed.world import World, start
from cit_scale.doctor.findings import Asked, Finding, failed, message_of, not_here, ok
from cit_scale.doctor.ranks import WITHOUT_GPU, Heard, Say, gpu_count, run_ranks
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.teachers import Teacher

PLAIN = "plain"
ENGINES = (PLAIN, "fsdp2", "zero0", "zero1", "zero2", "zero3")
STEPS = 2
LIMIT_S = 180.0
PATIENCE_S = 60.0  # of a rank with the others; the first step on a GPU tunes the involution
ALLOWED = 1e-3  # relative difference of a norm: engines add up in another order, by 3e-6 on a CPU
TASK = Task(
    student=StudentConfig("cit_tiny_patch16_224", kwargs={"depth": 2}),
    teachers={"conv": TeacherConfig("regnety_002"), "inv": TeacherConfig("rednet26")},
    image_size=64,
    batch_size=8,
    num_classes=10,
    mixing=MixingConfig(group_size=8),
)

Norms = Sequence[float]
Answers = Mapping[str, Mapping[int, Norms | str]]
"""By engine and rank, the gradient norms of the steps, or what went wrong."""


def check(asked: Asked) -> Finding:
    """The ranks take the steps with each engine, and rank 0 with the plain one, over the images of all."""
    if "collectives" in asked.found and asked.found["collectives"].status == "failed":
        return not_here("the collectives have failed, see their row")
    ranks = gpu_count(asked) or WITHOUT_GPU
    return judge(by_engine(run_ranks(ranks, take_steps, LIMIT_S)), ranks)


def take_steps(world: World, store: dist.Store, say: Say) -> None:
    """Collective. Say the name of each engine, and what comes of its steps. Stops where ranks differ in what goes
    wrong: some wait for the others then.
    """
    start(world, PATIENCE_S, store)  # and first: without it each rank has threads for all cores
    set_arithmetic(world.device)
    # What teachers say is the same for all: they are no part of an engine.
    teachers = freeze_teachers(prepare(TASK, _way("fsdp2"), world))
    if world.is_main:
        # In as many micro-steps: BatchNorm goes by the images that it sees at once.
        batches = [draw_batch(TASK, dataclasses.replace(world, rank=rank)) for rank in range(world.world_size)]
        whole = dataclasses.replace(TASK, batch_size=TASK.batch_size * len(batches), micro_steps=len(batches))
        say((PLAIN, norms_of(PLAIN, whole, World(), teachers, *batches)))
    for engine in ENGINES[1:]:
        answer = norms_of(engine, TASK, world, teachers, draw_batch(TASK, world))
        say((engine, answer))
        store.set(f"{engine} {world.rank}", f"wrong: {answer}" if isinstance(answer, str) else "done")
        if len({store.get(f"{engine} {rank}") for rank in range(world.world_size)}) > 1:
            return


def norms_of(engine: str, task: Task, world: World, teachers: Sequence[Teacher], *batches: Batch) -> Norms | str:
    """Collective, but for the plain one. The gradient norms of the steps, or what went wrong."""
    try:
        step = OurStep(prepare(task, _way(engine), world), teachers, *batches)
        norms = []
        for _ in range(STEPS):
            step()
            assert step.last is not None
            norms.append(step.last.grad_norm)
        return norms
    except Exception as error:  # of any library; the other engines are tried all the same
        return message_of(error)


def by_engine(heard: Sequence[Heard]) -> Answers:
    """heard: of each rank. Its problem is held against the engine of which it says nothing; later ones count as not
    tried.
    """
    answers: dict[str, dict[int, Norms | str]] = {}
    all_said = [(dict(said), problem) for said, problem in heard]
    for engine in ENGINES:
        asked = all_said[:1] if engine == PLAIN else all_said
        of_ranks = {rank: said.get(engine, problem) for rank, (said, problem) in enumerate(asked)}
        if known := {rank: answer for rank, answer in of_ranks.items() if answer is not None}:
            answers[engine] = known
        if any(engine not in said for said, _ in asked):
            break
    return answers


def judge(found: Answers, ranks: int) -> Finding:
    """found: at least of the plain engine."""
    plain, wrong = found[PLAIN][0], {}
    for engine, of_ranks in found.items():
        problems = {rank: problem for rank, each in of_ranks.items() if (problem := _problem(each, plain)) is not None}
        if len(problems) == len(of_ranks) and len(set(problems.values())) == 1:
            wrong[engine] = f"{engine}: {next(iter(problems.values()))}"
        elif problems:
            wrong[engine] = ", ".join(f"{engine} on rank {rank}: {problem}" for rank, problem in problems.items())
    if wrong:
        works = [engine for engine in found if engine not in wrong and (engine != PLAIN or ranks == 1)]
        named = [f"--engine.name {each}" for each in works if not each.startswith("zero")]
        named += [f"--engine.ds_config {each}" for each in works if each.startswith("zero")]
        instead = f"; until then train with {' or '.join(named)}" if works else ""
        return failed("; ".join(wrong.values()), f"take the versions of docs/measurements/versions.md{instead}")
    assert not isinstance(plain, str)
    return ok(f"{', '.join(found)}: {STEPS} steps on {ranks} rank{'s' * (ranks > 1)}, gradient norms {_text(plain)}")


def _way(engine: str) -> Way:
    return Way(engine, "float32", compiled=False, teachers="live")


def _problem(answer: Norms | str, plain: Norms | str) -> str | None:
    if isinstance(answer, str):
        return answer
    if isinstance(plain, str) or _are_near(answer, plain):
        return None
    return f"gradient norms {_text(answer)}, of {PLAIN} {_text(plain)}"


def _are_near(norms: Norms, plain: Norms) -> bool:
    return all(abs(ours - theirs) <= ALLOWED * theirs for ours, theirs in zip(norms, plain, strict=True))  # NaN is not


def _text(norms: Sequence[float]) -> str:
    return " and ".join(f"{norm:.4g}" for norm in norms)
