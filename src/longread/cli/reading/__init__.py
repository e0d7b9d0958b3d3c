"""How `longread read` reads for an hour and loses nothing.

pieces.py     tokens of texts, cut at positions of the session that are always the same, with a fingerprint of the bytes
readers.py    sessions that read them, learning and frozen, and the figures of what they read
figures.py    these figures as a text of fixed width, kept with the session
stops.py      signals: heard at once, obeyed where nothing is half-done
saving.py     the session file: its room, its turn by the clock, how a later command goes on
progress.py   how far it is and how long it will take, on a terminal and in a log
"""
