"""Who comes in, how often, and with how much.

gate.py    one door around all routes: key, rate, size and time of every request
keys.py    API keys and the tenants they open
limits.py  what one tenant, and one request, may take
"""
