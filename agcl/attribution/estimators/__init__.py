"""Estimators of importance, one interface: what AGCL's attribution is compared with, and how to add one's own."""

from agcl.attribution.estimators.data_free import Change, Magnitude, Random
from agcl.attribution.estimators.fisher import EmpiricalFisher, Fisher
from agcl.attribution.estimators.gradient_weight import GradientWeight
from agcl.attribution.estimators.interface import Estimator, Evidence
from agcl.attribution.estimators.lrp import LRP
from agcl.attribution.estimators.mas import MAS
from agcl.attribution.estimators.per_sample import PerSampleGradient
from agcl.attribution.estimators.spg import SPG
from agcl.attribution.estimators.wanda import Wanda

__all__ = [
    "LRP",
    "MAS",
    "SPG",
    "Change",
    "EmpiricalFisher",
    "Estimator",
    "Evidence",
    "Fisher",
    "GradientWeight",
    "Magnitude",
    "PerSampleGradient",
    "Random",
    "Wanda",
]
