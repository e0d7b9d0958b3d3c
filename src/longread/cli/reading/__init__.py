"""How `longread read` reads for an hour and loses nothing.

pieces.py         texts, and their tokens: cut at positions that are always the same, with a fingerprint of the bytes
readers.py        sessions that read them, learning and frozen, and the figures of what they read, kept with the session
course.py         piece after piece to the end, or to whatever comes before it
stops.py          signals: heard at once, obeyed where nothing is half-done
session_file.py   the session on the disk: its room, its turn by the clock, how a later command goes on
progress.py       how far it is and how long it will take, on a terminal and in a log
results.py        tables, figures and page
"""
