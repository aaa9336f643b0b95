"""Calibration: train the intact keys and values to absorb what is left of the quantization error."""

from intactkv.calibrating.conversations import conversation_samples
from intactkv.calibrating.objective import Objective
from intactkv.calibrating.samples import Sample, Samples, Split, split, text_samples
from intactkv.calibrating.spool import Spool, spool, spool_bytes
from intactkv.calibrating.step import CalibrationConfig
from intactkv.calibrating.train import Report, calibrate

__all__ = [
    "CalibrationConfig",
    "Objective",
    "Report",
    "Sample",
    "Samples",
    "Split",
    "Spool",
    "calibrate",
    "conversation_samples",
    "split",
    "spool",
    "spool_bytes",
    "text_samples",
]
