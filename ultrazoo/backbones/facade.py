"""The part of a diffusers model that diffusers pipelines rely on: `config`, `cache_context` and keyword calls.

With it a native backbone stands in a pipeline where ``WanTransformer3DModel`` stood. The pipeline announces sampling
steps and guidance branches through `cache_context`; they go to `Backbone.select`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UsageError
from .contract import Backbone


class Config(dict[str, Any]):
    """A model's settings, by key or by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's config has no {name!r}") from None


class Sample(NamedTuple):
    """What a keyword call returns: a one-tuple whose only entry is also `sample`."""

    sample: Tensor


class PipelineBackbone(Backbone):
    """A backbone that diffusers pipelines can call."""

    config: Config

    @contextlib.contextmanager
    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, **_: Any
    ) -> Iterator[None]:
        """One forward of a pipeline: guidance branch `name` (``cond``, ``uncond``) at a sampling step.

        A pipeline that does not say which step it is at leaves the selection alone. Other facts that pipelines send
        along (the noise level) have no use here.
        """
        with self.session.announced(name, step_index, num_inference_steps):
            yield


def refuse_attention_kwargs(attention_kwargs: dict[str, Any] | None) -> None:
    """Raise UsageError for what a pipeline hands to attention processors, which a native backbone does not have."""
    if attention_kwargs:
        raise UsageError(
            f"a native backbone has no attention processors, so attention_kwargs={attention_kwargs} would be ignored; "
            "load adapters into the model itself"
        )
