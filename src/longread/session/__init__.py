"""One reader: it reads, learns, continues a text, forks, and is kept in a file.

session.py    the reader
sampling.py   from logits to a token
writing.py    from token ids to text, up to a stop text
storage.py    its state as the tensors of a file, exact or rounded, and the check of a file from anywhere
"""

from longread.session.session import KIND, Description, Session
from longread.session.storage import STORAGES, Storage
from longread.session.writing import text_of

__all__ = ["KIND", "STORAGES", "Description", "Session", "Storage", "text_of"]
