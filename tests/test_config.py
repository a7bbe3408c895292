"""Proves that files and flags follow one set of rules, that every mistake is named in plain words
and all of them at once, that a dumped config loads back equal, and that all of it is cheap."""

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sae.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ReluL1Config,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    dump,
    flags,
    grid_keys,
    load,
    points,
    resolve,
    run_name,
)
from sae.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def mistakes(path: Path | None, overrides: Mapping[str, object] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(path, overrides or {})
    return str(caught.value).splitlines()


BELOW_OPTIM = (
    "lr, batch, betas, lr_warmup, lr_decay, dead_after, pool, grad_clip, llm_batch, max_norm"
)
_FLAGS = {flag.name: flag for flag in flags()}
KINDS = _FLAGS["sae.sparsity.kind"].type.replace("|", ", ")
BELOW = ", ".join(name.split(".")[2] for name in _FLAGS if "sparsity." in name)

MISTAKES = [
    ("optim: {lr: -1}", "optim.lr: -1 came, wanted a number above 0"),
    ("optim: {lr: .nan}", "optim.lr: NaN came, wanted a number above 0"),
    ("optim: {lr: .inf}", "optim.lr: Infinity came, wanted a number above 0"),
    ("optim: {lr: fast}", 'optim.lr: "fast" came, wanted a number above 0'),
    ("optim: {lr: true}", "optim.lr: true came, wanted a number above 0"),
    ("optim: {grad_clip: 0}", "optim.grad_clip: 0 came, wanted a number above 0, or null"),
    (
        "optim: {betas: [0.9, 1]}",
        "optim.betas: [0.9, 1] came, wanted two numbers, each from 0 to below 1",
    ),
    (
        "optim: {betas: [2, x]}",
        'optim.betas: [2, "x"] came, wanted two numbers, each from 0 to below 1',
    ),
    (
        "optim: {betas: [0.9]}",
        "optim.betas: [0.9] came, wanted two numbers, each from 0 to below 1",
    ),
    ("optim: {lr_decay: 1.5}", "optim.lr_decay: 1.5 came, wanted a share from 0 to 1"),
    ("optim: 3", f"optim: 3 came, wanted settings below it: {BELOW_OPTIM}"),
    ("optim: {lrr: 3}", "optim.lrr: unknown setting; did you mean 'optim.lr'?"),
    ("optim: {zzz: 3}", f"optim.zzz: unknown setting; optim has {BELOW_OPTIM}"),
    ("lr: 3", "lr: unknown setting; did you mean 'finetune.lr' or 'optim.lr'?"),
    ("name: x", "name: unknown setting; did you mean 'data.name' or 'model.name'?"),
    ("expansion: 3", "expansion: unknown setting; did you mean 'sae.expansion_factor'?"),
    ("optim.lr: 3", "optim.lr: unknown setting; in a file write `lr:` indented below `optim:`"),
    ("tokens: 0", "tokens: 0 came, wanted a whole number of at least 1"),
    ("tokens: 1e6.5", 'tokens: "1e6.5" came, wanted a whole number of at least 1'),
    ("tokens: 5000.5", "tokens: 5000.5 came, wanted a whole number of at least 1"),
    ("seed: -1", "seed: -1 came, wanted a whole number from 0 to 4294967295"),
    ("seed: true", "seed: true came, wanted a whole number from 0 to 4294967295"),
    ("device: gpu", 'device: "gpu" came, wanted auto, cpu, cuda or cuda:N'),
    (
        "model: {dtype: bf16}",
        'model.dtype: "bf16" came, wanted one of auto, float32, bfloat16; '
        "did you mean 'bfloat16'?",
    ),
    (
        "model: {revision: 1234567}",
        "model.revision: 1234567 came, wanted text, in quotes where it looks like a number, "
        "or null",
    ),
    ("data: {streaming: 2}", "data.streaming: 2 came, wanted true or false"),
    ("data: {heldout: 1}", "data.heldout: 1 came, wanted a number from 0 to below 1"),
    (
        "hookpoints: []",
        "hookpoints: [] came, wanted at least one, or inputs (none) of a map; change either",
    ),
    (
        "inputs: [a, a]\ntargets: b",
        'inputs: ["a", "a"] came, wanted a list of hookpoints, at least one and each once',
    ),
    (
        "inputs: a",
        'inputs: ["a"] came, wanted targets (none) beside them; change either',
    ),
    (
        "targets: a",
        'targets: ["a"] came, wanted inputs (none) beside them; change either',
    ),
    (
        "{hookpoints: a, inputs: b, targets: [c, d]}",
        'hookpoints: ["a"] came, wanted none beside a map\'s targets (c, d); change either',
    ),
    (
        "hookpoints: [a, a]",
        'hookpoints: ["a", "a"] came, wanted a list of hookpoints, at least one and each once',
    ),
    (
        "sae: {expansion_factor: 0}",
        "sae.expansion_factor: 0 came, wanted a whole number of at least 1",
    ),
    ("sae: {d_sae: 0}", "sae.d_sae: 0 came, wanted a whole number of at least 1, or null"),
    ("sae: {sparsity: {l1: -1}}", "sae.sparsity.l1: -1 came, wanted a number of at least 0"),
    (
        "sae: {prefixes: [0.5, 0.5, 1]}",
        "sae.prefixes: [0.5, 0.5, 1] came, wanted shares above 0 that rise to 1, the last of them",
    ),
    (
        "sae: {sparsity: {kind: topkk}}",
        f"sae.sparsity.kind: \"topkk\" came, wanted one of {KINDS}; did you mean 'topk'?",
    ),
    (
        "sae: {sparsity: {kind: [1]}}",
        f"sae.sparsity.kind: [1] came, wanted one of {KINDS}",
    ),
    (
        "sae: {sparsity: {k: 3}}",
        "sae.sparsity.k: unknown setting; it belongs to sae.sparsity.kind: topk or batchtopk",
    ),
    (
        "sae: {sparsity: topk}",
        f'sae.sparsity: "topk" came, wanted settings below it: {BELOW}',
    ),
    (
        "sae: {d_sae: 4, sparsity: {kind: topk, k: 8}}",
        "sae.sparsity.k: 8 came, wanted at most sae.d_sae (4); change either",
    ),
    (
        "sae: {d_sae: 4, sparsity: {target_l0: 8}}",
        "sae.sparsity.target_l0: 8.0 came, wanted at most sae.d_sae (4); change either",
    ),
    (
        "sae: {sparsity: {p_ramp: [0, 0.5]}}",
        "sae.sparsity.p_ramp: [0.0, 0.5] came, but sae.sparsity.p_end (1.0) moves nothing; change "
        "either",
    ),
    (
        "sae: {sparsity: {kind: topk, k_ramp: [0, 0.5]}}",
        "sae.sparsity.k_ramp: [0.0, 0.5] came, but sae.sparsity.k_start (null) moves nothing; "
        "change either",
    ),
    (
        "optim: {batch: 200000}",
        "optim.batch: 200000 came, wanted at most optim.pool (131072); change either",
    ),
    (
        "optim: {lr_warmup: 0.9}",
        "optim.lr_warmup: 0.9 came, wanted a sum of at most 1 with optim.lr_decay (0.2); "
        "change either",
    ),
    (
        "{tokens: 5000, finetune: {tokens: 4000}}",
        "finetune.tokens: 4000 came, wanted less by optim.batch at least than tokens (5000); "
        "change either",
    ),
    ("tokens: 10", "tokens: 10 came, wanted at least optim.batch (1024); change either"),
    (
        "grid: 3",
        "grid: 3 came, wanted settings of an SAE, each with a list of values, such as "
        "sae.sparsity.l1: [4, 8]",
    ),
    (
        "grid: {optim.batch: [1, 2]}",
        "grid.optim.batch: all SAEs of a run share it; wanted sae.*, seed, or such as optim.lr",
    ),
    (
        "grid: {tokens: [1, 2]}",
        "grid.tokens: all SAEs of a run share it; wanted sae.*, seed, or such as optim.lr",
    ),
    ("grid: {sede: [1, 2]}", "grid.sede: unknown setting; did you mean 'seed'?"),
    ("grid: {seed: [1, 1]}", "grid.seed: [1, 1] came, wanted each value once"),
    (
        "grid: {sae.sparsity.l1: [1, 1.0]}",
        "grid.sae.sparsity.l1: [1, 1.0] came, wanted each value once",
    ),
    (
        "grid: {sae.skip: [true, 'yes']}",
        "grid: two SAEs would be the same, as 1 and 1.0 are; wanted each value once",
    ),
    (
        "grid: {sae.d_sae: [64], sae: {d_sae: [128]}}",
        'grid: "sae.d_sae" is given twice, as a.b and below a; keep one',
    ),
    (
        "{sae: {d_sae: 64}, grid: {sae.expansion_factor: [2, 4]}}",
        "grid.sae.expansion_factor: sae.d_sae (64) overrides it; leave either out",
    ),
    ("grid: {seed: []}", "grid.seed: [] came, wanted at least one value"),
    ("grid: {seed: [1, x]}", 'grid.seed: "x" came, wanted a whole number from 0 to 4294967295'),
    (
        "grid: {sae: {sparsity: {k: 3}}}",
        "grid.sae.sparsity.k: unknown setting; it belongs to sae.sparsity.kind: topk or batchtopk",
    ),
    (f"grid: {{seed: {[*range(300)]}}}", "grid: 300 SAEs a hookpoint came, wanted at most 256"),
    ('"\\e[31m\\n": 1', r'"\u001b[31m\n": unknown setting; a config has'),
]


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_names_the_key_the_value_and_what_to_do(write, text, line):
    (got,) = mistakes(write(text))
    assert got == line or (line.endswith("has") and got.startswith(line))


def test_a_ramp_without_effect_is_refused_in_new_runs_alone(write):
    """One SAE of a grid that it moves is enough, and a run that is trained opens as it is."""
    ramp = {"sae.sparsity.p_ramp": ["0", "0.5"]}
    assert len(mistakes(None, ramp)) == 1
    assert resolve(None, ramp | {"grid.sae.sparsity.p_end": ["1", "0.5"]}).grid
    assert resolve(
        None, ramp | {"grid.sae.sparsity.kind": ["relu_l1", "gated"], "sae.sparsity.p_end": "0.5"}
    )
    assert load(write("sae: {sparsity: {p_ramp: [0, 0.5]}}")).sae.sparsity.at(0.2).p == 1


def test_all_mistakes_come_at_once_those_between_two_settings_too(write):
    text = """
optim: {lr: -1, batch: 300000, betas: [3, 4]}
tokens: soon
colour: red
sae: {d_sae: 4, sparsity: {kind: topk, k: 8, auxk: 9}}
"""
    lines = mistakes(write(text), {"seed": "x", "model.name.size": "big"})
    keys = [line.split(":")[0] for line in lines]
    optim = {"optim.lr", "optim.betas", "optim.batch"}
    sae = {"sae.sparsity.k", "sae.sparsity.auxk"}
    assert set(keys) == optim | sae | {"tokens", "colour", "seed", "model.name"}
    assert len(lines) == len(set(keys))


def test_many_wrong_values_of_a_grid_are_three_lines_a_setting():
    grid = {"grid.seed": ["-1", "-2", "-3"], "grid.optim.lr": [str(-i) for i in range(9)]}
    told = [line.split(",")[0] for line in mistakes(None, grid)]
    assert told == [
        "grid.optim.lr: 0 came",
        "grid.optim.lr: -1 came",
        "grid.optim.lr: and 7 more",
        *(f"grid.seed: {value} came" for value in (-1, -2, -3)),
    ]


def test_a_setting_that_is_wrong_itself_is_not_compared(write):
    (line,) = mistakes(write("optim: {batch: 200000, pool: none}"))
    assert line.startswith("optim.pool: ")
    (line,) = mistakes(write("tokens: 10\noptim: 3"))[:1]
    assert line.startswith("optim: ")


def test_no_sentence_of_pydantic_reaches_the_user():
    """Whatever value lands on whatever setting, the message is ours."""
    odd = [None, True, -1, 2**80, 0.5, math.nan, "", "x", [], [None], {}, {"a": 1}, {1: 2}, b"x"]
    names = [flag.name for flag in flags()] + ["optim", "sae.sparsity", "sae", "nope"]
    names += ["grid", "grid.seed", "grid.sae.sparsity.l1", "grid.sae.prefixes", "grid.nope"]
    for name in names:
        for value in odd:
            try:
                resolve(None, {name: value})
            except ConfigError as error:
                text = str(error)
                assert text.startswith(name), text
                assert "Input" not in text and "valid" not in text, text


BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{x: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)
"""A kilobyte that is 9⁹ values once its aliases are written out."""
BROKEN_FILES = [
    ("seed: 1\noptim: {}\nseed: 2\n", "line 3: 'seed' is given twice, first on line 1; keep one"),
    ("optim:\n  lr: 1\n  lr: 2\n", "line 3: 'lr' is given twice, first on line 2; keep one"),
    ("seed: 1\nmodel:\n  name: builtin:\n", "line 3: not valid YAML (mapping values"),
    ("seed: 1\nhookpoints: [a\n", "line 3: not valid YAML ("),
    ("optim:\n\tlr: 3\n", "line 2: not valid YAML (found character"),
    ("hookpoints: *\n", "line 1: not valid YAML ("),
    ("seed: !!int abc\n", "line 1: not valid YAML ("),
    ("seed: !!python/name:os.system x\n", "line 1: not valid YAML ("),
    ("--- {}\n--- {}\n", "line 2: not valid YAML ("),
    ("seed: \x00", ": not valid YAML ("),
    ("[" * 3000, ": nested too deeply"),
    ("optim: &a {lr: *a}", "line 1: a value that holds itself"),
    (BOMB, ": aliases that repeat too much"),
    (BOMB.replace("x: ", "<<: "), ": aliases that repeat too much"),
    ("#" * 2_000_000, ": more than 1,048,576 bytes came"),
    ("- seed\n", ': ["seed"] came, wanted settings'),
    ("seed 3", ': "seed 3" came, wanted settings'),
    (b"seed: 1\n# caf\xe9\n", "line 2: not UTF-8 text; save it as UTF-8"),
]


@pytest.mark.parametrize(("text", "part"), BROKEN_FILES, ids=range(len(BROKEN_FILES)))
def test_a_broken_file_is_refused_with_its_line(write, text, part):
    path = write(text)
    (line,) = mistakes(path)
    assert line.startswith(str(path))
    assert part in line


def test_aliases_that_people_write_are_read(write):
    path = write("optim: &a {lr: 1e-3}\nsae: {sparsity: &s {l1: 3}}\nhookpoints: [&h x, y]\n")
    assert load(path).optim.lr == 1e-3
    assert load(write("data: {name: &n x, split: *n}")).data.split == "x"


def test_a_missing_file_suggests_the_nearest(write, tmp_path):
    write("", "small.yaml")
    assert mistakes(tmp_path / "smal.yaml")[0].endswith("no such file; did you mean 'small.yaml'?")
    assert mistakes(tmp_path / "zzz")[0].endswith(f"no such file; {tmp_path} has small.yaml")
    assert "there is no folder" in mistakes(tmp_path / "no" / "a.yaml")[0]
    assert "cannot be read" in mistakes(tmp_path)[0]


def test_yaml_numbers_are_what_people_mean(write):
    path = write(
        "tokens: 2e9\nseed: 1_000\noptim: {lr: 3e-4, grad_clip: '2'}\n"
        "data: {name: no, split: 2024-01-01, column: '12', repeat: yes}\n"
    )
    config = load(path)
    assert (config.tokens, config.seed) == (2_000_000_000, 1000)
    assert (config.optim.lr, config.optim.grad_clip) == (3e-4, 2.0)
    assert config.data.name == "no" and config.data.split == "2024-01-01"
    assert config.data.column == "12" and config.data.repeat is True
    assert load(write("seed: 010")).seed == 10


def test_empty_files_and_empty_groups_are_the_defaults(write):
    for text in ("", "# all commented out\n", "optim:\n#  lr: 3\nsae:\n  sparsity:\n"):
        assert load(write(text)) == TrainConfig() == resolve(None, {})
    assert load(write(b"\xef\xbb\xbfseed: 3")).seed == 3  # the mark Windows editors write


def test_flags_win_over_the_file_and_read_values_by_the_rules_of_yaml(write):
    path = write("optim: {lr: 1, batch: 512}\nmodel: {name: gpt2, revision: abc}")
    config = resolve(
        path,
        {
            "optim.lr": "3e-4",
            "optim.betas": ["0", "0.99"],
            "optim.grad_clip": "null",
            "model.name": "builtin:",
            "model.revision": "null",
            "data.name": "123",
            "hookpoints": ["layers.*.mlp_act", "module:h.2.mlp.act"],
            "data.streaming": "true",
        },
    )
    assert config.optim == OptimConfig(lr=3e-4, batch=512, betas=(0, 0.99), grad_clip=None)
    assert config.model == ModelConfig(name="builtin:", revision=None)
    assert config.data == DataConfig(name="123", streaming=True)
    assert config.hookpoints == ("layers.*.mlp_act", "module:h.2.mlp.act")
    assert resolve(None, {"hookpoints": "[a, b]"}).hookpoints == ("a", "b")
    assert resolve(None, {"hookpoints": ["[a, b]"]}).hookpoints == ("a", "b")
    assert resolve(None, {"hookpoints": "a"}).hookpoints == ("a",)
    assert resolve(None, {"optim.betas": "[0.5, 0.6]"}).optim.betas == (0.5, 0.6)
    assert resolve(None, {"optim.lr": 0.5}).optim.lr == 0.5


def test_flags_of_the_files_variant_just_work(write):
    path = write("sae: {sparsity: {kind: topk, k: 3, auxk: 5}}")
    assert resolve(path, {"sae.sparsity.k": "7"}).sae.sparsity == TopKConfig(k=7, auxk=5)
    assert resolve(path, {"sae.sparsity.kind": "topk"}).sae.sparsity == TopKConfig(k=3, auxk=5)


def test_another_kind_drops_the_files_other_sparsity_settings_but_no_mistakes(write):
    path = write("sae: {sparsity: {kind: topk, k: 3, auxk: 5}}")
    other = {"sae.sparsity.kind": "relu_l1", "sae.sparsity.l1": "2"}
    assert resolve(path, other).sae.sparsity == ReluL1Config(l1=2)
    default_kind = write("sae: {sparsity: {l1: 3}}", "default_kind.yaml")
    assert resolve(default_kind, {"sae.sparsity.kind": "topk"}).sae.sparsity == TopKConfig()
    no_kind = write("sae: {sparsity: {k: 3}}", "no_kind.yaml")
    assert resolve(no_kind, {"sae.sparsity.kind": "topk"}).sae.sparsity == TopKConfig(k=3)
    typo = write("sae: {sparsity: {kind: topk, kk: 3}}", "typo.yaml")
    assert mistakes(typo, other)[0].startswith("sae.sparsity.kk: unknown setting")
    assert mistakes(path, {"sae.sparsity.l1": "2"}) == [
        "sae.sparsity.l1: unknown setting; it belongs to sae.sparsity.kind: relu_l1 or gated"
    ]


def test_flags_cover_every_setting_with_help_and_accept_their_own_defaults():
    all_flags = flags()
    names = [flag.name for flag in all_flags]
    assert len(set(names)) == len(names)
    assert {"optim.lr", "sae.sparsity.kind", "sae.sparsity.l1", "sae.sparsity.k", "seed"} <= {
        *names
    }
    for flag in all_flags:
        assert flag.help and "\n" not in flag.help, flag.name
        of = re.search(r"sparsity.kind (\w+)", flag.help)
        kind = of[1] if of else "relu_l1"
        default = flag.default
        value: object = "null" if default is None else str(default).lower()
        if flag.many:
            value = [str(item) for item in default]
        same = resolve(None, {"sae.sparsity.kind": kind, flag.name: value})
        assert same == resolve(None, {"sae.sparsity.kind": kind}), flag.name
    by_name = {flag.name: flag for flag in all_flags}
    assert by_name["model.dtype"].type == "auto|float32|bfloat16"
    assert by_name["sae.sparsity.kind"].type.split("|") == KINDS.split(", ")
    assert (by_name["optim.betas"].type, by_name["optim.betas"].many) == ("float", True)


TRAPS = "3e-4 no null 010 09 1_0 12:30 builtin: ~ << = 2024-01-01 * 0x1F .nan # ' \x1b \ufeff"
text = st.text(max_size=8).filter(lambda s: s.strip()) | st.sampled_from(
    [*TRAPS.split(" "), "- a", " a ", "a\nb", "a\x85b", "a: b", "a #b"]
)
share = st.floats(0, 0.5)
configs = st.builds(
    TrainConfig,
    model=st.builds(ModelConfig, name=text, revision=text | st.none()),
    data=st.builds(DataConfig, source=text, heldout=share, streaming=st.booleans()),
    hookpoints=st.lists(text, min_size=1, max_size=3, unique=True).map(tuple),
    sae=st.builds(
        SAEConfig,
        expansion_factor=st.integers(1, 10**30),
        sparsity=st.builds(ReluL1Config, l1=st.floats(0, 1e300), l1_warmup=share)
        | st.builds(TopKConfig, k=st.integers(1, 99), auxk_coef=st.floats(0, 9)),
    ),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(0, 1e9, exclude_min=True),
        betas=st.tuples(share, share),
        lr_warmup=share,
        lr_decay=share,
        grad_clip=st.none() | st.floats(1e-300, 1e300),
    ),
    grid=st.fixed_dictionaries(
        {}, optional={"seed": st.just([0, 1]), "sae.prefixes": st.just([[1.0], [0.5, 1.0]])}
    ),
    output=text | st.none(),
)


@settings(max_examples=60, deadline=None, database=None)
@given(config=configs)
def test_a_dumped_config_loads_back_equal(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_a_map_is_wanted_in_place_of_hookpoints(tmp_path):
    config = resolve(None, {"inputs": "layers.2.mlp_in", "targets": ["[a, b]"]})
    assert (config.hookpoints, config.inputs) == ((), ("layers.2.mlp_in",))
    assert config.targets == ("a", "b")
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config


@settings(max_examples=60, deadline=None, database=None)
@given(config=configs)
def test_run_names_are_plain_folder_names(config):
    name = run_name(config)
    assert name.isascii() and set(name) <= {*map(chr, range(48, 123)), ".", "-"} - {*":;<=>?@\\"}
    assert name[0] not in ".-" and len(name) < 250 and not {*"/[]^`"} & {*name}


def test_run_names_say_what_was_trained():
    assert run_name(TrainConfig()) == "builtin-layers.2.mlp_act-relu_l1-x8"
    changed = {
        "model.name": "EleutherAI/pythia-70m",
        "hookpoints": ["layers.*.mlp_out", "b"],
        "sae.d_sae": "4096",
        "sae.sparsity.kind": "topk",
        "sae.sparsity.k": "32",
        "sae.sparsity.k_start": "8",
        "seed": "1",
    }
    name = "pythia-70m-layers.all.mlp_out-and-1-more-topk-d4096-k_32-k_start_8-seed_1"
    assert run_name(resolve(None, changed)) == name
    sides = {"inputs": "layers.2.mlp_in", "targets": "layers.2.mlp_out", "sae.skip": "true"}
    name = "builtin-layers.2.mlp_in-to-layers.2.mlp_out-relu_l1-x8-skip"
    assert run_name(resolve(None, sides)) == name
    sides = {"inputs": "layers.*.mlp_out", "targets": "layers.*.mlp_out"}
    assert run_name(resolve(None, sides)) == "builtin-layers.all.mlp_out-relu_l1-x8"


def test_a_grid_is_every_combination_of_its_values():
    config = resolve(
        None,
        {
            "seed": "3",
            "grid": {"seed": [0, 1]},
            "grid.sae.sparsity.kind": ["topk", "relu_l1"],
            "grid.sae.prefixes": ["[1]", "[0.25, 1]"],
        },
    )
    found = points(config)
    suffixes = [point.suffix for point in found]
    assert len(set(suffixes)) == 8 and suffixes[0] == "-seed=0-kind=topk-prefixes=1"
    assert suffixes[-1] == "-seed=1-kind=relu_l1-prefixes=0.25_1"
    for point in found:
        assert not point.config.grid and point.config.seed == point.settings["seed"]
        assert point.config.sae.sparsity.kind == point.settings["sae.sparsity.kind"]
    assert found[1].config == resolve(
        None, {"seed": "0", "sae.sparsity.kind": "topk", "sae.prefixes": ["0.25", "1"]}
    )
    assert points(TrainConfig()) == [({}, TrainConfig())]
    assert run_name(config) == "builtin-layers.2.mlp_act-relu_l1-x8-grid-seed-kind-prefixes-seed_3"


def test_a_whole_number_has_one_name_and_an_override_takes_the_place_of_the_file(write):
    text = "grid: {sae: {sparsity: {l1: 4}}, sae.d_sae: [64, 128], seed: [1]}"
    config = resolve(write(text), {"grid.sae.d_sae": ["1e2"], "grid.optim.lr": ["2.0"]})
    (point,) = points(config)
    assert point.suffix == "-l1=4-d_sae=100-seed=1-lr=2"
    assert point.settings["sae.d_sae"] == 100 and point.config.sae.d_sae == 100
    assert not resolve(write("grid: # none"), {}).grid


def test_the_keys_of_a_grid_are_those_of_the_settings_an_sae_has_of_its_own():
    names = {f"grid.{key}" for key in grid_keys()}
    assert {"grid.seed", "grid.sae.d_sae", "grid.sae.sparsity.l1", "grid.optim.lr"} <= names
    assert not {"grid.optim.batch", "grid.tokens", "grid.hookpoints", "grid.data.source"} & names


def test_width_is_a_multiple_of_the_input_unless_given():
    assert SAEConfig(expansion_factor=4).width(512) == 2048
    assert SAEConfig(expansion_factor=4, d_sae=7).width(512) == 7


def test_configs_are_frozen():
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.seed = 3
    assert hash(config) == hash(TrainConfig())


def test_importing_loads_no_torch():
    code = "import sys, sae.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
