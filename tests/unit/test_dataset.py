"""Where rows come from, which are held out, and which one a ticket gets. For the rows: test_dataset_rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.rules import ROW_SOURCES
from asyncrl_runtime.trainer.dataset import SOURCES, PromptOrder, count_shared, load_rows
from support.messages.samples import make_job

splits: dict[str, Any] = {}
"""What the factory returns, by split."""
calls: list[dict[str, Any]] = []


def factory(*, split: str, seed: int, **parameters: Any) -> Any:
    calls.append({"split": split, "seed": seed, **parameters})
    if isinstance(splits[split], Exception):
        raise splits[split]
    return splits[split]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.splits", {})
    monkeypatch.setattr(f"{__name__}.calls", [])


def rows(*prompts: str) -> list[dict[str, Any]]:
    return [{"question": prompt, "answer": str(place)} for place, prompt in enumerate(prompts)]


def prompts(found: Iterable[dict[str, Any]]) -> list[str]:
    return [row["question"] for row in found]


def spec(*overrides: str, source: str = f"{__name__}:factory", samples: int | None = None) -> Any:
    evaluation = [] if samples is None else [f"evaluation.source={source}", f"evaluation.samples={samples}"]
    return make_job(f"dataset.source={source}", *evaluation, *overrides).spec


def refusal(*overrides: str, **options: Any) -> tuple[ExitCode, str]:
    with pytest.raises(ExitError) as refused:
        load_rows(spec(*overrides, **options))
    return refused.value.code, str(refused.value)


# -- sources


def test_every_source_of_the_api_is_registered() -> None:
    assert set(SOURCES) == set(ROW_SOURCES)


def test_a_factory_gets_split_seed_and_parameters_as_the_manifest_has_them() -> None:
    splits.update(train=rows("a"), test=rows("b"))
    load_rows(
        spec(
            "dataset.seed=5", "dataset.parameters={size: 3}", "evaluation.parameters={hard: true}", samples=9
        )
    )
    assert sorted(calls, key=lambda call: str(call["split"])) == [
        {"split": "test", "seed": 5, "hard": True},
        {"split": "train", "seed": 5, "size": 3},
    ]


def test_a_factory_may_yield_its_rows() -> None:
    splits["train"] = (row for row in rows("a", "b"))
    assert prompts(load_rows(spec()).training) == ["a", "b"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (RuntimeError("no disk"), "RuntimeError: no disk"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        ([], "split 'train' has no rows"),
        ([{"question": "a"}, "b"], "row 2 is str; must be a mapping"),
        ([{"question": "a"}, {"prompt": "b"}], "row 2: field 'question' is missing; the row has prompt"),
    ],
)
def test_a_factory_that_makes_no_rows_is_unusable_and_says_why(made: Any, message: str) -> None:
    splits["train"] = made
    code, text = refusal()
    assert code == ExitCode.UNUSABLE
    assert text.startswith(f"spec.dataset.source: {__name__}:factory: {message}")


def test_the_message_for_a_row_without_its_prompt_says_which_field_to_set() -> None:
    splits["train"] = rows("a")
    _, text = refusal("dataset.promptField=prompt")
    assert "row 1: field 'prompt' is missing; the row has answer, question" in text
    assert text.endswith("set spec.dataset.promptField, or fix the row")


def test_a_parameter_that_the_factory_does_not_take_is_told() -> None:
    splits["train"] = rows("a")
    code, text = refusal("dataset.parameters={seed: 3}")
    assert code == ExitCode.UNUSABLE and "multiple values for keyword argument 'seed'" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:rows", "'no_such_module:rows': module no_such_module cannot be imported"),
        ("json:rows", "'json:rows': json has no rows"),
        ("file:///nowhere/rows.jsonl", "No such file or directory: /nowhere/rows.jsonl"),
        ("reasoning-gym://no_such_task", "no_such_task"),
        ("hf://org/set", "needs the package datasets: pip install 'asyncrl[hub]'"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as where it is not installed
    code, text = refusal(source=source)
    assert code == ExitCode.REFUSED
    assert text.startswith("spec.dataset.source: ") and message in text


def test_the_held_out_split_is_named_by_its_own_field(tmp_path: Path) -> None:
    splits["train"] = rows("a")
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "b"}\n{"question": ')
    code, text = refusal(f"evaluation.source=file://{path}")
    assert code == ExitCode.UNUSABLE
    assert text.startswith(f"spec.evaluation.source: file://{path}: line 2 is not JSON: ")


# -- what is held out


def test_held_out_prompts_are_excluded_from_training_by_their_text() -> None:
    splits.update(train=rows("a", "b", "c", "b", "d"), test=[{"question": "b", "other": 1}, *rows("d", "e")])
    found = load_rows(spec(samples=9))
    assert prompts(found.training) == ["a", "c"] and prompts(found.held_out) == ["b", "d", "e"]
    assert found.num_excluded == 3
    assert count_shared(prompts(found.training), found.held_out, "question") == 0


def test_a_conversation_is_excluded_by_its_last_message() -> None:
    """That is how it is rendered without a chat template, and how a plain row of the other split has it."""
    conversation = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    splits.update(train=[{"question": conversation}, {"question": "2+2"}], test=rows("1+1"))
    assert prompts(load_rows(spec(samples=9)).training) == ["2+2"]


def test_as_many_different_prompts_are_held_out_as_the_manifest_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits.update(train=rows("a", "b", "c", "x"), test=rows("a", "a", "b", "c"))
    found = load_rows(spec(samples=2))
    assert prompts(found.held_out) == ["a", "b"] and prompts(found.training) == ["c", "x"]
    assert not caplog.messages
    assert len(load_rows(spec(samples=5)).held_out) == 3
    assert "spec.evaluation.samples: 5: " in caplog.text and "only 3 different prompts" in caplog.text


def test_a_split_that_is_held_out_whole_leaves_nothing_to_train_on() -> None:
    splits["train"] = rows("a", "b", "a")
    code, text = refusal("evaluation.split=train", samples=2)
    assert code == ExitCode.UNUSABLE
    assert text.startswith("spec.dataset.source: ") and "all 3 rows are held out" in text
    assert prompts(load_rows(spec("evaluation.split=train", samples=1)).training) == ["b"]


def test_without_an_evaluation_nothing_is_held_out() -> None:
    splits["train"] = rows("a", "a")
    found = load_rows(spec())
    assert (prompts(found.training), found.held_out, found.num_excluded) == (["a", "a"], (), 0)


def test_shared_prompts_are_counted_once_each() -> None:
    held_out = rows("a", "b", "c")
    assert count_shared(["a", "x", "a", "c"], held_out, "question") == 2
    assert count_shared([], held_out, "question") == 0
    assert count_shared(["a"], [], "question") == 0


# -- reasoning-gym


def gym(*overrides: str, samples: int | None = 60) -> Any:
    """The rows of a task that is so small that it repeats itself."""
    sizes = ["dataset.parameters={size: 200, min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}"]
    if samples is not None:
        sizes.append(
            "evaluation.parameters={size: 200, min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}"
        )
    return load_rows(spec(*sizes, *overrides, source="reasoning-gym://chain_sum", samples=samples))


def test_splits_of_reasoning_gym_are_other_items_and_share_no_prompt() -> None:
    found = gym()
    assert len(found.held_out) == 60 and found.num_excluded > 0
    assert len(found.training) == 200 - found.num_excluded
    assert count_shared(prompts(found.training), found.held_out, "question") == 0


def test_another_seed_does_not_make_what_is_held_out_a_window_of_what_is_trained() -> None:
    """Item i under seed s is Random(s + i): of two seeds that are near one another most items are equal."""
    train, near = (prompts(gym(f"dataset.seed={seed}", samples=None).training) for seed in (17, 18))
    assert near[:-1] == train[1:]
    held_out = prompts(gym(samples=200).held_out)
    runs = {tuple(train[place : place + 5]) for place in range(len(train))}
    assert not any(tuple(held_out[place : place + 5]) in runs for place in range(len(held_out)))


def test_a_row_of_reasoning_gym_says_how_it_is_scored() -> None:
    row = gym().training[0]
    assert row["metadata"]["source_dataset"] == "chain_sum"
    assert row["metadata"]["dataset_parameters"] == {
        "min_terms": 2,
        "max_terms": 3,
        "min_digits": 1,
        "max_digits": 1,
    }


def test_parameters_that_a_task_refuses_are_shown() -> None:
    code, text = refusal("dataset.parameters={min_terms: -1}", source="reasoning-gym://chain_sum")
    assert code == ExitCode.REFUSED and text.endswith("parameters are {'min_terms': -1}")


# -- which row a ticket gets


sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@given(sizes, seeds, st.integers(0, 20))
@settings(max_examples=40)
def test_every_pass_over_the_data_takes_each_row_once(num_rows: int, seed: int, epoch: int) -> None:
    order = PromptOrder(num_rows, seed)
    first = epoch * num_rows + 1
    assert sorted(order.index(ticket) for ticket in range(first, first + num_rows)) == list(range(num_rows))


@given(sizes, seeds, st.lists(st.integers(1, 500), min_size=1))
@settings(max_examples=40)
def test_the_row_is_a_function_of_the_ticket_whenever_it_is_asked(
    num_rows: int, seed: int, tickets: list[int]
) -> None:
    order = PromptOrder(num_rows, seed)
    assert [order.index(ticket) for ticket in tickets] == [
        PromptOrder(num_rows, seed).index(ticket) for ticket in tickets
    ]


def test_passes_and_seeds_differ_and_a_later_version_keeps_the_order() -> None:
    """A job that goes on after an upgrade gives open tickets the rows that they had."""
    order, another = PromptOrder(6, seed=17), PromptOrder(6, seed=18)
    first, second = ([order.index(ticket) for ticket in pass_] for pass_ in (range(1, 7), range(7, 13)))
    assert (first, second) == ([1, 0, 4, 2, 5, 3], [5, 4, 2, 1, 3, 0])
    assert [another.index(ticket) for ticket in range(1, 7)] != first
