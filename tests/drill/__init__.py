"""The fault drill: runs of several ranks meet every fault that a cluster has, and become the run that met none.

    python -m tests.drill --seed 1 --json drill.json --page drill.md

Each fault is drawn from a seed: which rank, and where. `injection` puts it into a rank, `launching` starts ranks, by
torchrun or as forks of a process that has torch, `faults` is the list, `judging` compares with the undisturbed run.
"""
