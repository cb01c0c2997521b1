"""Named settings for measuring whole runs."""

from dataclasses import dataclass, field

from hf_lowrank.families.curvature import CurvatureSettings
from hf_lowrank.families.interpolation import InterpolationSettings
from hf_lowrank.families.landscape import LandscapeSettings

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Settings of every family of metrics.

    Attributes:
        sequences: of the evaluation set, spread evenly over what there is.
        landscape, interpolation, curvature: settings of the families.
    """

    sequences: int = 32
    landscape: LandscapeSettings = field(default_factory=LandscapeSettings)
    interpolation: InterpolationSettings = field(default_factory=InterpolationSettings)
    curvature: CurvatureSettings = field(default_factory=CurvatureSettings)


PRESETS = {
    # about a minute a checkpoint for a model of 2 M parameters on two CPU cores
    "quick": Preset(),
    # arXiv 2605.13652: 1000 documents; K is 5, 10, 20 and 100 there; the grid along the weighted singular directions
    # is moved so that 0 lies on it
    "study": Preset(
        sequences=1000,
        landscape=LandscapeSettings(
            directions=100, points=25, svd_1_points=101, svd_k=(5, 10, 20, 100), svd_k_points=27, trajectory=2
        ),
        interpolation=InterpolationSettings(points=20, cross_points=21),
        curvature=CurvatureSettings(sequences=32, samples=32, iterations=30),
    ),
}
