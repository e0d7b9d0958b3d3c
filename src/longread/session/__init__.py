"""One reader: it reads, learns, continues a text, forks, and is kept in a file.

session.py    the reader
sampling.py   from logits to tokens, for whoever writes
text.py       texts: where one is cut, how far it has been read, and the one that is written, up to a stop text
storage.py    its state as the tensors of a file, exact or rounded, and the check of a file from anywhere
"""

from longread.session.sampling import Sampling
from longread.session.session import KIND, Description, Session
from longread.session.storage import STORAGES, Storage
from longread.session.text import TextPrefix, next_cut, text_of

__all__ = ["KIND", "STORAGES", "Description", "Sampling", "Session", "Storage", "TextPrefix", "next_cut", "text_of"]
