"""How tokens look at each other: one file a kind, all behind one interface.

A mixer maps x [B, T, D] and a past to an output [B, T, D] and the past that the next tokens will need.
"""
