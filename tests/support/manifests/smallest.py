"""The smallest manifest, which tests start from."""

from typing import Any

SMALLEST: dict[str, Any] = {
    "apiVersion": "asyncrl.dev/v1alpha1",
    "kind": "AsyncRLJob",
    "metadata": {"name": "gsm8k"},
    "spec": {
        "model": {"source": "hf://Qwen/Qwen3-1.7B"},
        "dataset": {"source": "hf://openai/gsm8k"},
        "training": {"batchSize": 64, "maxSteps": 200},
        "gpuBudget": {"total": 8},
        "checkpoint": {"location": {"claimName": "checkpoints"}},
    },
}
