import sys

from cit_scale.bench import checkpoint
from cit_scale.bench.checkpoint import PEER_OF, STALL, measure
from cit_scale.engines.base import Engine


def test_every_way_is_timed_in_every_round_but_the_first(tmp_path):
    times, size = measure(tiny_engine(), tmp_path, rounds=2)
    assert {way: len(taken) for way, taken in times.items()} == dict.fromkeys(times, 2)
    assert all(second > 0 for taken in times.values() for second in taken)
    assert size > 4 * 24 * 24


def test_the_table_names_each_way_and_the_machine(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checkpoint, "build_engine", lambda model: tiny_engine())
    monkeypatch.setattr(sys, "argv", ["checkpoint", "--rounds", "1", "--folder", str(tmp_path)])
    checkpoint.main()
    shown = capsys.readouterr().out
    assert "commit " in shown
    for way in (STALL, *PEER_OF.values()):
        assert f"| {way} |" in shown
    assert list(tmp_path.iterdir()) == []


def tiny_engine() -> Engine:
    from engine_cases import tiny_cit

    from cit_scale.config import EngineConfig, OptimConfig, RunConfig
    from cit_scale.distributed.world import World
    from cit_scale.engines.build import build_engine, prepare_engine

    config = RunConfig(optim=OptimConfig(ema_decay=0.9), engine=EngineConfig(name="plain"))
    return build_engine(tiny_cit(), prepare_engine(config, World()))
