"""What a ds_config may say, what is refused, and how it is said."""

import dataclasses
import json
from pathlib import Path

import pytest

from cit_scale.config import DS_CONFIGS, BatchSplit, EngineConfig, OptimConfig, RunConfig
from cit_scale.engines.ds_config import read_ds_config
from cit_scale.errors import ConfigError

# The default global batch of 1024.
WHOLE = BatchSplit(micro_batch_size=1024, micro_steps=1)
ON_TWO_RANKS = BatchSplit(micro_batch_size=256, micro_steps=2)


def run_config(tmp_path: Path, ds_config: dict | str) -> RunConfig:
    if isinstance(ds_config, dict):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(ds_config))
        ds_config = str(path)
    return RunConfig(engine=EngineConfig(ds_config=ds_config), optim=OptimConfig(clip_norm=15.0, lr=1e-3))


@pytest.mark.parametrize(
    ("ds_config", "complaints"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "recipe says 15.0", "optim.clip_norm"]),
        ({"train_batch_size": 512}, ["train_batch_size=512", "says 1024", "train.global_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 32}, ["=32", "says 256", "train.micro_batch_size"]),
        ({"gradient_accumulation_steps": 8}, ["=8", "says 2", "train.micro_batch_size"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "says false", "engine.precision"]),
        ({"fp16": {"enabled": "auto", "loss_scale": 0}}, ["fp16.loss_scale=0", "remove it"]),
        ({"optimizer": {"type": "Adam"}}, ['optimizer.type="Adam"', 'says "AdamW"']),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, ["params.lr=0.0003", "says 0.001", "optim.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, ['scheduler.type="WarmupLR"', "cosine", "optim.warmup_epochs"]),
        ({"zero_optimisation": {"stage": 2}}, ["unknown key 'zero_optimisation'; the nearest", "zero_optimization,"]),
        ({"zero_optimization": {"stge": 2}}, ["zero_optimization: unknown key 'stge'; the nearest", "stage,"]),
        ({"zero_optimization": {"leaf_module": {"clases": []}}}, ["leaf_module: unknown key 'clases'", "classes,"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4"]),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, ['zero_optimization.reduce_bucket_size="big"']),
        ({"zero_optimization": 1}, ["zero_optimization=1: Input should be a valid dictionary"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm=false", "says true"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin": 1}}}, ["'pin'", "pin_memory,"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage 0; it is at 2"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage 2; it is at 3"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["device=nvme", "cpu and none"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, ['offload_param.device="gpu"']),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ["offload_optimizer.ratio is not supported"],
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, ["zenflow is not supported"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["hpz_partition_size is not supported"]),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, ["offload_optimizer is not supported at stage 1"]),
        ({"comms_logger": {"enabeld": True}}, ["comms_logger: unknown key 'enabeld'; the nearest", "enabled,"]),
        ({"flops_profiler": {"profile_stp": 1}}, ["flops_profiler: unknown key 'profile_stp'", "profile_step,"]),
        ({"flops_profiler": {"profile_step": "first"}}, ['flops_profiler.profile_step="first"']),
        ({"steps_per_print": "10"}, ['steps_per_print="10"', "valid integer"]),
        ({"steps_per_print": 0}, ["steps_per_print=0", "greater than 0"]),
        ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown=1", "valid boolean"]),
        ({"prescale_gradients": True}, ["unknown key 'prescale_gradients'; the nearest"]),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none", "ratio": 0.5}}},
            ["mine.json: zero_optimization: Assertion failed, Partial offloading only supported for ZeRO Stage 3"],
        ),
        ("zero7", ["engine.ds_config=zero7", "zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"]),
    ],
)  # fmt: skip
def test_a_ds_config_that_contradicts_the_recipe_or_is_misspelt_is_refused_in_one_line(ds_config, complaints, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_ds_config(run_config(tmp_path, ds_config), ON_TWO_RANKS)
    assert "\n" not in str(error.value)
    for complaint in complaints:
        assert complaint in str(error.value)


def test_a_ds_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text("{'stage': 1}")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_ds_config(run_config(tmp_path, str(tmp_path / "mine.json")), WHOLE)


def test_a_ds_config_may_repeat_the_recipe_or_say_auto(tmp_path):
    repeated = {
        "train_batch_size": 1024,
        "train_micro_batch_size_per_gpu": 256,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 15,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "weight_decay": 0.05}},
        "scheduler": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "steps_per_print": 10,
    }
    alone = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "steps_per_print": 10}
    both = [read_ds_config(run_config(tmp_path, config), ON_TWO_RANKS) for config in (repeated, alone)]
    assert both[0] == both[1]
    assert both[0]["train_batch_size"] == 1024
    assert both[0]["gradient_clipping"] == 15.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_in_a_ds_config_is_the_recipes(precision, tmp_path):
    config = run_config(tmp_path, {precision: {"enabled": True}, "torch_autocast": {"enabled": True}})
    with pytest.raises(ConfigError, match=rf"{precision}\.enabled=true, the recipe says false"):
        read_ds_config(config, WHOLE)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    assert not {precision, "torch_autocast"} & read_ds_config(config, WHOLE).keys()


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_shipped_files_say_how_to_shard_and_nothing_else(name, tmp_path):
    shipped = json.loads((DS_CONFIGS / f"{name}.json").read_text())
    assert shipped.keys() == {"zero_optimization"}
    sections = {"offload_optimizer", "offload_param"} if name == "zero3_offload" else {"offload_optimizer"}
    offloaded = {key for key, value in shipped["zero_optimization"].items() if value == {"device": "cpu"}}
    assert offloaded == (sections if name.endswith("_offload") else set())
    checked = read_ds_config(run_config(tmp_path, name), WHOLE)["zero_optimization"]
    assert {**shipped["zero_optimization"], "memory_efficient_linear": False} == checked
    assert checked["stage"] == int(name[4])


def test_compiling_under_zero3_is_refused():
    config = RunConfig(engine=EngineConfig(ds_config="zero3", compile=True))
    with pytest.raises(ConfigError, match="take stage 0, 1 or 2"):
        read_ds_config(config, WHOLE)
