"""Each mistake in a config gives one message that names the field; every field is documented."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_iwsft.config.describe import fields, section_of
from megatron_iwsft.config.loader import load_config, parse_config
from megatron_iwsft.config.other_names import OURS
from megatron_iwsft.config.schema import Config
from megatron_iwsft.config.section import Section
from megatron_iwsft.errors import ConfigError
from megatron_iwsft.objectives.functions import OBJECTIVES
from tests.support import ROOT

MINIMAL = "run: {name: r, dir: runs/r}\nmodel: {hf: /models/m}\ndata: {corpus: c, seq_length: 64, epochs: 1}\n"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TRAINING = [
    path for path in CONFIGS if not path.name.startswith("control-")
]  # control configs have their own schema and tests


def parse(*overrides: str, text: str = MINIMAL) -> Config:
    return parse_config(text, list(overrides), where="c.yaml")


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


def test_an_unknown_objective_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError,
        match=r"objective.name: must be one of sft, iw_sft, dft, psft or .* \(nearest: iw_sft\); found 'iwsft'",
    ):
        parse("objective.name=iwsft")


def test_override_values_are_yaml_and_missing_sections_are_created() -> None:
    config = parse(
        "optimizer.lr=3e-5", "data.quality.mode=thresholds", "data.quality.thresholds=[1, 2.5]", "objective.clip=[0, 3]"
    )
    assert config.optimizer.lr == 3e-5
    assert config.data.quality.thresholds == [1, 2.5]
    assert config.objective.clip == [0, 3]


def test_the_resolved_config_can_be_read_again() -> None:
    config = parse("optimizer.lr=1e-5")
    assert parse(text=config.to_yaml()) == config


SETS = "evaluation.sets=[{name: test, corpus: c}]"
MISTAKES = [
    (["data.seq_lenght=3"], "data.seq_lenght is not a known key. Did you mean seq_length?"),
    (["data.num_train_epochs=3"], "data.num_train_epochs is not a known key. Did you mean data.epochs?"),
    (["save_steps=3"], "save_steps is not a known key. Did you mean checkpoint.every?"),
    (["train.lr=3"], "train is not a known key. Known keys: run, model, data"),
    (["data.seq_length=long"], "data.seq_length: input should be a valid integer; found 'long'"),
    (["data.seq_length=2.5"], "data.seq_length: input should be a valid integer"),
    (["parallel.sequence=1"], "parallel.sequence: input should be a valid boolean; found 1"),
    (["parallel.tensor=0"], "parallel.tensor: input should be greater than 0; found 0"),
    (["objective.level=word"], "objective.level: input should be 'sequence', 'trajectory' or 'token'; found 'word'"),
    (["objective.clip=[3, 1]"], "clip must be [low, high] with 0 ≤ low < high; found [3.0, 1.0]"),
    (["optimizer.betas=[0.9]"], "optimizer.betas: list should have at least 2 items"),
    (["optimizer.lr=-1"], "optimizer.lr: input should be greater than or equal to 0; found -1"),
    (["optimizer.min_lr=1"], "min_lr 1 is above lr 1e-05"),
    (["data.epochs=null"], "data: needs epochs or max_steps: the run would have no end"),
    (["data.quality.mode=thresholds"], "mode thresholds needs a list of thresholds; other modes take none"),
    (
        ["data.quality.mode=thresholds", "data.quality.thresholds=['50']"],
        "a threshold must be a number, or a percentile from 0% to 100%; found '50'",
    ),
    (
        ["logging.wandb=null"],
        "logging.wandb must be a mapping with keys mode, project, entity, group, tags, notes, artifacts; found None",
    ),
    (["model.checkpoint=x"], "needs exactly one of hf, checkpoint and config; found hf, checkpoint"),
    (["model.hf=null"], "needs exactly one of hf, checkpoint and config; found none"),
    (["parallel.virtual_pipeline=2"], "virtual_pipeline 2 needs pipeline ≥ 2; it is 1"),
    (["parallel.virtual_pipeline=1"], "virtual_pipeline is 1; use null"),
    (["parallel.layers_per_stage=[2]"], "layers_per_stage needs pipeline ≥ 2; it is 1"),
    (
        ["optimizer.overlap_param_gather=true"],
        "overlap_param_gather needs distributed: true and overlap_grad_reduce: true",
    ),
    (["precision.fp8_amax_history_len=16"], "need fp8 delayed, which scales by history; it is null"),
    (
        ["precision={fp8: delayed, fp8_parameters: true}"],
        "fp8_parameters does not go with fp8 delayed: weights would be",
    ),
    (
        ["precision={fp8: mxfp8, fp8_parameters: true}"],
        "fp8_parameters does not go with fp8 mxfp8: Transformer Engine cannot",
    ),
    (["parallel.recompute_layers=2"], "recompute_layers needs recompute: full; it is none"),
    (["parallel.overlap_tensor=true"], "overlap_tensor needs sequence: true and context: 1"),
    (
        ["parallel.overlap_tensor=true", "parallel.tensor=2", "parallel.sequence=true", "data.packing=none"],
        "parallel.overlap_tensor needs data.packing: best_fit",
    ),
    (
        ["parallel={tensor: 4, sequence: true, overlap_tensor: true}", "precision.fp8=blockwise"],
        "parallel.overlap_tensor does not go with precision.fp8 blockwise, which Transformer Engine's userbuffers do not support",
    ),
    (
        ["reference={source: live, offload: true}", "precision.fp8=tensorwise"],
        "reference.offload does not go with precision.fp8 tensorwise: Transformer Engine keeps the FP8 copies",
    ),
    (["parallel.recompute=[]"], "recompute is an empty list; use none"),
    (
        ["megatron.moe_permute_fusions=true"],
        "megatron.moe_permute_fusions is not a known key. Did you mean moe_permute_fusion?",
    ),
    (
        ["megatron.cuda_graph_impl=local"],
        "cuda_graph_impl cannot be set here: rows have other segments in every micro-batch",
    ),
    (["megatron.tp_only_amax_red=true"], "would depend on the parallel layout. Remove it"),
    (["megatron.moe_aux_loss_coeff=0.01"], "use objective.router_balance instead"),
    (["megatron.recompute_modules=[mlp]"], "use parallel.recompute instead"),
    (["evaluation.every=5"], "every is 5, but there is nothing to evaluate: add sets, or leave out every"),
    (["evaluation.sets=[{name: a, corpus: c}, {name: a, corpus: d}]"], "evaluation: sets: two have the name a"),
    (["evaluation.sets=[{name: a/b, corpus: c}]"], "evaluation.sets.0.name: string should match pattern"),
    (
        ["checkpoint.best.metric=eval/a/nll"],
        "c.yaml: checkpoint.best: metric eval/a/nll needs evaluation.sets or benchmarks in process, and there are none.",
    ),
    (
        [SETS, "checkpoint.best.metric=eval/tset/nll"],
        "checkpoint.best: metric eval/tset/nll is none that this run evaluates. Did you mean eval/test/nll?",
    ),
    (
        [SETS, "objective.name=sft", "checkpoint.best.metric=eval/test/weight_ess"],
        "metric eval/test/weight_ess is none that this run evaluates",
    ),
    ([SETS, "run.stop_early={metric: eval/test/weight_ess, patience: 2}"], "weight_ess needs mode: min or mode: max"),
    ([SETS, "run.stop_early={metric: eval/test/nll}"], "run.stop_early.patience is missing; it has no default"),
    ([SETS, "run.stop_early={patience: 3}"], "run.stop_early.metric is missing; it has no default"),
    ([SETS, "run.stop_early={metric: nll, patience: 3, min: 1}"], "run.stop_early.min is not a known key"),
    (["evaluation.answers.every=5"], "evaluation.answers: there is nothing to answer: add benchmarks or prompts"),
    (["evaluation.answers={prompts: p, samples: 4}"], "samples 4 do not go with temperature 0"),
    (["evaluation.answers.benchmarks=[a/x.jsonl, b/x.jsonl]"], "benchmarks: two have the same file name"),
    ([SETS, "evaluation.answers.benchmarks=[test.jsonl]"], "evaluation: a set and a benchmark have the name test"),
    (
        [
            "evaluation.answers={benchmarks: [b.jsonl], where: slurm}",
            "run.stop_early={metric: eval/b/pass@1, patience: 2}",
        ],
        "eval/b/pass@1 needs evaluation.sets or benchmarks in process, and there are none",
    ),
    (["evaluation.answers.prompts=p", "adapter.rank=4"], "evaluation.answers needs all weights of the policy"),
    (["evaluation.sets=[{corpus: c}]"], "evaluation.sets.0.name is missing; it has no default"),
    (["parallel.sequence=true"], "sequence: true needs tensor ≥ 2; it is 1"),
    (
        ["run=5"],
        "run must be a mapping with keys name, dir, seed, device, bind_device, hang_timeout_s, max_bad_steps, spike, stop_early, "
        "profile; found 5",
    ),
    (["nonsense"], "override 'nonsense' is not of the form section.key=value"),
    (["run.name.first=x"], "override 'run.name.first=x': name is a value, not a section"),
    (["run.name=[a"], "override 'run.name=[a', line 1 is not valid YAML"),
]


def test_the_s1k_configs_have_the_authors_settings() -> None:
    """And differ from each other in nothing but what their names say."""
    iw, batch16, sft = (
        load_config(ROOT / "configs" / f"qwen2.5-32b-s1k-{name}.yaml") for name in ("iwsft", "iwsft-batch16", "sft")
    )
    objective, optimizer, data = iw.objective, iw.optimizer, iw.data
    assert (objective.name, objective.level, objective.temperature) == ("iw_sft", "sequence", 1.0)
    assert objective.clip is None and OBJECTIVES["iw_sft"].clip_at("sequence") == (0, 16)
    assert (objective.normalize, objective.proposal.kind) == ("sequences", "current")
    assert (data.micro_batch_size, data.global_batch_size, data.epochs, data.packing) == (1, 8, 5, "none")
    assert (optimizer.lr, optimizer.min_lr, optimizer.schedule, optimizer.warmup_fraction) == (
        1e-5,
        0.0,
        "cosine",
        0.05,
    )
    assert (optimizer.betas, optimizer.weight_decay) == ([0.9, 0.95], 1e-4)
    assert data.seq_length >= 22_000  # what their block_size keeps of a trace
    assert batch16.data.global_batch_size == 16 and sft.objective.name == "sft"
    assert batch16.objective == iw.objective and batch16.optimizer == sft.optimizer == iw.optimizer
    assert sft.data == iw.data and sft.objective.normalize == iw.objective.normalize


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[m[0][-1] for m in MISTAKES])
def test_a_mistake_names_the_field(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*overrides)
    assert message in str(error.value)
    assert ": :" not in str(error.value) and not str(error.value).endswith(("..", "?."))


def test_other_programs_names_lead_to_fields_that_exist() -> None:
    known = {key for key, _ in fields(Config)}
    known |= {key.rpartition(".")[0] for key in known}  # sections
    assert set(OURS.values()) <= known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: r}\n", "run.dir is missing; it has no default"),
        ("- a\n", "c.yaml must be a mapping with sections (run, model, data, …); found list"),
        ("run: {name: r\n", "line 2 is not valid YAML"),
        (MINIMAL + "run: {name: again, dir: d}\n", "duplicate key 'run', again in line 4"),
        ("[" * 100_000, "c.yaml is nested too deeply"),
        ("run: {name: 2026-13-45, dir: d}\n", "has a value that cannot be read: month must be in 1..12"),
        (f"run: {{name: r, dir: 1{'0' * 5000}}}\n", "has a value that cannot be read"),
        (f"run: {{name: r, dir: 0x1{'0' * 5000}}}\n", "has a number of 20,001 bits"),
        ("run: &run {name: r, dir: d, again: *run}\n", "has more than 100,000 values, with aliases (*name) followed"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)),
            "has more than 100,000 values, with aliases (*name) followed",
        ),
        pytest.param(
            "".join(f"k{i}: 1\n" for i in range(100_001)), "has more than 100,000 values", marks=pytest.mark.slow
        ),
    ],
)
def test_a_malformed_file_is_reported(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text=text)
    assert message in str(error.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_pipe_in_place_of_a_config_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"cannot read config file .*: it is a FIFO, not a file"):
        load_config(tmp_path / "pipe.yaml")


def test_degrees_and_batch_sizes_must_divide() -> None:
    with pytest.raises(ConfigError, match="tensor 2 × pipeline 2 × context 1 = 4 does not divide the world size of 6"):
        parse("parallel.tensor=2", "parallel.pipeline=2").layout(6)
    with pytest.raises(
        ConfigError, match=r"global_batch_size 6 is not a multiple of micro_batch_size 2 × data parallel 2 = 4"
    ):
        parse("data.global_batch_size=6", "data.micro_batch_size=2").layout(2)
    assert parse("parallel.tensor=2", "data.global_batch_size=4").layout(4).data == 2


def sections(schema: type[Section]) -> list[type[Section]]:
    inner = [section_of(field) for field in schema.model_fields.values()]
    return [schema, *(s for section in inner if section is not None for s in sections(section))]


@pytest.mark.parametrize("section", sections(Config), ids=lambda s: s.__name__)
def test_every_field_has_a_docstring(section: type[Section]) -> None:
    assert section.__doc__ and "\n" not in section.__doc__
    for name, field in section.model_fields.items():
        inner = section_of(field)  # a section's docstring is that of its class
        text = (inner.__doc__ if inner else field.description) or ""
        assert text.endswith((".", "…")), f"{section.__name__}.{name}: {text!r}"
        assert all(len(line) <= 136 for line in text.splitlines())


@pytest.mark.parametrize(
    ("overrides", "gain", "expected"),
    [
        ([], True, (True, True)),
        ([], False, (False, False)),
        (["optimizer.distributed=false"], True, (True, False)),
        (["optimizer.overlap_grad_reduce=false"], True, (False, False)),
        (["optimizer.overlap_param_gather=false"], True, (True, False)),
        (["optimizer.overlap_grad_reduce=true"], False, (True, False)),
        (["optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"], False, (True, True)),
    ],
)
def test_communication_overlaps_where_it_is_allowed_and_gains_something(
    overrides: list[str], gain: bool, expected: tuple[bool, bool]
) -> None:
    settings = parse(*overrides).optimizer.resolved(overlap=gain)
    assert (settings.overlap_grad_reduce, settings.overlap_param_gather) == expected
