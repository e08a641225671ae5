"""Data files in six formats and four syntaxes, read into Conversations."""

from training.data.formats.conversation import Conversation, Turn
from training.data.formats.pictures import PictureRef, PictureRoot
from training.data.formats.reader import DataFile
from training.data.formats.rows import Row, read_rows
from training.data.formats.shapes import Format, formats_of

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
