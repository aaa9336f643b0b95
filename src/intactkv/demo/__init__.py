"""The embedded model and text, and the demo that runs on them."""

from importlib.resources import files
from pathlib import Path

MODEL = Path(str(files(__name__))) / "model"
TEXT = Path(str(files(__name__))) / "text.txt"
