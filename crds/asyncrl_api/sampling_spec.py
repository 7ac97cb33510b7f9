"""Where samples come from: model, data set, workflow, reward, sampling, evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from asyncrl_api.base import (
    ApiType,
    ClaimReference,
    ConfigMapReference,
    Count,
    CountOrZero,
    FreeForm,
    Name,
    Positive,
    SecretReference,
    Text,
)
from asyncrl_api.marks import field

MAX_GROUP_SIZE = 4096


class ModelSpec(ApiType):
    """The language model that is trained."""

    source: Text = field(
        "Where the initial weights come from: hf://org/name (Hugging Face hub), file:///path (a folder in "
        "the pod), package://package/folder (shipped in a Python package), or module:factory (a function "
        "that writes the folder into the cache, once, under a lock)."
    )
    revision: Name = field("Branch, tag or commit on the hub.", default="main", min_length=1)
    dtype: Literal["BFloat16", "Float32"] = field(
        "Number format of the weights, in the trainer and in the engines.", default="BFloat16"
    )
    context_length: Count = field(
        "Maximum number of tokens of prompt and response together; at most training.tokensPerMicroBatch.",
        default=8192,
    )
    parameter_count: Annotated[int, Field(ge=0, le=10**14)] = field(
        "Number of weights, for example 1700000000; together with gpuBudget.gpuMemory it lets the operator "
        "derive the tensor-parallel size and the smallest trainer. 0: unknown.",
        default=0,
    )
    secret_ref: SecretReference | None = field(
        "Secret whose keys (such as HF_TOKEN) become environment variables of the pods that fetch the model.",
        default=None,
    )
    cache: ClaimReference | None = field(
        "PersistentVolumeClaim that keeps fetched models for other pods; absent: each pod fetches its own.",
        default=None,
    )


class DatasetSpec(ApiType):
    """The prompts that the policy is trained on."""

    source: Text = field(
        "Where the rows come from: hf://org/set (Hugging Face hub), file://rows.jsonl (one JSON object per "
        "line), reasoning-gym://name, or module:factory (a function that returns them)."
    )
    split: Name = field("Split of the data set.", default="train", min_length=1)
    parameters: FreeForm = field(
        "Keyword arguments of the source, for example a reasoning-gym configuration.", default={}
    )
    prompt_field: Name = field("Field of a row that holds the prompt.", default="question", min_length=1)
    answer_field: Name = field(
        "Field of a row that holds the reference answer; used by reward.type Math.",
        default="answer",
        min_length=1,
    )
    seed: CountOrZero = field("Seed of the order of the prompts, which differs in every pass.", default=17)
    secret_ref: SecretReference | None = field(
        "Secret whose keys become environment variables of the pods that fetch the data.", default=None
    )


class WorkflowSpec(ApiType):
    """How one sample is made."""

    type: Literal["SingleTurn", "MultiTurn", "Custom"] = field(
        "SingleTurn: one answer. MultiTurn: the policy is told the reward's feedback and answers again. "
        "Custom: `class` decides.",
        default="SingleTurn",
    )
    system_prompt: Annotated[str, Field(max_length=16384)] = field(
        "System message of the chat template, before each prompt; empty: none.", default=""
    )
    max_turns: Annotated[int, Field(ge=1, le=1000)] = field(
        "Maximum number of answers within a sample of type MultiTurn, which needs at least 2.", default=1
    )
    class_name: Text | None = field(
        "The workflow of type Custom, as pkg.module:Class.", default=None, alias="class"
    )
    config_map_ref: ConfigMapReference | None = field(
        "ConfigMap with Python modules, mounted on the import path of the workers.", default=None
    )


class RewardSpec(ApiType):
    """How responses are scored. A reward that fails never counts as zero."""

    type: Literal["Math", "ReasoningGym", "Code", "Function", "Service"] = field(
        "Math: the answer equals the row's (math-verify). ReasoningGym: the data set's own scorer. Code: the "
        "answer passes the row's tests, in a sandboxed process. Function: `function` decides. Service: the "
        "service at `url` decides.",
        default="Math",
    )
    function: Text | None = field("The scorer of type Function, as pkg.module:function.", default=None)
    config_map_ref: ConfigMapReference | None = field(
        "ConfigMap with Python modules, mounted on the import path of the workers.", default=None
    )
    url: Text = field(
        "Address of the scorer of type Service: it receives POST {prompt, response, row}, answers {reward}.",
        default="",
    )
    timeout_seconds: Count = field("Longest time that one attempt to score may take, in seconds.", default=30)
    max_attempts: Annotated[int, Field(ge=1, le=100)] = field(
        "Attempts to score a sample; after that it leaves its group and is not scored zero.", default=3
    )


class SamplingSpec(ApiType):
    """How the policy is sampled."""

    group_size: Annotated[int, Field(ge=1, le=MAX_GROUP_SIZE)] = field(
        "Samples per prompt; group advantages compare them with each other (GRPO, arXiv 2402.03300).",
        mark="R",
        default=8,
    )
    max_new_tokens: Count = field(
        "Maximum number of tokens of an answer, each of them if a sample has several turns; less than "
        "model.contextLength, which includes the prompt.",
        mark="L",
        default=1024,
    )
    temperature: Positive = field(
        "Divisor of the logits, in the engines and also in the trainer, so that log-probs agree.",
        mark="L",
        default=1.0,
    )
    filter: Literal["None", "DropUniformGroups"] = field(
        "DropUniformGroups discards and replaces prompt groups whose samples all have the same reward, since "
        "they teach nothing (dynamic sampling, DAPO, arXiv 2503.14476).",
        mark="L",
        default="None",
    )
    max_discards_in_a_row: CountOrZero = field(
        "Prompt groups that may be discarded in a row, with none kept between them, before the job ends: as "
        "complete, with the reason Mastered, if nine in ten were solved by every sample, and otherwise as "
        "failed. 0: no bound.",
        mark="L",
        default=1000,
    )


class EvaluationSpec(ApiType):
    """Held-out prompts, answered greedily and never trained on.

    What is held out is left out of the rows that tickets are numbered through, so another choice gives every
    ticket another prompt, and what workers have earned for open ones would be joined to it. Hence mark R.
    """

    source: Text = field("Where the rows come from; the same forms as dataset.source.")
    split: Name = field("Split of the data set.", default="test", min_length=1)
    parameters: FreeForm = field("Keyword arguments of the source.", default={})
    every_steps: Count = field(
        "Steps between evaluations; there is also one before the first step and one after the last.",
        mark="L",
        default=20,
    )
    samples: Count = field("Number of held-out prompts.", default=200)
