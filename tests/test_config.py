from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from intra import config as configuration
from intra.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    config = configuration.load(path, ["data.path=somewhere"])
    assert config.tracking.experiment == path.stem
    written = config.model_dump()  # a worker is sent it, and its fingerprints are the driver's
    assert json.dumps(configuration.parse(written).model_dump()) == json.dumps(written)


def test_the_scheduled_night_is_a_configuration_that_finds_everything_on_the_cluster() -> None:
    here = Path(__file__).parent.parent
    job = yaml.safe_load((here / "infra" / "nightly.yaml").read_text())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    runtime, _, python, script, named, *overrides = container["args"]
    assert json.loads(runtime.removeprefix("--runtime-env-json="))["env_vars"] == {"INTRA_COMMIT": "TAG"}
    assert python == "python"
    assert (here / script).is_file()
    config = configuration.load(here / named.removeprefix("--config="), overrides)
    assert (config.root, config.data.path) == ("s3://BUCKET/nightly", "s3://BUCKET/data")  # no worker sees a folder of the driver's
    assert config.tracking.uri is not None


def test_names_and_defaults_that_users_rely_on(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path, "root: r"))
    assert (config.retriever.tokens, config.retriever.pooled_length, config.retriever.initial_context) == (64, 7, 20)
    assert config.evaluate.k == [5, 10, 20]
    assert config.retriever.scoring == "per_head"


def test_override_wins_and_is_typed(tmp_path: Path) -> None:
    config = configuration.load(
        write(tmp_path, "root: r\nretriever: {tokens: 8}"), ["retriever.tokens=16", "evaluate.k=[1, 5]", "data.pool_limit=null"]
    )
    assert config.retriever.tokens == 16
    assert config.evaluate.k == [1, 5]
    assert config.data.pool_limit is None


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("root: r\nretriver: {}", [], "unknown key 'retriver'; did you mean 'retriever'?"),
        ("root: r", ["retriever.token=8"], "unknown key 'retriever.token'; did you mean 'retriever.tokens'?"),
        ("root: r", ["retriever.tokens=many"], "'retriever.tokens': found 'many'"),
        ("root: r", ["retriever.tokens=0"], "'retriever.tokens': found 0"),
        ("seed: 1", [], "'root' is missing"),
        ("root: r\ndata: {source: jsonl}", [], "data.path is missing"),
        ("root: r", ["tokens"], "expected section.key=value"),
        ("root: r", ["root.x=1"], "root is a value, not a section"),
        ("root: [", [], "not valid YAML"),
        ("- a", [], "expected a mapping"),
        ("root: r", ["evaluate.methods=[bm26]"], "'evaluate.methods.0': found 'bm26'"),
        ("root: r", ["backbone.prompt=hello"], "backbone.prompt must contain {question}"),
        ("root: r", ["retriever.train.micro_batch=5"], "must be a multiple of retriever.train.micro_batch"),
    ],
)
def test_a_mistake_is_one_line_with_key_and_remedy(tmp_path: Path, text: str, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        configuration.load(write(tmp_path, text), overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        configuration.load(tmp_path / "absent.yaml")


def test_local_paths_are_absolute_for_workers_in_other_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "c.yaml").write_text("root: run")
    config = configuration.load("c.yaml", ["data.source=jsonl", "data.path=../data", "backbone.model=model"])
    assert (config.root, config.data.path) == (str(tmp_path / "run"), str(tmp_path.parent / "data"))
    assert config.backbone.model == str(tmp_path / "model")
    away = configuration.load("c.yaml", ["root=s3://bucket/run", "backbone.model=google/t5gemma-2-270m-270m"])
    assert (away.root, away.backbone.model) == ("s3://bucket/run", "google/t5gemma-2-270m-270m")


def test_a_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("root: run\nretriever: {tokens: 8, pooled_length: 3}\nevaluate: {k: [5]}")
    path = write(tmp_path, "extends: base.yaml\nretriever: {tokens: 4}\nablation: {rows: {all: [], none: ['retriever.initial_context=0']}}")
    config = configuration.load(path, ["evaluate.k=[7]"])
    assert (config.retriever.tokens, config.retriever.pooled_length, config.evaluate.k) == (4, 3, [7])
    assert config.ablation is not None
    variant = configuration.varied(config, config.ablation.rows["none"])
    assert (variant.retriever.initial_context, variant.retriever.tokens, variant.ablation) == (0, 4, None)
    with pytest.raises(UserError, match=r"absent\.yaml: no such configuration file"):
        configuration.load(write(tmp_path, "extends: absent.yaml"))
    with pytest.raises(UserError, match="extends"):
        configuration.load(write(tmp_path, "extends: c.yaml"))
    (tmp_path / "other.yaml").write_text("extends: c.yaml")
    with pytest.raises(UserError, match=r"other.yaml: extends: found 'c.yaml'; name another"):
        configuration.load(write(tmp_path, "extends: other.yaml"))
