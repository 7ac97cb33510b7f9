"""The former name of `asyncrl_examples.quickstart`, for jobs whose manifests have it, until the next release.

`spec.model.source` cannot be edited and is part of a checkpoint's origin, so the name has to go on resolving.
"""

from asyncrl_examples.quickstart import build_tokenizer, exact, is_held_out, make_model, make_text_model, sums

__all__ = ["build_tokenizer", "exact", "is_held_out", "make_model", "make_text_model", "sums"]
