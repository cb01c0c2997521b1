"""Curvature of the loss over training."""

import pandas as pd
from matplotlib.figure import Figure

from hf_lowrank.figures.drawing import metrics_over_steps
from hf_lowrank.report.catalogue import CURVATURE

__all__ = ["curvature_over_steps"]


def curvature_over_steps(records: pd.DataFrame) -> Figure | None:
    """Draw the Hessian's top eigenvalue and trace with their standard errors over the measured steps."""
    return metrics_over_steps(records, CURVATURE.metrics, "Curvature of the loss over training")
