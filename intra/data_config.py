"""The `data` section of the configuration: where passages and questions come from, and what of them makes the dataset."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from intra.section import Section


class SyntheticConfig(Section):
    """The generated world (`data.source: synthetic`)."""

    chunks: int = Field(1000, ge=50, description="chunks in the pool")
    train_questions: int = Field(600, ge=1)
    test_questions: int = Field(300, ge=1)


class FileConfig(Section):
    """One input of `data.source: files`: a benchmark's own file, or passages without questions."""

    format: Literal["clara", "hotpotqa", "hotpotqa_fullwiki", "2wikimultihopqa", "musique", "dpr", "nq_open", "beir",
                    "psgs", "parquet", "passages"]  # fmt: skip
    path: str = Field(min_length=1, description="below data.path, or absolute, or s3://; of passages also a glob; of beir a folder")
    benchmark: str | None = Field(
        None, min_length=1, description="what the questions belong to (formats with questions; of beir, those that do not say)"
    )
    split: Literal["train", "test"] | None = Field(None, description="their role in this run; of beir also the name of the qrels")
    repo: str | None = Field(None, description="data set of the Hugging Face hub to fetch `path` from, into data.path")
    revision: str | None = Field(None, description="the commit of `repo`, all 40 digits")
    sha256: str | None = Field(None, description="of the fetched file; the hub's own checksum is always checked")

    @model_validator(mode="after")
    def _check(self) -> Self:
        passages = self.format in ("psgs", "parquet", "passages")
        if passages and (self.benchmark or self.split):
            raise ValueError(f"data.files: {self.path}: format {self.format} has no questions; remove benchmark and split")
        if not passages and self.format != "beir" and not (self.benchmark and self.split):
            raise ValueError(f"data.files: {self.path}: format {self.format} needs benchmark and split (train or test)")
        if self.format == "beir" and not self.benchmark:
            raise ValueError(f"data.files: {self.path}: format beir needs a benchmark (and a split, unless only its passages are wanted)")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"data.files: {self.path}: sha256 must be 64 hex digits in lower case")
        if (self.revision or self.sha256) and not self.repo:
            raise ValueError(f"data.files: {self.path}: revision and sha256 go with repo; name the data set")
        if self.repo and any(sign in self.path for sign in "*?["):
            raise ValueError(f"data.files: {self.path}: a file of the hub is named in full; write one entry for each")
        if self.repo and self.format == "beir":
            raise ValueError(f"data.files: {self.path}: of the hub single files are fetched, no folders; fetch it by hand and remove repo")
        if self.repo and (self.path.startswith(("/", "s3://")) or ".." in self.path.split("/")):
            raise ValueError(f"data.files: {self.path}: a file of the hub lies below data.path; write its path in {self.repo}")
        return self


class DataConfig(Section):
    source: Literal["synthetic", "jsonl", "beir", "files"] = "synthetic"
    path: str | None = Field(None, description="folder of the input files (jsonl, beir, files)")
    files: list[FileConfig] = Field([], description="the input files and their formats (files)")
    passages: str | list[str] = Field("passages*.jsonl*", description="file names or a glob below data.path (jsonl)")
    benchmarks: list[str] | None = Field(None, description="benchmarks to read (jsonl); all that are found when null")
    train_split: str = "train"
    test_split: str = "test"
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a bad record of the input: stop there, or leave it out, counted and listed"
    )
    deduplicate: bool = Field(False, description="passages alike but for case, spacing and Unicode form become one")
    pool_limit: int | None = Field(None, ge=1, description="passages in the pool; gold passages always stay")
    pool_chunks: int | None = Field(None, ge=1, description="chunks in the pool; gold passages always stay")
    pool_tokens: int | None = Field(None, ge=1, description="backbone tokens in the pool; gold passages always stay")
    question_limit: int | None = Field(None, ge=1, description="questions per benchmark and split")
    chunk_tokens: int = Field(256, ge=16, description="longest chunk in backbone tokens; longer passages are split")
    template: str = Field("{title}\n{text}", description="how title and text become the encoder's input")
    nq_gold: Literal["all", "one"] = Field(
        "all", description="benchmark nq: all annotated passages of a question are evidence, or the first"
    )
    musique_train: Literal["own", "union"] = Field(
        "own", description="union: HotpotQA's and 2WikiMultihopQA's training questions are MuSiQue's too, as the paper's counts have it"
    )
    near_duplicates: float | None = Field(None, gt=0, le=1, description="report chunks whose word 5-grams have this Jaccard similarity")
    workers: int = Field(1, ge=1, description="processes that read and tokenize (Ray, where more than one)")
    offline: bool = Field(False, description="fetch nothing from the hub; so does HF_HUB_OFFLINE=1")
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source != "synthetic" and not self.path:
            raise ValueError(f"data.path is missing; data.source={self.source} needs the folder of the input files")
        if "{text}" not in self.template:
            raise ValueError("data.template must contain {text}")
        if (self.source == "files") != bool(self.files):
            raise ValueError("data.files names the input files of data.source=files; set both or neither")
        if self.files and self.benchmarks is not None:
            raise ValueError("data.benchmarks chooses among the files of data.source=jsonl; with data.source=files remove it")
        if sum(limit is not None for limit in (self.pool_limit, self.pool_chunks, self.pool_tokens)) > 1:
            raise ValueError("data.pool_limit, data.pool_chunks and data.pool_tokens: set one of them")
        return self
