"""Does an intact prefix help this model? An examination, its page and its verdict."""

from intactkv.doctor.examine import Examination, examine
from intactkv.doctor.html import page
from intactkv.doctor.simulate import rounded_model

__all__ = ["Examination", "examine", "page", "rounded_model"]
