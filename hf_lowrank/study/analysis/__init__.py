"""What a study says: six analyses of finished runs, each with its uncertainty over seeds, as one report.

The runs may be anybody's: everything comes from their reports, or from a study's `study.json` where there is one.
"""

from hf_lowrank.study.analysis.analyse import analyse

__all__ = ["analyse"]
