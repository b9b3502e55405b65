"""What a ds_config may say, what is refused, and how it is said."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cit_scale.config import DS_CONFIGS, BatchSplit, EngineConfig, OptimConfig, RunConfig
from cit_scale.engines.ds_config import ANY, NOT_PASSED_ON, ShardingConfig, read_ds_config
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
        ({"fp16": {"enabled": True, "loss_scale": 128}}, ["fp16.enabled=true", "engine.precision"]),
        ({"fp16": True}, ["fp16=true, where DeepSpeed has a section"]),
        ({"optimizer": "AdamW"}, ['optimizer="AdamW", where DeepSpeed has a section']),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, ["warmup_num_steps=5: remove the section"]),
        ({"optimizer": {"type": "Lion"}}, ['optimizer.type="Lion"', 'says "AdamW"']),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["adam_w_mode=false", "remove it"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, ["params.lr=0.0003", "says 0.001", "optim.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, ['scheduler.type="WarmupLR"', "cosine", "optim.warmup_epochs"]),
        ({"zero_optimisation": {"stage": 2}}, ["unknown key 'zero_optimisation'; the nearest", "zero_optimization,"]),
        ({"zero_optimization": {"stge": 2}}, ["zero_optimization: unknown key 'stge'; the nearest", "stage,"]),
        ({"zero_optimization": {"leaf_module": {"clases": []}}}, ["leaf_module: unknown key 'clases'", "classes,"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4"]),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, ['zero_optimization.reduce_bucket_size="big"']),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["enabled=true, the recipe says false"]),
        ({"fp16.enabled": True}, ["mine.json: unknown key 'fp16.enabled'"]),
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
        ({"steps_per_print": "10"}, ['steps_per_print="10"', "valid number"]),
        ({"steps_per_print": 0}, ["steps_per_print=0", "greater than 0"]),
        ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown=1", "valid boolean"]),
        ({"prescale_gradients": True}, ["prescale_gradients=true would do nothing here: remove it"]),
        ({"wandb": {"enabled": True, "team": "us"}}, ["would do nothing here", "metrics.jsonl"]),
        ({"activation_checkpointing": {"partition_activations": True}}, ["set engine.activation_checkpointing"]),
        ({"communication_data_type": "fp16"}, ["gradients are reduced in float32"]),
        ({"gradient_cliping": 1.0}, ["unknown key 'gradient_cliping'; the nearest", "gradient_clipping"]),
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


@pytest.mark.parametrize("text", ['{"steps_per_print": 1, "steps_per_print": 2}', '{"a": {"stage": 1, "stage": 2}}'])
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read as JSON: the key '\w+' stands twice"):
        read_ds_config(run_config(tmp_path, str(tmp_path / "mine.json")), WHOLE)


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
        "torch_autocast": False,
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
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    same, other = dtypes.pop(precision), *dtypes.values()
    for enabled in (True, "auto"):
        (tmp_path / "mine.json").write_text(json.dumps({"torch_autocast": {"enabled": enabled, "dtype": same}}))
        read_ds_config(config, WHOLE)
        (tmp_path / "mine.json").write_text(json.dumps({"torch_autocast": {"enabled": enabled, "dtype": other}}))
        with pytest.raises(ConfigError, match=rf'torch_autocast\.dtype="{other}", the recipe says "{same}"'):
            read_ds_config(config, WHOLE)


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


# As in public repositories: of a trainer that fills in "auto", of a tutorial, of a research project.
FOREIGN = {
    "auto": {
        "fp16": {
            "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "offload_param": {"device": "none", "pin_memory": True},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
    "tutorial": {
        "train_batch_size": 16, "steps_per_print": 2000,
        "optimizer": {
            "type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
        },
        "gradient_clipping": 1.0, "prescale_gradients": False, "bf16": {"enabled": False},
        "fp16": {
            "enabled": False, "fp16_master_weights_and_grads": False, "loss_scale": 0, "loss_scale_window": 500,
            "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15,
        },
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": 0, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000, "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False,
        },
    },
    "research": {
        "train_micro_batch_size_per_gpu": 256, "gradient_accumulation_steps": 2, "gradient_clipping": 15.0,
        "zero_allow_untested_optimizer": True, "communication_data_type": "fp32", "prescale_gradients": False,
        "zero_optimization": {
            "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 2e8, "overlap_comm": True,
            "reduce_scatter": True, "reduce_bucket_size": 2e8, "round_robin_gradients": True,
        },
        "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
        "data_types": {"grad_accum_dtype": "fp32"}, "dump_state": False, "memory_breakdown": False,
        "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True},
        "tensorboard": {"enabled": False}, "wandb": {"enabled": False}, "csv_monitor": {"enabled": False},
        "comms_logger": {"enabled": False, "verbose": False}, "autotuning": {"enabled": False},
        "elasticity": {"enabled": False, "max_train_batch_size": 2000}, "sparse_gradients": False,
        "hybrid_engine": {"enabled": False}, "curriculum_learning": {"enabled": False}, "amp": {"enabled": False},
    },
}  # fmt: skip


def test_a_file_of_a_trainer_that_fills_in_auto_is_accepted(tmp_path):
    checked = read_ds_config(run_config(tmp_path, FOREIGN["auto"]), ON_TWO_RANKS)
    assert checked["zero_optimization"]["stage"] == 3
    assert checked["train_batch_size"] == 1024
    assert not {"fp16", "bf16", "optimizer"} & checked.keys()


def test_a_tutorials_file_is_refused_once_with_all_that_the_recipe_says_otherwise(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_ds_config(run_config(tmp_path, FOREIGN["tutorial"]), ON_TWO_RANKS)
    said = str(error.value)
    assert "\n" not in said
    assert [complaint.split("=")[0] for complaint in re.split(r"\(\d\) ", said)[1:]] == [
        "train_batch_size", "optimizer.params.betas", "optimizer.params.weight_decay", "scheduler.type",
        "gradient_clipping",
    ]  # fmt: skip
    mended = json.loads(json.dumps(FOREIGN["tutorial"]))
    for key in ("train_batch_size", "scheduler", "gradient_clipping"):
        del mended[key]
    for key in ("betas", "weight_decay"):
        del mended["optimizer"]["params"][key]
    read_ds_config(run_config(tmp_path, mended), ON_TWO_RANKS)


def test_a_research_projects_file_is_accepted(tmp_path):
    checked = read_ds_config(run_config(tmp_path, FOREIGN["research"]), ON_TWO_RANKS)
    assert checked["zero_optimization"]["stage"] == 2
    assert checked.keys() == read_ds_config(run_config(tmp_path, "zero2"), ON_TWO_RANKS).keys() | {
        "flops_profiler", "comms_logger",
    }  # fmt: skip


@pytest.mark.parametrize(("given", "passed_on"), [("1e5", 100000), ("Infinity", None), ("10", 10), ("null", None)])
def test_steps_per_print_is_any_number(given, passed_on, tmp_path):
    (tmp_path / "mine.json").write_text('\ufeff{"steps_per_print": ' + given + "}")
    checked = read_ds_config(run_config(tmp_path, str(tmp_path / "mine.json")), WHOLE)
    assert checked.get("steps_per_print") == passed_on
    assert not isinstance(checked.get("steps_per_print"), float)


def test_the_loss_scale_of_fp16_is_ours_and_says_so(tmp_path):
    ours = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1, "min_loss_scale": 1}
    for enabled in (True, "auto"):
        config = run_config(tmp_path, {"fp16": {"enabled": enabled, **ours}})
        fp16 = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="fp16"))
        read_ds_config(fp16, WHOLE)
        config = run_config(tmp_path, {"fp16": {"enabled": enabled, **ours, "loss_scale": 128, "hysteresis": 2}})
        fp16 = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="fp16"))
        with pytest.raises(ConfigError, match=r"\(1\) fp16\.loss_scale=128.* \(2\) fp16\.hysteresis=2"):
            read_ds_config(fp16, WHOLE)


def test_all_complaints_are_made_at_once(tmp_path):
    wrong = {
        "gradient_clipping": 1.0,
        "wandb": {"enabled": True},
        "zero_optimization": {"stage": 9, "stge": 1, "reduce_bucket_size": "big"},
        "steps_per_print": "x",
        "nosuch": 1,
    }
    with pytest.raises(ConfigError) as error:
        read_ds_config(run_config(tmp_path, wrong), ON_TWO_RANKS)
    for key in ("gradient_clipping", "wandb", "stage=9", "'stge'", '"big"', "steps_per_print", "'nosuch'", "(7) "):
        assert key in str(error.value)


def test_complaints_of_a_type_hide_no_others(tmp_path):
    wrong = {
        "zero_optimization": {
            "stage": 3, "stge": 1, "zero_hpz_partition_size": 2, "offload_param": {"device": "nvme", "pin": 1},
        },
        "steps_per_print": "x",
    }  # fmt: skip
    config = run_config(tmp_path, wrong)
    with pytest.raises(ConfigError) as error:
        read_ds_config(dataclasses.replace(config, engine=dataclasses.replace(config.engine, compile=True)), WHOLE)
    for said in ("'stge'", "hpz_partition_size is", "device=nvme", "'pin'", "steps_per_print", "compile is", "(6) "):
        assert said in str(error.value)
    assert "(7)" not in str(error.value)


def test_a_stage_that_cannot_be_read_makes_no_complaint_of_its_own(tmp_path):
    wrong = {"zero_optimization": {"stage": "two", "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r'json: zero_optimization\.stage="two"') as error:
        read_ds_config(run_config(tmp_path, wrong), WHOLE)
    assert "offload" not in str(error.value)


@pytest.mark.parametrize("key", NOT_PASSED_ON)
def test_a_key_of_deepspeeds_that_is_off_is_accepted(key, tmp_path):
    for value in (None, "auto", False, {}, {"enabled": False, "more": 1}):
        checked = read_ds_config(run_config(tmp_path, {key: value}), WHOLE)
        assert key not in checked or key in ("zero_force_ds_cpu_optimizer", "timers")


@pytest.mark.parametrize("key", [key for key, (neutral, _) in NOT_PASSED_ON.items() if neutral is not ANY])
def test_a_key_of_deepspeeds_that_asks_for_something_is_refused(key, tmp_path):
    for value in ({"enabled": True}, "asks", 7):
        with pytest.raises(ConfigError, match=f"{key}=.*would do nothing here: remove it"):
            read_ds_config(run_config(tmp_path, {key: value}), WHOLE)


@pytest.mark.parametrize(
    "section",
    [
        {"activation_checkpointing": {
            "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
            "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
        }},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False}},
        {"bfloat16": {"enabled": False}},
        {"checkpoint": {"tag_validation": "Warn", "use_node_local_storage": False}},
        {"comet": {"project": "vit"}},
        {"communication_data_type": "fp32"},
        {"compile": {"deepcompile": False}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"csv_monitor": {"output_path": "out", "job_name": "vit"}},
        {"dataloader_drop_last": True},
        {"gradient_predivide_factor": 1.0},
        {"monitor_config": {"tensorboard": {"enabled": False}}},
        {"pipeline": {"stages": "auto", "partition": "best", "seed_layers": False}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"tensor_parallel": {"tp_size": 1}},
        {"tensorboard": {"output_path": "out"}},
        {"timers": {"throughput": {"enabled": True, "synchronized": True}}},
        {"vocabulary_size": 50304},
        {"flops_profiler": {"enabled": False, "profile_step": "auto"}},
        {"flops_profiler": None, "comms_logger": False, "zero_optimization": None, "wall_clock_breakdown": None},
        {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
        {"wandb": False},
        {"zero_allow_untested_optimizer": True},
    ],
)  # fmt: skip
def test_what_has_no_effect_in_deepspeed_either_is_accepted(section, tmp_path):
    checked = read_ds_config(run_config(tmp_path, section), WHOLE)
    nothing = read_ds_config(run_config(tmp_path, {}), WHOLE)
    assert {**checked, "flops_profiler": None} == {**nothing, "flops_profiler": None}
    assert checked.get("flops_profiler", {}) in ({}, {"enabled": False})


def test_every_key_that_deepspeed_reads_is_known(tmp_path, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig  # here: ours sets what DeepSpeed reads as it is imported

    asked = set()

    class Recorded(dict):
        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def keys(self):
            return self

    DeepSpeedConfig(Recorded(train_batch_size=1))
    assert len(asked) > 50
    with pytest.raises(ConfigError) as error:
        read_ds_config(run_config(tmp_path, dict.fromkeys(asked, "nosuch")), WHOLE)
    assert "unknown key" not in str(error.value)
    # One is of versions before this one, one is asked for only after ranks have joined.
    assert asked >= NOT_PASSED_ON.keys() - {"monitor_config", "sequence_parallel_size"}
    assert asked >= ShardingConfig.model_fields.keys()


def test_deepspeeds_adam_is_adamw_unless_it_says_otherwise():
    from deepspeed.runtime.config import ADAM_W_MODE_DEFAULT  # here: ours sets what DeepSpeed reads as it is imported

    assert ADAM_W_MODE_DEFAULT is True
