"""The form of SGLang's answers, recorded: our engine is held to it where SGLang is absent."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.engines.sglang_process import SGLangProcess
from support.engines.tiny_models import EngineProcess
from support.engines.weight_trainer import PROMPT

GOLDEN = Path(__file__).parent / "golden.json"
"""Recorded by ASYNCRL_WRITE_GOLDEN=1 make contract-sglang; read the difference."""
SAMPLING = {"max_new_tokens": 3, "temperature": 1.0, "ignore_eos": True}
EXCHANGES: dict[str, tuple[str, str, Any]] = {
    "one prompt": (
        "POST",
        "/generate",
        {"input_ids": PROMPT, "sampling_params": SAMPLING, "return_logprob": True},
    ),
    "two prompts": (
        "POST",
        "/generate",
        {"input_ids": [PROMPT, PROMPT], "sampling_params": SAMPLING, "return_logprob": True},
    ),
    "no prompt": ("POST", "/generate", {"sampling_params": SAMPLING}),
    "prompt too long": ("POST", "/generate", {"input_ids": [5] * 1030, "sampling_params": SAMPLING}),
    "model": ("GET", "/model_info", None),
    "pause": ("POST", "/pause_generation", {"mode": "retract"}),
    "flush while paused": ("POST", "/flush_cache", None),
    "continue": ("POST", "/continue_generation", {}),
    "abort": ("POST", "/abort_request", {"abort_all": True}),
    "end without a session": ("POST", "/end_weight_update", {}),
    "session": ("POST", "/begin_weight_update", {"selector": "all"}),
    "session within a session": ("POST", "/begin_weight_update", {"selector": "all"}),
    "end": ("POST", "/end_weight_update", {}),
    "group that is not there": ("POST", "/destroy_weights_update_group", {"group_name": "none"}),
    "bucket without a session": (
        "POST",
        "/update_weights_from_distributed",
        {"names": [], "dtypes": [], "shapes": [], "group_name": "none"},
    ),
    "version alone": (
        "POST",
        "/update_weight_version",
        {"new_version": "default", "abort_all_requests": False},
    ),
}


def form(value: Any) -> Any:
    """Return what an answer is made of: its fields, and whether each is a number, a text or nothing."""
    match value:
        case dict():
            return {name: form(each) for name, each in sorted(value.items())}
        case list():
            return [form(value[0])] if value else []
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case None:
            return None
        case _:
            return "text"


def exchange(engine: EngineProcess, name: str) -> dict[str, Any]:
    """Ask, and return status and form of the answer; texts that are no JSON have none."""
    method, path, body = EXCHANGES[name]
    response = engine.http.request(method, path, json=body)
    try:
        return {"status": response.status_code, "body": form(response.json())}
    except ValueError:
        return {"status": response.status_code, "body": "text" if response.text else ""}


def misfits(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Return where an answer's form differs from SGLang's; fields that it leaves out do not matter."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        unknown = [f"{path}.{name}: SGLang has none" for name in found if name not in wanted]
        return unknown + [
            each
            for name in found.keys() & wanted
            for each in misfits(found[name], wanted[name], f"{path}.{name}")
        ]
    if isinstance(found, list) and isinstance(wanted, list):
        return [each for a, b in zip(found, wanted, strict=False) for each in misfits(a, b, f"{path}[]")]
    return [] if found == wanted else [f"{path}: {found}, SGLang has {wanted}"]


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_answer_has_the_form_of_sglangs(engine: EngineProcess, name: str) -> None:
    if name == "flush while paused":
        engine.post("/pause_generation", {"mode": "retract"})
    if name in ("session within a session", "end"):
        engine.post("/begin_weight_update", {"selector": "all"})
    found = exchange(engine, name)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if isinstance(engine, SGLangProcess) and os.environ.get("ASYNCRL_WRITE_GOLDEN"):
        golden[name] = found
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    elif isinstance(engine, SGLangProcess):
        assert found == golden[name]
    else:
        assert found["status"] == golden[name]["status"]
        assert misfits(found["body"], golden[name]["body"]) == []
