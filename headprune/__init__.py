"""headprune: score every attention head, choose which to remove, cut them out, recover the quality, prove the gain.

    import headprune as hp
    scores = hp.score(model, batches, criterion="fisher")
    plan = hp.plan(scores, hp.Budget(heads=0.5))
    hp.prune(model, plan, calibration=batches)
    hp.recover(model, batches, teacher=dense, steps=500)
    hp.save(model, "pruned")
    model = hp.load("pruned")

Importing headprune also registers the operators of headprune.ops with torch and attn_implementation="headprune" with transformers.

What needs transformers, which takes seconds to import, is imported when one of the names is first asked for (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

from headprune import starting as starting  # isort: skip (it watches the other imports)
from headprune import nn as nn
from headprune import ops as ops
from headprune.version import __version__ as __version__
from headprune.when_imported import when_imported

when_imported("transformers.modeling_utils", lambda: importlib.import_module("headprune.attention_interface").register())
# The package is imported here, so that no later import of it takes the place of the function that bears its name.
importlib.import_module("headprune.report")
globals().pop("report", None)

if TYPE_CHECKING:
    from headprune.api import *  # noqa: F403
    from headprune.api import __all__ as __all__
else:  # where there is a __getattr__, type checkers take every name for one that exists

    def __getattr__(name: str) -> Any:
        """The public name, or one of the subpackages that the public names have brought along."""
        if name == "__all__" or not name.startswith("_"):
            api = vars(importlib.import_module("headprune.api"))
            for known in (api, globals()):
                if name in known:
                    return known[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
