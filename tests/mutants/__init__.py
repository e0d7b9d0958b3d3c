"""Mutation testing: small faults put into `src` one by one, each judged by the tests that run the changed line.

`python -m tests.mutants` needs nothing but what the tests need. mutmut 3 passes over most decorated functions and over
everything outside of functions; cosmic-ray starts a process for each mutant, which imports torch anew. Here torch is
imported once, and each mutant is a fork.
"""
