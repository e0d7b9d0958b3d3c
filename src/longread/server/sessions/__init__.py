"""/v1/sessions: texts that are read once and asked many times.

routes.py    the routes
readings.py  a session reads, or scores, while its frozen twin reads along
writing.py   a session goes on with its text
losses.py    mean losses in bins
transfer.py  sessions as files that leave the server and come back
schemas.py   what the routes take and give
"""
