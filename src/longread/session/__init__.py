"""One reader: it reads, learns, continues a text, forks, and is kept in a file.

session.py    the reader
cuts.py       where it cuts a text that it reads in pieces
sampling.py   from logits to a token
writing.py    from token ids to text, up to a stop text
prefix.py     how far it is in a text, so that the same text can be gone on with
storage.py    its state as the tensors of a file, exact or rounded, and the check of a file from anywhere
"""

from longread.session.cuts import next_cut
from longread.session.prefix import TextPrefix
from longread.session.sampling import Sampling
from longread.session.session import KIND, Description, Session
from longread.session.storage import STORAGES, Storage
from longread.session.writing import text_of

__all__ = ["KIND", "STORAGES", "Description", "Sampling", "Session", "Storage", "TextPrefix", "next_cut", "text_of"]
