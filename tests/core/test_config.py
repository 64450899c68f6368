"""Configs: what is accepted, and that everything else is one line naming file and dotted path (fault 23)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_forcing.config import build_config, load_config, to_plain
from sparse_forcing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    steps: int = 100

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Memory:
    RENAMED: ClassVar = {"window": "window_frames"}

    kind: Literal["full", "window"] = "full"
    tile: tuple[int, ...] = (1, 4, 4)
    window_frames: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    output: Path = Path("out")
    verbose: bool = False
    prompts: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    memory: Memory | None = None
    optimizer: Optimizer = Optimizer()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_together(tmp_path: Path) -> None:
    path = write(
        tmp_path, "name: a\noptimizer: {lr: 1e-4, betas: [0, .5]}\nmemory:\n  tile: [3, 4, 4]\nlabels: {x: 2}\n"
    )
    config = load_config(Config, path, ["optimizer.steps=1e4", "memory.kind=window", "output=/x/y", "prompts=[a, b]"])
    assert config.optimizer == Optimizer(lr=1e-4, betas=(0.0, 0.5), steps=10_000)
    assert config.memory == Memory(kind="window", tile=(3, 4, 4))
    assert (config.output, config.prompts, config.labels) == (Path("/x/y"), ["a", "b"], {"x": 2})


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    assert load_config(Optimizer, write(tmp_path, "lr: 1e-4\n")).lr == 1e-4


def test_text_fields_take_overrides_as_typed() -> None:
    assert load_config(Config, None, ["name=a: [b, 1e-4"]).name == "a: [b, 1e-4"
    assert load_config(Config, None, ["name=off"]).name == "off"


def test_override_can_set_a_group_or_null(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nmemory: {kind: window}\n")
    assert load_config(Config, path, ["memory=null"]).memory is None
    assert load_config(Config, path, ["memory={tile: [1]}"]).memory == Memory(tile=(1,))


def test_plain_form_builds_the_same_config() -> None:
    config = Config(name="a", memory=Memory(kind="window"), labels={"x": 1})
    assert build_config(Config, to_plain(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\noptimiser: {}", "optimiser: unknown setting; did you mean optimizer?"),
        ("name: a\nmemory: {window: 3}", "memory.window: this setting is called memory.window_frames now"),
        ("name: a\nlr: 1", "lr: unknown setting; did you mean optimizer.lr?"),
        ("name: a\noptimizer: {zzz: 1}", "optimizer.zzz: unknown setting; known here: betas, lr, steps"),
        ("name: a\noptimizer: {lr: '1e-4'}", "optimizer.lr: expected a number, got text '1e-4'"),
        ("name: a\noptimizer: {lr: true}", "optimizer.lr: expected a number, got True"),
        ("name: a\noptimizer: {lr: .nan}", "optimizer.lr: nan is not a finite number"),
        ("name: a\noptimizer: {lr: -1}", "optimizer: lr must be above 0"),
        ("name: a\noptimizer: {steps: 1.5}", "optimizer.steps: expected a whole number, got 1.5"),
        ("name: a\noptimizer: {betas: [1]}", "optimizer.betas: expected 2 values, got 1"),
        ("name: a\noptimizer: {betas: [1, x]}", "optimizer.betas[1]: expected a number, got text 'x'"),
        ("name: a\noptimizer: 3", "optimizer: expected a group of settings, got 3"),
        ("name: a\nmemory: {kind: windw}", "memory.kind: 'windw' is not one of full, window; did you mean 'window'?"),
        ("name: 3", "name: expected text, got 3; put it in quotes"),
        ("name: a\nverbose: yes", "verbose: expected true or false, got text 'yes'"),
        ("name: a\nname: b", "line 2: key 'name' appears twice"),
        ("name: a\noptimizer: {lr: 1, lr: 2}", "line 2: key 'lr' appears twice"),
        ("name: &x a\noutput: *x", "aliases are not supported"),
        ("name: a\nverbose: !!bool abc", "line 2: 'abc' is not a value of type bool"),
        ("name: a\nverbose: !!timestamp abc", "line 2: values of type 'timestamp' are not supported"),
        ("name: a\noptimizer: {steps: !!int abc}", "line 2: 'abc' is not a value of type int"),
        ("name: [a", "line 1"),
        ("- a", "a config is a list of `name: value` lines, not a list"),
        ("[1, 2]: a", "a key must be one word"),
        ("verbose: true", "name: missing; it has no default"),
        ("name: a\nlabels: {x: y}", "labels.x: expected a whole number"),
        ('name: !!bool "abc"', "line 1: 'abc' is not a value of type bool"),
        ("name: !!timestamp x", "line 1: values of type 'timestamp' are not supported"),
        ("name: !!set [1]", "values of type 'set' are not supported"),
        ("memory: !!map x", "line 1: expected a group of settings"),
        (
            "name: !!python/object/apply:os.system [id]",
            "values of type 'python/object/apply:os.system' are not supported",
        ),
        ("name: a\n" + "memory: " + "{" * 3000, "yaml"),
    ],
)
def test_bad_file_is_one_line_with_the_path(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(Config, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "write it as name=value"),
        ("=1", "write it as name=value"),
        ("optimizer..lr=1", "write it as name=value"),
        ("optimizer.lr.x=1", "optimizer.lr: expected a number"),
        ("optimizer.lr=abc", "optimizer.lr: expected a number, got text 'abc'"),
        ("optimizer.lr=nan", "optimizer.lr: expected a number"),
        ("optimizer.lr=.nan", "optimizer.lr: nan is not a finite number"),
        ("optimizer.lr=", "optimizer.lr: expected a number, got nothing"),
        ("name.x=1", "name is not a group of settings"),
        ("verbose=1", "verbose: expected true or false, got 1"),
        ("optimizer.stpes=1", "optimizer.stpes: unknown setting; did you mean optimizer.steps?"),
    ],
)
def test_bad_override_is_one_line_with_the_path(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as error:
        load_config(Config, write(tmp_path, "name: a"), [override])
    assert message in str(error.value)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(Config, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="at most"):
        load_config(Config, write(tmp_path, "#" * (2 << 20)))


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="name: optimizer{}[]&*!'\"\n-1e.", max_size=60)))
def test_any_text_gives_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_config(Config, path, [f"name={text}"]), Config)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("tree", [[1, 2], [], "abc", 5, None])
@pytest.mark.parametrize("overrides", [(), ("steps=2",)])
def test_what_is_no_mapping_is_one_line(tree, overrides) -> None:
    from sparse_forcing.model.flow import SamplerConfig

    with pytest.raises(ConfigError, match=r"^pipeline\.json: "):
        build_config(SamplerConfig, tree, overrides, source="pipeline.json")


def test_overrides_leave_the_given_tree_alone() -> None:
    from sparse_forcing.model.flow import SamplerConfig

    tree = {"steps": 3}
    assert build_config(SamplerConfig, tree, ["steps=5"]).steps == 5
    assert tree == {"steps": 3}
