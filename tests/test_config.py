from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from intra import config as configuration
from intra.data import jsonl
from intra.errors import UserError

PROJECT = Path(__file__).parent.parent
CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


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
    job, cluster = (yaml.safe_load((PROJECT / "infra" / f"{name}.yaml").read_text()) for name in ("nightly", "kuberay"))
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    runtime, _, python, script, named, *overrides = container["args"]
    assert json.loads(runtime.removeprefix("--runtime-env-json="))["env_vars"] == {"INTRA_COMMIT": "TAG"}
    assert python == "python"
    assert (PROJECT / script).is_file()
    config = configuration.load(PROJECT / named.removeprefix("--config="), overrides)
    assert (config.root, config.data.path) == ("s3://BUCKET/nightly", "s3://BUCKET/data")  # no worker sees a folder of the driver's
    assert config.tracking.uri is not None
    assert [group["minReplicas"] for group in cluster["spec"]["workerGroupSpecs"]] == [0]
    for path in (named.removeprefix("--config="), "configs/paper-data.yaml", "configs/nightly.yaml"):
        assert configuration.load(PROJECT / path).cluster.wait_minutes > 0  # at night there is no worker, until the autoscaler adds one
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    token = {"secretKeyRef": {"name": cluster["metadata"]["name"], "key": "auth_token"}}  # as KubeRay names it
    assert container["env"] == [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_shipped_configurations_read_and_write_here_is_not_sent_with_a_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    config, ignored = configuration.load(path), (PROJECT / ".gitignore").read_text().splitlines()
    for place in (config.root, config.data.path):
        assert place is None or f"/{Path(place).relative_to(PROJECT).parts[0]}/" in ignored


@pytest.mark.parametrize("name", ["real", "paper"])
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_passages_may_be_packed_or_not(name: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / "questions").mkdir()
    for file in (f"passages.one.jsonl{ending}", f"passages.two.jsonl{ending}", "questions/b.train.jsonl", "questions/b.test.jsonl"):
        (tmp_path / file).touch()
    config = configuration.load(PROJECT / "configs" / f"{name}.yaml", [f"data.path={tmp_path}"])
    assert jsonl.layout(config.data).passages == [f"passages.one.jsonl{ending}", f"passages.two.jsonl{ending}"]


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
        ("root: ''", [], "root: found ''; give a local folder"),
        ("root: r\ndata: {source: jsonl}", [], "data.path is missing"),
        ("root: r", ["tokens"], "expected section.key=value"),
        ("root: r", ["root.x=1"], "root is a value, not a section"),
        ("root: [", [], "not valid YAML"),
        ("root: r\nseed: 2026-13-45", [], "c.yaml: not valid YAML: month must be in 1..12 in"),
        ("root: r", ["seed=2026-13-45"], "override 'seed=2026-13-45': the value is not valid YAML (month must be in 1..12); quote it"),
        ("root: r\nseed: 1\ndata: {}\nseed: 2", [], "c.yaml, line 4: 'seed' stands in line 2 already; write it once"),
        ("root: r\ndata:\n  workers: 1\n  workers: 2", [], "c.yaml, line 4: 'workers' stands in line 3 already; write it once"),
        ("root: r", ["data={workers: 1, workers: 2}"], "'workers' stands in line 1 already; write it once"),
        ("root: r", ["retriever.tokens=true"], "'retriever.tokens': found True; input should be a number"),
        ("root: r", ["retriever.train.weight_decay=off"], "'retriever.train.weight_decay': found False; input should be a number"),
        ("root: r", ["data.pool_limit=yes"], "'data.pool_limit': found True; input should be a number"),
        ("root: r", ["evaluate.k=[5, true]"], "'evaluate.k': found [5, True]; input should be a number"),
        ("root: r\nseed: true", [], "'seed': found True; input should be a number"),
        (
            "root: r",
            ["evaluate.models={m: {kind: dense, model: /m, pooling: cls, max_length: true}}"],
            "'evaluate.models.m.max_length': found True; input should be a number",
        ),
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


def test_a_key_of_a_merged_section_may_be_written_again(tmp_path: Path) -> None:
    text = "root: r\nretriever:\n  train: &train {steps: 3, batch_size: 8}\nbackbone:\n  warmstart: {<<: *train, steps: 4, micro_batch: 8}"
    config = configuration.load(write(tmp_path, text))
    assert (config.backbone.warmstart.steps, config.backbone.warmstart.batch_size) == (4, 8)


@pytest.mark.parametrize(
    "place", ["gs://bucket/run", "s3a://bucket/run", "S3://bucket/run", "s3://", "s3:///run", "http://host/run", "file://"]
)
@pytest.mark.parametrize("key", ["root", "data.path", "evaluate.expected"])
def test_a_place_of_another_kind_is_no_local_folder(tmp_path: Path, place: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        configuration.load(write(tmp_path, "root: r"), [f"{key}={f'[{place}]' if key == 'evaluate.expected' else place}"])
    assert str(caught.value) == f"{key}: found '{place}'; give a local folder, file:///FOLDER or s3://BUCKET/PREFIX"


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
    frozen = ["backbone.train=true", "backbone.architecture.matching_heads=3", "backbone.architecture.encoder=bert"]
    assert configuration.load("c.yaml", frozen).backbone.architecture.encoder == str(tmp_path / "bert")
    assert (
        configuration.load("c.yaml", [*frozen[:2], "backbone.architecture.encoder=package:a/b"]).backbone.architecture.encoder
        == "package:a/b"
    )
    away = configuration.load("c.yaml", ["root=s3://bucket/run", "backbone.model=google/t5gemma-2-270m-270m"])
    assert (away.root, away.backbone.model) == ("s3://bucket/run", "google/t5gemma-2-270m-270m")
    assert configuration.load("c.yaml", [f"root=file://{tmp_path}/run"]).root == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///runs/../mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("http://mlflow:5000", "http://mlflow:5000"),
    ],
)
def test_workers_in_other_directories_log_to_the_same_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert configuration.load(write(tmp_path, "root: r"), [f"tracking.uri='{given}'"]).tracking.uri == kept.format(here=tmp_path)


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
