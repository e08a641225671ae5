"""Data files in six formats and four syntaxes, read into Conversations."""

from training.formats.conversation import Conversation, Turn
from training.formats.pictures import PictureRef, PictureRoot
from training.formats.reader import DataFile
from training.formats.rows import Row, read_rows
from training.formats.shapes import Format, formats_of

__all__ = [
    "Conversation",
    "DataFile",
    "Format",
    "PictureRef",
    "PictureRoot",
    "Row",
    "Turn",
    "formats_of",
    "read_rows",
]
