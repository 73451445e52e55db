"""Optional passes over documents, between reading and splitting: filters, decontamination, deduplication.

`build_passes` makes them of data.passes, `run_passes` runs them; base.py says what a pass is and why the outcome does
not depend on the number of workers.
"""

from data_pipeline.passes.base import Counts, Decider, Drop, Pass, Verdict, examine
from data_pipeline.passes.runner import build_passes, evaluation_files, run_passes

__all__ = [
    "Counts",
    "Decider",
    "Drop",
    "Pass",
    "Verdict",
    "build_passes",
    "evaluation_files",
    "examine",
    "run_passes",
]
