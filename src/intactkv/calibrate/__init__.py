"""Calibration: train the intact keys and values to absorb what is left of the quantization error."""

from intactkv.calibrate.conversations import conversation_samples
from intactkv.calibrate.objective import Objective
from intactkv.calibrate.samples import Sample, Samples, Split, split, text_samples
from intactkv.calibrate.step import Settings
from intactkv.calibrate.targets import Spool, spool, spool_bytes
from intactkv.calibrate.train import Report, calibrate

__all__ = [
    "Objective",
    "Report",
    "Sample",
    "Samples",
    "Settings",
    "Split",
    "Spool",
    "calibrate",
    "conversation_samples",
    "split",
    "spool",
    "spool_bytes",
    "text_samples",
]
