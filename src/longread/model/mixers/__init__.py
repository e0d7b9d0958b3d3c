"""How tokens exchange information: one file a kind, all behind one interface.

A mixer maps x [B, T, D] and a past to an output [B, T, D] and the past that the next tokens will need: the newest keys
and values of attention, or a state of constant size.

attention.py        windowed or full
mamba2.py           a decaying state                     } alternating with windowed attention
gated_deltanet.py   a decaying state, replaced by key    }
ttt_kvb.py          an MLP that learns values from keys, after windowed attention
recurrent.py        what the last three share
"""
