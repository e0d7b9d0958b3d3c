"""The server's log: what it does, never keys, texts or token ids."""

from __future__ import annotations

import logging

logger = logging.getLogger("longread.server")
