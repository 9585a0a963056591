"""Layer-wise relevance propagation for decoders: which weights carry the answer to a sample.

Names are imported on first use, so that importance files can be read without loading transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "OPERATIONS": "operations",
    "Consumer": "relevance",
    "GradientRule": "passes",
    "ImportanceConfig": "importance",
    "InputMoments": "directions",
    "LRPContext": "lrp",
    "RunningMerge": "merging",
    "Rule": "lrp",
    "ModelCheck": "checkreport",
    "Sample": "passes",
    "attribute_batch": "relevance",
    "attribute_sample": "relevance",
    "check_model": "selfcheck",
    "check_importance": "artefact",
    "compute_importance": "computing",
    "compute_input_moments": "computing",
    "conservation_error": "selfcheck",
    "fingerprint": "fingerprints",
    "importance_files": "artefact",
    "load_importance": "artefact",
    "load_input_moments": "moments_files",
    "lrp_rules": "lrp",
    "merge": "merging",
    "open_importance": "artefact",
    "parameter_relevance": "relevance",
    "save_importance": "artefact",
    "save_input_moments": "moments_files",
    "token_relevance": "relevance",
}

__all__ = [
    "OPERATIONS",
    "Consumer",
    "GradientRule",
    "ImportanceConfig",
    "InputMoments",
    "LRPContext",
    "ModelCheck",
    "Rule",
    "RunningMerge",
    "Sample",
    "attribute_batch",
    "attribute_sample",
    "check_importance",
    "check_model",
    "compute_importance",
    "compute_input_moments",
    "conservation_error",
    "fingerprint",
    "importance_files",
    "load_importance",
    "load_input_moments",
    "lrp_rules",
    "merge",
    "open_importance",
    "parameter_relevance",
    "save_importance",
    "save_input_moments",
    "token_relevance",
]

if TYPE_CHECKING:
    from agcl.attribution.artefact import (
        check_importance,
        importance_files,
        load_importance,
        open_importance,
        save_importance,
    )
    from agcl.attribution.checkreport import ModelCheck
    from agcl.attribution.computing import compute_importance, compute_input_moments
    from agcl.attribution.directions import InputMoments
    from agcl.attribution.fingerprints import fingerprint
    from agcl.attribution.importance import ImportanceConfig
    from agcl.attribution.lrp import LRPContext, Rule, lrp_rules
    from agcl.attribution.merging import RunningMerge, merge
    from agcl.attribution.moments_files import load_input_moments, save_input_moments
    from agcl.attribution.operations import OPERATIONS
    from agcl.attribution.passes import GradientRule, Sample
    from agcl.attribution.relevance import (
        Consumer,
        attribute_batch,
        attribute_sample,
        parameter_relevance,
        token_relevance,
    )
    from agcl.attribution.selfcheck import check_model, conservation_error


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agcl.attribution' has no attribute {name!r}")
    return getattr(import_module(f"agcl.attribution.{_HOMES[name]}"), name)
