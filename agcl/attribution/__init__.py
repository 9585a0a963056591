"""Layer-wise relevance propagation for decoders: which weights carry the answer to a sample."""

from agcl.attribution.importance import ImportanceConfig, load_importance, save_importance
from agcl.attribution.lrp import LRPContext, Rule, lrp_rules
from agcl.attribution.operations import OPERATIONS
from agcl.attribution.relevance import (
    Consumer,
    GradientRule,
    attribute_sample,
    conservation_error,
    parameter_relevance,
    token_relevance,
)

__all__ = [
    "OPERATIONS",
    "Consumer",
    "GradientRule",
    "ImportanceConfig",
    "LRPContext",
    "Rule",
    "attribute_sample",
    "conservation_error",
    "load_importance",
    "lrp_rules",
    "parameter_relevance",
    "save_importance",
    "token_relevance",
]
